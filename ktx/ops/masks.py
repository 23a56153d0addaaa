"""Attention masks that are one interval of visible keys for each query.

Causal, sliding-window, left-padded and static-cache masks all are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from ktx.utils.tensor_memo import TensorMemo


class Intervals(torch.Tensor):
    """A mask bool [B, 1, S, T], true where a query sees a key, stored as one interval of keys for each query.

    The attention of ktx reads `ranges`. To all other code, such as a patched forward or a hook, the tensor is the dense
    mask that transformers creates for its own kernels: every operation gets the dense mask. Once the dense mask has
    been modified, `ranges` no longer applies (`is_modified`).

    Attributes:
        ranges: int32 [B, S, 2] on the CPU: the first visible key of a query, and the one after the last.
        dense: The dense mask, once it has been used.
    """

    ranges: torch.Tensor
    dense: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, ranges: torch.Tensor, keys: int, device: torch.device | str = "cpu") -> Intervals:
        """Creates a bool tensor [batch, 1, queries, keys] without memory from ranges int32 [batch, queries, 2]."""
        shape = (ranges.shape[0], 1, ranges.shape[1], keys)
        mask: Intervals = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        mask.ranges, mask.dense = ranges, None
        return mask

    def materialize(self) -> torch.Tensor:
        """Returns the dense mask, the same tensor at each call."""
        if self.dense is None:
            self.dense = self._compute_dense()
        return self.dense

    def _compute_dense(self) -> torch.Tensor:
        starts, ends = (self.ranges[:, None, :, i, None].to(self.device) for i in (0, 1))
        keys = torch.arange(self.shape[3], device=self.device)
        return (keys >= starts) & (keys < ends)

    def is_modified(self) -> bool:
        """Whether the dense mask was written to.

        Compares values, because operations below __torch_dispatch__ do not increment version counters.
        """
        return self.dense is not None and not torch.equal(self.dense, self._compute_dense())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(lambda x: x.materialize() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.device]]:
        return ["ranges"], (self.shape[3], self.device)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Intervals:
        return Intervals(inner["ranges"], *context)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Intervals, (self.ranges, self.shape[3], self.device)

    def __deepcopy__(self, memo: Any) -> Intervals:
        return Intervals(self.ranges.clone(), self.shape[3], self.device)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Intervals({self.materialize()!r})"


_ranges_of_masks = TensorMemo[torch.Tensor]()


def ranges_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the ranges int32 [B, S, 2] of a mask of intervals, which kernels read in its place; None for other masks.

    Args:
        mask: Intervals, which count unless modified, or ranges int32 [B, 1, S, 2], or any other mask.
    """
    if isinstance(mask, Intervals):
        return None if mask.is_modified() else mask.ranges
    if mask is None or mask.dtype != torch.int32:
        return None
    # a copy, because a view would keep the mask alive
    return _ranges_of_masks.get_or_compute(mask, lambda: mask[:, 0].clone(memory_format=torch.contiguous_format))


def non_causal_ranges(
    ranges: torch.Tensor | None, mask: torch.Tensor | None, sizes: tuple[int, int, int]
) -> torch.Tensor | None:
    """Returns the ranges for a module whose `is_causal` was set to False, for the result of transformers' SDPA.

    Args:
        ranges: Ranges int32 [B, S, 2], or None.
        mask: The dense mask, or None.
        sizes: Batch size, number of queries and number of keys.

    Returns:
        Ranges that see all keys where transformers passes no mask to its kernel; otherwise `ranges`.
    """
    batch, queries, keys = sizes
    if mask is not None or queries == 1:
        return ranges
    if ranges is not None:  # transformers passes no mask either for a prompt whose mask is just causal
        causal = torch.tensor([[0, i + 1] for i in range(queries)], device=ranges.device)
        if queries != keys or not bool((ranges == causal).all()):
            return ranges
    return torch.tensor([0, keys], dtype=torch.int32, device="cpu").expand(batch, queries, 2).contiguous()


def mask_version(mask: torch.Tensor | None) -> Any:
    """Returns a value that compares equal between calls only if the mask cannot have been modified in between."""
    if isinstance(mask, Intervals):
        return 0 if mask.dense is None else object()
    return 0 if mask is None or mask.is_inference() else mask._version


def intervals_of(mask: torch.Tensor) -> torch.Tensor:
    """Converts a mask bool [B, 1, S, T] to Intervals if each row is one interval or empty; returns others unchanged.

    With Intervals the kernels skip the keys outside. A row is one interval if the distance of its first and last
    visible key equals their number.
    """
    count, first = mask.sum(-1), mask.int().argmax(-1)
    end = mask.shape[-1] - mask.flip(-1).int().argmax(-1)
    if not bool(((end - first == count) | (count == 0)).all()):
        return mask
    ranges = torch.stack([first, torch.where(count == 0, first, end)], -1).to(torch.int32).cpu()
    return Intervals(ranges[:, 0].contiguous(), mask.shape[-1], mask.device)
