"""Weights into a prepared model, and what no file holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ktx.errors import BadFile
from ktx.injection.inject import Plan
from ktx.kernels.packed_cache import Origin, PackedCache, loading
from ktx.ops.base import Operator
from ktx.ops.embed import Embedding
from ktx.ops.linear import Linear
from ktx.ops.tied import Tied
from ktx.transformers_compat import dtype_plan
from ktx.weights.base import WeightSource


def load_weights(
    model: nn.Module,
    made: Plan,
    source: WeightSource,
    dtype: torch.dtype,
    threads: int,
    advance: Callable[[int], None],
    store: PackedCache | None = None,
    origin: Origin | None = None,
) -> None:
    """Every step in file order on `threads` threads; the first error stops the rest."""
    keep = _dtype_of(model, dtype)
    steps = sorted(made, key=lambda step: min(((spec.file, spec.offset) for spec in step.specs), default=("", 0)))

    def one(index: int) -> None:
        for following in steps[index + threads : index + threads + 1] if store is None or not store.found else ():
            source.prefetch(following.tensors)
        step = steps[index]
        module = model.get_submodule(step.path) if step.path else model
        if isinstance(module, Operator) and not _shares(module):
            with loading(step.path, store, origin):
                module.load(source)
        own = {name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
        for full in step.tensors:
            name = full.removeprefix(f"{step.path}.")
            if name in own:
                _set_own(module, name, source.get(full).dequantize().to(made.devices[step.path].torch), keep(full))
        source.release(step.tensors)
        advance(step.nbytes)

    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(one, index) for index in range(len(steps))]
        for job in jobs:
            try:
                job.result()
            except BaseException:
                for other in jobs:
                    other.cancel()
                raise
    for module in model.modules():
        if isinstance(module, Linear) and _shares(module):
            owner = model.get_submodule(module.tied_to.rpartition(".")[0])
            if isinstance(owner, Embedding) and owner.packed is not None:
                module.parts = [owner.packed]
                module.ties = owner.ties = [*owner.ties, module] if owner.ties else [owner, module]
            module.load(source)
            if type(module) is Linear and not module.ties and isinstance(getattr(owner, "weight", None), nn.Parameter):
                Tied.become(module, owner)


def _shares(module: nn.Module) -> bool:
    """Whether an output layer has no matrix of its own but the embedding's."""
    return isinstance(module, Linear) and bool(module.tied_to) and not module.copies


def _set_own(module: nn.Module, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    old = module._parameters.get(name)
    if old is not None:
        module._parameters[name] = nn.Parameter(values.reshape(old.shape).to(dtype), requires_grad=False)
        module._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr] # transformers' initialiser leaves it alone
    else:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = values.reshape(buffer.shape).to(
            torch.float32 if buffer.is_floating_point() else buffer.dtype
        )


def _dtype_of(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    plan = dtype_plan(model, dtype)

    def dtype_for(name: str) -> torch.dtype:
        return plan.get(name, dtype)

    return dtype_for


def init_missing_buffers(model: Any, made: Plan) -> None:
    """What no file holds: rotary tables and other computed buffers, by transformers' own initialiser, then to their module's device; after that nothing may be left on meta."""
    for path, module in model.named_modules():
        meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in meta:
            module._buffers[name] = _unknown(module._buffers[name])
        around = [
            path.rsplit(".", depth)[0] if depth <= path.count(".") else "" for depth in range(path.count(".") + 2)
        ]
        for owner in around if meta else ():  # some families fill the buffers of a layer from the model around it
            model._init_weights(model.get_submodule(owner))
            if not any(_is_unknown(module._buffers[name]) for name in meta):
                break
        for name in meta:
            if _is_unknown(module._buffers[name]):
                raise BadFile(
                    f"{path}.{name} is computed by {type(model).__name__} alone, which cannot be asked for it"
                )
            module._buffers[name] = module._buffers[name].to(made.devices[path].torch)
    for target in dict(getattr(model, "all_tied_weights_keys", None) or {}):
        module, _, name = target.rpartition(".")
        owner = model.get_submodule(module)
        if isinstance(owner, nn.Linear) and not isinstance(
            owner, Operator
        ):  # the rules leave it: tied as transformers does
            of = model.get_submodule(model.all_tied_weights_keys[target].rpartition(".")[0])
            source = of.rows().values(of.dtype) if isinstance(of, Embedding) else of.weight
            source = source.to(made.devices[module].torch)
            owner._parameters[name] = (
                source if isinstance(source, nn.Parameter) else nn.Parameter(source, requires_grad=False)
            )
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise BadFile(f"these parameters were not loaded: {', '.join(left[:5])}{' and more' if len(left) > 5 else ''}")


def _unknown(like: Any) -> torch.Tensor:
    """Room for a computed buffer, full of NaN where its type has them."""
    made = torch.empty_like(like, device="cpu")
    return made.fill_(torch.nan) if made.is_floating_point() else made


def _is_unknown(buffer: Any) -> bool:
    return bool(buffer.is_floating_point() and buffer.isnan().any())


class ProgressSink(Protocol):
    """Whoever else wants to know how many bytes have been read."""

    total: int

    def advance(self, nbytes: int) -> None:
        """More of them have."""


@contextmanager
def progress_bar(total: int, show: bool | ProgressSink, word: str = "loading") -> Iterator[Callable[[int], None]]:
    """One bar in bytes with GB/s and the time left on a terminal; nothing elsewhere. A Tally is told beside it."""
    if not isinstance(show, bool):
        show.total = total
        with progress_bar(total, True, word) as advance:

            def both(nbytes: int) -> None:
                show.advance(nbytes)
                advance(nbytes)

            yield both
        return
    if not show or not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(word), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(word, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
