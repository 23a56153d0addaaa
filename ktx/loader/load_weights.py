"""Loads weights into a meta-device model and initializes the buffers that no file holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ktx.errors import BadFile
from ktx.injection.inject import Plan
from ktx.kernels.packed_cache import Origin, PackedCache, cache_context
from ktx.loader.build import PlannedModel
from ktx.ops.base import Operator
from ktx.ops.embed import Embedding
from ktx.ops.linear import Linear
from ktx.ops.tied import TiedLinear
from ktx.transformers_compat import dtype_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_weights(
    planned: PlannedModel,
    advance: Callable[[int], None],
    *,
    threads: int,
    store: PackedCache | None,
    origin: Origin,
) -> None:
    """Loads the plan's steps in file order on a thread pool; the first error cancels the remaining steps.

    Args:
        planned: the meta-device model, which receives the weights.
        advance: called with the number of bytes of each step that is done.
        threads: size of the thread pool.
        store: the packed cache on disk, which is read or filled.
        origin: the files that pickles of the packed weights refer to.
    """
    model, plan, source = planned.model, planned.plan, planned.source
    dtype_for = _dtype_of(model, planned.dtype)
    ordered = sorted(plan, key=lambda step: min(((spec.file, spec.offset) for spec in step.specs), default=("", 0)))

    def load_step(index: int) -> None:
        """Loads one step of the plan (a module); first requests the pages of the step that follows the running ones.

        Pages are released after use, because otherwise the file's pages and the packed weights would both count as this
        process's memory.
        """
        if (store is None or not store.is_complete) and index + threads < len(ordered):
            source.prefetch(ordered[index + threads].tensors)
        step = ordered[index]
        module = model.get_submodule(step.path) if step.path else model
        if isinstance(module, Operator) and not _shares_embedding(module):
            with cache_context(step.path, store, origin):
                module.load(source)
        own_names = {
            name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        }
        for full_name in step.tensors:
            name = full_name.removeprefix(f"{step.path}.")
            if name in own_names:
                _assign_tensor(
                    module,
                    name,
                    source.get(full_name).dequantize().to(plan.devices[step.path].torch),
                    dtype_for(full_name),
                )
        source.release(step.tensors)
        advance(step.nbytes)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(load_step, index) for index in range(len(ordered))]
        for future in futures:
            try:
                future.result()
            except BaseException:
                for pending in futures:
                    pending.cancel()
                raise
    for module in model.modules():
        if isinstance(module, Linear) and _shares_embedding(module):
            owner = model.get_submodule(module.tied_to.rpartition(".")[0])
            if isinstance(owner, Embedding) and owner.packed is not None:
                module.parts = [owner.packed]
                module.ties = owner.ties = [*owner.ties, module] if owner.ties else [owner, module]
            module.load(source)
            if type(module) is Linear and not module.ties and isinstance(getattr(owner, "weight", None), nn.Parameter):
                TiedLinear.tie_head(module, owner)


def _shares_embedding(module: nn.Module) -> bool:
    """Whether an output layer reads the embedding's matrix and has none of its own, so it must be loaded after it."""
    return isinstance(module, Linear) and bool(module.tied_to) and not module.has_own_copy


def _assign_tensor(module: nn.Module, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Replaces a meta parameter or buffer by the values of the file; float buffers become f32, parameters `dtype`."""
    param = module._parameters.get(name)
    if param is not None:
        module._parameters[name] = nn.Parameter(values.reshape(param.shape).to(dtype), requires_grad=False)
        # transformers' initializer skips it then.
        module._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr]
    else:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = values.reshape(buffer.shape).to(
            torch.float32 if buffer.is_floating_point() else buffer.dtype
        )


def _dtype_of(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Returns a function from a parameter's name to its type: `dtype`, unless transformers keeps it in another one."""
    dtypes = dtype_plan(model, dtype)

    def dtype_for(name: str) -> torch.dtype:
        found: torch.dtype = dtypes.get(name, dtype)
        return found

    return dtype_for


def init_missing_buffers(model: PreTrainedModel, plan: Plan) -> None:
    """Computes buffers that no file holds, such as rotary tables, by transformers' initializer, on their devices.

    Buffers are filled with NaN first, which shows whether the initializer computed them. At the end, output layers that
    no rule replaced are tied, and all tensors are checked.

    Raises:
        BadFile: a buffer cannot be computed, or a parameter is still on the meta device.
    """
    for path, module in model.named_modules():
        meta_names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in meta_names:
            module._buffers[name] = _nan_buffer(module._buffers[name])
        ancestors = [
            path.rsplit(".", depth)[0] if depth <= path.count(".") else "" for depth in range(path.count(".") + 2)
        ]
        # Some families initialize a layer's buffers in the enclosing model.
        for owner in ancestors if meta_names else ():
            model._init_weights(model.get_submodule(owner))
            if not any(_has_nan(module._buffers[name]) for name in meta_names):
                break
        for name in meta_names:
            if _has_nan(module._buffers[name]):
                raise BadFile(
                    f"{path}.{name} is in no file, and _init_weights of {type(model).__name__} does not compute it"
                )
            module._buffers[name] = module._buffers[name].to(plan.devices[path].torch)
    for target in dict(getattr(model, "all_tied_weights_keys", None) or {}):
        module, _, name = target.rpartition(".")
        owner = model.get_submodule(module)
        # A module that no rule replaced is tied as transformers ties it.
        if isinstance(owner, nn.Linear) and not isinstance(owner, Operator):
            embedding: Any = model.get_submodule(model.all_tied_weights_keys[target].rpartition(".")[0])
            source = embedding.rows().values(embedding.dtype) if isinstance(embedding, Embedding) else embedding.weight
            source = source.to(plan.devices[module].torch)
            owner._parameters[name] = (
                source if isinstance(source, nn.Parameter) else nn.Parameter(source, requires_grad=False)
            )
    unloaded = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if unloaded:
        raise BadFile(
            f"these parameters were not loaded: {', '.join(unloaded[:5])}{' and more' if len(unloaded) > 5 else ''}"
        )


def _nan_buffer(like: torch.Tensor) -> torch.Tensor:
    """Returns an uninitialized CPU buffer, filled with NaN if its type is floating-point."""
    buffer = torch.empty_like(like, device="cpu")
    return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer


def _has_nan(buffer: torch.Tensor) -> bool:
    return bool(buffer.is_floating_point() and buffer.isnan().any())


class ProgressSink(Protocol):
    """Receives the loading progress in bytes, for example to report it to a server's clients."""

    total: int

    def advance(self, nbytes: int) -> None:
        """Called with the number of bytes loaded since the last call."""


@contextmanager
def progress_bar(total: int, progress: bool | ProgressSink, label: str = "loading") -> Iterator[Callable[[int], None]]:
    """Yields a function that advances a progress bar by a number of bytes; draws nothing if stderr is not a terminal.

    The bar shows bytes, GB/s and the remaining time.

    Args:
        total: bytes in all.
        progress: whether to draw the bar; a ProgressSink is called in addition to the bar.
        label: text in front of the bar.
    """
    if not isinstance(progress, bool):
        progress.total = total
        with progress_bar(total, True, label) as advance:

            def advance_both(nbytes: int) -> None:
                progress.advance(nbytes)
                advance(nbytes)

            yield advance_both
        return
    if not progress or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
