"""Steps in which each request computes one token, as CUDA graphs: hundreds of launches that Python would make one by one become one.

A graph is captured for 1, 2, 4, 8, ... requests. All that changes from step to step lies in buffers that are filled before it is replayed: tokens, positions, slots, lengths and page
tables, which are as wide as the longest sequence that can be. One graph serves every length: attention's grids and scratch depend on the number of requests alone, and the plan that shares
its work out is computed on the device, as the graph's first part. So there are no buckets of lengths, each with memory of its own, and a short context does not pay for the longest
one: of its table a kernel reads what the length says. Rows without a request write to a page that belongs to no one and see one token there; experts skip them (ktx.ops.gpu.padding).
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import BatchMetadata, PagedCache, PageTables, SequenceSpan
from ktx.devices import CPU, Device
from ktx.hardware import format_bytes
from ktx.kernels import cpu
from ktx.kernels.gpu.attention_backend import plans_on_host
from ktx.ops.device_hooks import ToDevice, is_rotary
from ktx.ops.gpu import offload, streams
from ktx.ops.gpu.padding import Padding, padded
from ktx.ops.guard import Guard
from ktx.ops.norm import RMSNorm
from ktx.ops.rope import RotaryEmbedding
from ktx.transformers_compat import cache_argument

log = logging.getLogger("ktx.engine")
ROW_FIELDS = ("ids", "positions", "slots", "first", "count", "keys", "real")  # numbers of a row


class Graph(Protocol):
    """What a function gives a device to do, to be done again."""

    def capture(self, function: Callable[[], None]) -> None:
        """Runs the function and keeps what it launched; whoever calls keeps the function and the buffers that it works on."""

    def replay(self) -> None:
        """Does it all again, on what the same buffers hold now."""


class CudaGraph:
    """CUDA's. It holds no tensor; functions that it calls on the CPU are forgotten with it."""

    def __init__(self, model: Any, device: torch.device, pool: Any):
        self.model, self.device, self.pool = model, device, pool
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], None]) -> None:
        """Runs it twice: the first time kernels are compiled, and memory is taken that has to outlive the graph's."""
        with torch.cuda.device(self.device), streams.captured() as numbers:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                function()
            side.synchronize()
            offload.check(self.model)
            weakref.finalize(self, streams.forget, numbers)
            # Other threads may go on with what CUDA forbids while everything is captured, such as taking memory.
            with torch.cuda.graph(self.graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                function()

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()


class EagerReplay:
    """On a pretended GPU: calls the function again. It takes no arguments, so what it computes with is what the buffers hold."""

    def capture(self, function: Callable[[], None]) -> None:
        function()
        self.replay = function  # type: ignore[method-assign]

    def replay(self) -> None:
        raise RuntimeError("nothing was captured")


@dataclass(frozen=True)
class Token:
    """What a request computes in a step: a token, its position, and the pages that keys and values of the sequence are on."""

    id: int
    position: int
    pages: Sequence[int]

    @property
    def slot(self) -> int:
        return self.pages[self.position // PAGE_TOKENS] * PAGE_TOKENS + self.position % PAGE_TOKENS


class Inputs:
    """What captured steps read, for up to `most` requests with `width` pages each; rows without a request are on the page `spare`.

    They are written in the CPU's memory and go to the device in two copies.
    """

    def __init__(self, device: Device, most: int, width: int, spare: int):
        pinned = device.gpu and not device.pretended
        self.spare, self.count = spare, torch.zeros(1, dtype=torch.int64)
        self.own = torch.zeros(len(ROW_FIELDS), most, dtype=torch.int64, pin_memory=pinned)
        self.own_pages = torch.full((most, width), spare, dtype=torch.int32, pin_memory=pinned)
        self.numbers = self.own.to(device.torch, copy=True)
        self.pages = self.own_pages.to(device.torch, copy=True)

    def fill(self, tokens: Sequence[Token], size: int) -> None:
        """For `size` requests, of which there are as many as tokens."""
        rows = [(t.id, t.position, t.slot, i, 1, t.position + 1, 1) for i, t in enumerate(tokens)]
        rows += [(0, 0, self.spare * PAGE_TOKENS, i, 1, 1, 0) for i in range(len(tokens), size)]
        self.own[:, :size] = torch.tensor(rows).T
        for row, token in zip(self.own_pages, tokens, strict=False):
            row[: len(token.pages)] = torch.tensor(token.pages, dtype=torch.int32)
        self.own_pages[len(tokens) : size, :1] = self.spare
        self.count[0] = len(tokens)
        self.numbers.copy_(self.own, non_blocking=True)
        self.pages[:size].copy_(self.own_pages[:size], non_blocking=True)

    def lane(self, name: str, size: int) -> torch.Tensor:
        """int64 [size]"""
        return self.numbers[ROW_FIELDS.index(name), :size]

    def tables(self, size: int, scratch: dict[Any, torch.Tensor]) -> PageTables:
        first = ROW_FIELDS.index("first")
        sequences = self.numbers[first : first + 3, :size].T
        return PageTables(sequences, self.pages[:size], self.lane("slots", size), scratch=scratch)


class DecodeStep:
    """A forward of one token for each of `size` requests, from buffers to a buffer: `logits` [size, vocabulary]."""

    def __init__(self, graphs: Graphs, size: int):
        inputs, self.size, self.model, self.cache = graphs.inputs, size, graphs.model, graphs.cache
        self.tables = inputs.tables(size, graphs.scratch)
        spans = [SequenceSpan(-1, 0, 1, [inputs.spare])] * size
        self.batch = BatchMetadata(spans, tables={graphs.device.torch: self.tables})
        self.padding = Padding(inputs.count, inputs.lane("real", size))
        self.logits = graphs.logits[:size]
        # A mask that is prepared is passed on as it is; what tokens see is in the tables.
        self.given = {
            "position_ids": inputs.lane("positions", size)[None],
            "attention_mask": torch.zeros(1, 1, size, 2, dtype=torch.int32),
        }
        if graphs.hidden is None:
            self.given["input_ids"] = inputs.lane("ids", size)[None]
        else:
            self.given["inputs_embeds"] = graphs.hidden[:, :size]

    def __call__(self) -> None:
        self.tables.plans.clear()  # a plan is for the lengths of one step
        self.cache.batch = self.batch
        try:
            with cpu.bf16_rows(self.size), padded(self.padding):
                out = self.model(
                    **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=0, **self.given
                )
        finally:
            self.cache.batch = None
            self.tables.plans.clear()
        self.logits.copy_(out.logits[0])


class Graphs:
    """Captured steps of up to `most` requests with up to `context` tokens each, of a model that `obstacle` has nothing against.

    The cache has a page behind its own ones, `spare`.
    """

    def __init__(self, model: Any, cache: PagedCache, most: int, context: int, spare: int):
        device = gpu_of(model)
        assert device is not None  # asked before
        self.model, self.cache, self.device, self.most = model, cache, device, most
        self.width = min(-(-context // PAGE_TOKENS), spare)
        self.inputs = Inputs(device, most, self.width, spare)
        self.scratch: dict[Any, torch.Tensor] = {}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.logits = torch.empty(most, head.out_features, dtype=model.dtype, device=device.torch)
        self.hidden: torch.Tensor | None = None
        if not placed(model)[embedding].gpu:
            shape = 1, most, embedding.embedding_dim
            self.hidden = torch.empty(shape, dtype=model.dtype, device=device.torch)
        self.graphs: dict[int, Graph] = {}
        self.steps: dict[int, DecodeStep] = {}  # a graph knows addresses: what lies there must live as long as it
        self.guard = guard(model)
        self.replays = 0

    @torch.inference_mode()
    def capture(self) -> None:
        """The largest first: the memory that it takes serves the others too."""
        if not self.guard.holds():
            log.info("no CUDA graphs: somebody listens to a module, whom a replay would not call")
            return
        start, pool = time.perf_counter(), None if self.device.pretended else torch.cuda.graph_pool_handle()
        before = self._taken()
        for size in shown(sizes_up_to(self.most)):
            self._fill([], size)
            self.steps[size] = DecodeStep(self, size)
            graph: Graph = EagerReplay() if self.device.pretended else CudaGraph(self.model, self.device.torch, pool)
            graph.capture(self.steps[size])
            self.graphs[size] = graph
        named = ", ".join(map(str, sorted(self.graphs)))
        seconds, nbytes = time.perf_counter() - start, self._taken() - before
        log.info(
            "CUDA graphs of steps with %s requests: %.1f s, %s on %s", named, seconds, format_bytes(nbytes), self.device
        )

    def _taken(self) -> int:
        return 0 if self.device.pretended else torch.cuda.memory_reserved(self.device.torch)

    def step(self, tokens: Sequence[Token]) -> torch.Tensor | None:
        """Logits [tokens, vocabulary] on the device, until the next step; None when this one has to be computed without a graph."""
        size = min((size for size in self.graphs if size >= len(tokens)), default=0)
        if not size or any(len(token.pages) > self.width for token in tokens) or not self.guard.holds():
            return None
        self._fill(tokens, size)
        self.graphs[size].replay()
        self.replays += 1
        return self.logits[: len(tokens)]

    def _fill(self, tokens: Sequence[Token], size: int) -> None:
        self.inputs.fill(tokens, size)
        if self.hidden is not None:
            ids = self.inputs.own[ROW_FIELDS.index("ids"), :size]
            self.hidden[:, :size].copy_(self.model.get_input_embeddings()(ids[None]))


def sizes_up_to(most: int) -> list[int]:
    """Numbers of requests that steps are captured for, largest first: powers of two, and the most."""
    return [most, *(1 << power for power in reversed(range((most - 1).bit_length())))]


def shown(sizes: Sequence[int]) -> Iterator[int]:
    """They one after another, with a bar on a terminal."""
    if not sys.stderr.isatty():
        yield from sizes
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(sizes, "capturing CUDA graphs", console=Console(stderr=True), transient=True)


def placed(model: Any) -> dict[torch.nn.Module, Device]:
    """Where modules are, but for those that a forward does not meet."""
    modules, devices = dict(model.named_modules()), model.ktx.plan.devices
    return {modules[path]: device for path, device in devices.items() if path in modules}


def gpu_of(model: Any) -> Device | None:
    """The GPU that modules are on, the first of several; None for a model on the CPU."""
    return next((device for device in model.ktx.plan.devices.values() if device.gpu), None)


def handed_over(model: Any) -> dict[torch.nn.Module, Any]:
    """Experts in the CPU's memory that are called by way of a hand-over, which a graph can hold."""
    blocks = [module for module in model.modules() if getattr(module, "handover", None) is not None]
    return {block.experts: block.handover for block in blocks}


def unsupported_reason(model: Any) -> str:
    """Why steps of a model with modules on a GPU cannot be captured; empty if they can."""
    gpu, devices, names = gpu_of(model), placed(model), {module: path for path, module in model.named_modules()}
    modules, ways, embedding = dict(model.named_modules()), handed_over(model), model.get_input_embeddings()
    tables = [module for module in names if is_rotary(module)]
    for module in [*(modules[step.path] for step in model.ktx.plan if step.path in modules), *tables]:
        allowed = (gpu, CPU) if module is embedding else (gpu,)
        if module not in ways and devices.get(module, CPU) not in allowed:
            return f"{names[module]} is on {devices.get(module, CPU)}, other modules are on {gpu}"
    for module in tables:
        if not (isinstance(module, RotaryEmbedding) and module.fixed):
            return f"the tables of {names[module]} depend on a sequence's length"
    if any(plans_on_host(getattr(module, "backend", "triton")) for module in names):
        return "FlashInfer, which a rule's backend asks for, plans on the CPU"
    pretended = gpu is None or gpu.pretended
    if not pretended and any(isinstance(way.stream, streams.ThreadStream) for way in ways.values()):
        return "this CUDA has no host functions, by which a graph reaches experts in the CPU's memory"
    return ""


def guard(model: Any) -> Guard:
    """Of the modules that a replay does not call: it stands for them as long as they are the same and nobody listens to one."""
    called = {*handed_over(model), model.get_input_embeddings(), getattr(model, "mtp", None), model}
    inside = [module for module in model.modules() if module not in called]
    made = Guard((), inside, (module.copied() for module in inside if isinstance(module, RMSNorm)))
    made.children.append((model._modules, tuple(model._modules.values())))
    made.hooks = [
        hooks for hooks in made.hooks if not hooks or not all(isinstance(h, ToDevice) for h in hooks.values())
    ]
    return made
