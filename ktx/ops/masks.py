"""Masks that are one interval of visible keys for each query: causal, sliding, left-padded and static-cache masks all are."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map


class Intervals(torch.Tensor):
    """A mask bool [B, 1, S, T], true where a query sees a key, as `ranges` int32 [B, S, 2] on the CPU: the first key that it sees, and the one behind the last.

    ktx's attention reads the ranges. For any other code, a patched forward or a hook, it is the mask that transformers makes for its own kernels: whatever operation is
    asked of it gets the matrix, and once something was written to the matrix that is what counts.
    """

    ranges: torch.Tensor
    whole: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, ranges: torch.Tensor, keys: int, device: torch.device | str = "cpu") -> Intervals:
        shape = (ranges.shape[0], 1, ranges.shape[1], keys)
        made: Intervals = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        made.ranges, made.whole = ranges, None
        return made

    def matrix(self) -> torch.Tensor:
        """The mask as a plain tensor, the same at each call."""
        if self.whole is None:
            self.whole = self._made()
        return self.whole

    def _made(self) -> torch.Tensor:
        first, end = (self.ranges[:, None, :, i, None].to(self.device) for i in (0, 1))
        keys = torch.arange(self.shape[3], device=self.device)
        return (keys >= first) & (keys < end)

    def written(self) -> bool:
        """Whether somebody has written other values to the matrix; what is below a tensor's operations counts no versions."""
        return self.whole is not None and not torch.equal(self.whole, self._made())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(lambda x: x.matrix() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.device]]:
        return ["ranges"], (self.shape[3], self.device)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], about: Any, size: Any, stride: Any) -> Intervals:
        return Intervals(inner["ranges"], *about)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Intervals, (self.ranges, self.shape[3], self.device)

    def __deepcopy__(self, memo: Any) -> Intervals:
        return Intervals(self.ranges.clone(), self.shape[3], self.device)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Intervals({self.matrix()!r})"


def ranges_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The ranges int32 [B, S, 2] of a mask that is one interval for each query: Intervals as they were made, or int32 [B, 1, S, 2]; None for any other mask."""
    if isinstance(mask, Intervals):
        return None if mask.written() else mask.ranges
    if mask is None or mask.dtype != torch.int32:
        return None
    known: torch.Tensor | None = getattr(mask, "ktx_ranges", None)  # one mask serves all layers of a forward
    if known is None:
        known = mask.ktx_ranges = mask[:, 0].contiguous()  # type: ignore[attr-defined]
    return known


def uncausal(
    ranges: torch.Tensor | None, mask: torch.Tensor | None, sizes: tuple[int, int, int]
) -> torch.Tensor | None:
    """The ranges of a module whose `is_causal` was set to False, for a batch, queries and keys in `sizes`: all keys, where transformers gives its kernel no mask."""
    batch, queries, keys = sizes
    if mask is not None or queries == 1:
        return ranges
    if ranges is not None:
        causal = torch.tensor([[0, i + 1] for i in range(queries)], device=ranges.device)
        if queries != keys or not bool((ranges == causal).all()):
            return ranges
    return torch.tensor([0, keys], dtype=torch.int32, device="cpu").expand(batch, queries, 2).contiguous()


def edits_of(mask: torch.Tensor | None) -> Any:
    """Something that is the same as long as nobody can have written to a mask, as far as tensors count that."""
    if isinstance(mask, Intervals):
        return 0 if mask.whole is None else object()
    return 0 if mask is None or mask.is_inference() else mask._version


def intervals_of(full: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, S, T] -> Intervals if every row is one interval (or empty), else the mask itself."""
    count, first = full.sum(-1), full.int().argmax(-1)
    last = full.shape[-1] - full.flip(-1).int().argmax(-1)
    if not bool(((last - first == count) | (count == 0)).all()):
        return full
    ranges = torch.stack([first, torch.where(count == 0, first, last)], -1).to(torch.int32).cpu()
    return Intervals(ranges[:, 0].contiguous(), full.shape[-1], full.device)
