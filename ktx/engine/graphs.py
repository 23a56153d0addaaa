"""Decode steps as CUDA graphs: replaying a graph replaces hundreds of kernel launches from Python by one.

A graph is captured for 1, 2, 4, 8, ... requests. All values that change from step to step are in buffers that are
filled before the replay: tokens, positions, slots, lengths and page tables, which are as wide as the longest possible
sequence. One graph serves every length, because the grids and scratch memory of attention depend only on the number of
requests, and the schedule that splits its work is computed on the device, as the graph's first part. So there are no
length buckets, each with memory of its own, and a short context does not pay for the longest one: a kernel reads only
as much of its page table as the length says. Rows without a request write to a page that belongs to no request and
attend to one token there; experts skip them (ktx.ops.gpu.padding).
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ktx.cache.batch import BatchMetadata, PageTables, SequenceSpan
from ktx.cache.forward_context import AdapterStep, Padding
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import PagedCache
from ktx.devices import CPU, Device
from ktx.hardware import format_bytes
from ktx.kernels.gpu.attention_backend import plans_on_host
from ktx.ops.device_hooks import ToDevice, is_rotary
from ktx.ops.gpu import offload, streams
from ktx.ops.guard import Guard
from ktx.ops.norm import RMSNorm
from ktx.ops.rope import RotaryEmbedding
from ktx.transformers_compat import cache_argument

if TYPE_CHECKING:
    from ktx.model.loaded import LoadedModel

log = logging.getLogger("ktx.engine")
# The values of a row (one request's token in a captured step), in the order of the rows of `Inputs.row_values`: token
# id, position, slot in the KV cache; first query row, number of query rows and number of keys, which are next to each
# other because they are `PageTables.sequences`; and 1 for a request, 0 for padding.
ROW_FIELDS = ("ids", "positions", "slots", "first", "count", "keys", "real")


class Graph(Protocol):
    """A function's device work, recorded for replay."""

    def capture(self, function: Callable[[], None]) -> None:
        """Runs the function and records its launches. The caller must keep the function and its buffers alive."""

    def replay(self) -> None:
        """Repeats the recorded work on the current content of the same buffers."""


class CudaGraph:
    """A CUDA graph. It holds no tensors; host functions that it calls are released with it."""

    def __init__(self, model: LoadedModel, device: torch.device, pool: Any):
        self.model, self.device, self.pool = model, device, pool
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], None]) -> None:
        """Records the function's launches. Runs it once before the recording, to compile kernels and to allocate memory
        that has to outlive the graph's.
        """
        with torch.cuda.device(self.device), streams.collect_graph_functions() as host_function_ids:
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                function()
            stream.synchronize()
            offload.raise_offload_errors(self.model)
            weakref.finalize(self, streams.unregister, host_function_ids)
            # Other threads may continue operations that a global capture forbids, such as allocating memory.
            with torch.cuda.graph(self.graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                function()

    def replay(self) -> None:
        """Launches the graph on the current stream."""
        with torch.cuda.device(self.device):
            self.graph.replay()


class EagerReplay:
    """On a fake GPU: replay calls the function again. It takes no arguments, so it reads the buffers' current
    content.
    """

    def capture(self, function: Callable[[], None]) -> None:
        """Runs the function, which `replay` calls from then on."""
        function()
        self.replay = function  # type: ignore[method-assign]

    def replay(self) -> None:
        """Raises RuntimeError: `capture` replaces this method."""
        raise RuntimeError("nothing was captured")


@dataclass(frozen=True)
class DecodeToken:
    """A request's input to a decode step: a token id, its position, and the pages of the sequence's keys and values."""

    id: int
    position: int
    pages: Sequence[int]

    @property
    def slot(self) -> int:
        """The token's slot in the KV cache."""
        return self.pages[self.position // PAGE_TOKENS] * PAGE_TOKENS + self.position % PAGE_TOKENS


class Inputs:
    """Input buffers of captured steps, for up to `max_requests` requests with `width` pages each.

    Rows without a request use the page `padding_page`, which belongs to no request, so that the kernels can write and
    read there. The buffers are filled in CPU memory and transferred to the device in two copies.

    `row_values` is int64 [fields, max_requests], one row for each of ROW_FIELDS; `pages` is int32 [max_requests,
    width].
    """

    def __init__(self, device: Device, max_requests: int, width: int, padding_page: int):
        pinned = device.gpu and not device.fake
        self.padding_page, self.count = padding_page, torch.zeros(1, dtype=torch.int64)
        self.host_row_values = torch.zeros(len(ROW_FIELDS), max_requests, dtype=torch.int64, pin_memory=pinned)
        self.host_pages = torch.full((max_requests, width), padding_page, dtype=torch.int32, pin_memory=pinned)
        self.row_values = self.host_row_values.to(device.torch, copy=True)
        self.pages = self.host_pages.to(device.torch, copy=True)

    def fill(self, tokens: Sequence[DecodeToken], size: int) -> None:
        """Fills the first `size` rows: one for each token, padding for the rest.

        They are filled in host memory, then copied to the device's buffers, whose addresses the graphs hold.
        """
        # the columns are ROW_FIELDS: ids, positions, slots, first, count, keys, real
        rows = [(token.id, token.position, token.slot, i, 1, token.position + 1, 1) for i, token in enumerate(tokens)]
        rows += [(0, 0, self.padding_page * PAGE_TOKENS, i, 1, 1, 0) for i in range(len(tokens), size)]
        self.host_row_values[:, :size] = torch.tensor(rows).T
        for row, token in zip(self.host_pages, tokens, strict=False):
            row[: len(token.pages)] = torch.tensor(token.pages, dtype=torch.int32)
        # padding attends to one key, so only the first entry of its page table is read
        self.host_pages[len(tokens) : size, :1] = self.padding_page
        self.count[0] = len(tokens)
        self.row_values.copy_(self.host_row_values, non_blocking=True)
        self.pages[:size].copy_(self.host_pages[:size], non_blocking=True)

    def field(self, name: str, size: int) -> torch.Tensor:
        """Returns one field of the first `size` rows: int64 [size]."""
        return self.row_values[ROW_FIELDS.index(name), :size]

    def tables(self, size: int, scratch: dict[Any, torch.Tensor]) -> PageTables:
        """Returns the page tables of the first `size` rows; they view the buffers, so a replay sees new contents."""
        first = ROW_FIELDS.index("first")
        sequences = self.row_values[first : first + 3, :size].T
        return PageTables(sequences, self.pages[:size], self.field("slots", size), scratch=scratch)


class DecodeStep:
    """A forward of one token for each of `size` requests, from input buffers to the output buffer `logits` [size,
    vocabulary].
    """

    def __init__(self, graphs: Graphs, size: int):
        """Takes the views of the first `size` rows of the buffers, whose addresses the step's graph will hold."""
        inputs, self.size, self.model, self.cache = graphs.inputs, size, graphs.model, graphs.cache
        self.tables = inputs.tables(size, graphs.scratch)
        # Placeholders: a replay reads the real sequences from the page tables, which view the input buffers.
        spans = [SequenceSpan(-1, 0, 1, [inputs.padding_page])] * size
        self.batch = BatchMetadata(spans, tables={graphs.device.torch: self.tables})
        self.no_adapters = graphs.no_adapters
        self.padding = Padding(inputs.count, inputs.field("real", size))
        self.logits = graphs.logits[:size]
        # The model passes a prepared mask on unchanged; the page tables define what tokens attend to.
        self.model_inputs = {
            "position_ids": inputs.field("positions", size)[None],
            "attention_mask": torch.zeros(1, 1, size, 2, dtype=torch.int32),
        }
        if graphs.hidden is None:  # the graph contains the embedding, see `Graphs`
            self.model_inputs["input_ids"] = inputs.field("ids", size)[None]
        else:
            self.model_inputs["inputs_embeds"] = graphs.hidden[:, :size]

    def __call__(self) -> None:
        """Computes the step from the input buffers and writes its logits to the output buffer."""
        self.tables.plans.clear()  # a schedule is valid for the lengths of one step
        try:
            with self.cache.forward(self.batch, adapters=self.no_adapters, padding=self.padding):
                out = self.model(
                    **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=0, **self.model_inputs
                )
        finally:
            self.tables.plans.clear()
        self.logits.copy_(out.logits[0])


class Graphs:
    """Captured decode steps of up to `max_requests` requests with up to `context` tokens each. `unsupported_reason`
    must be empty for the model.

    The cache has one page behind those of requests, `padding_page`. `no_adapters` is the context of a step without LoRA
    adapters.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: PagedCache,
        max_requests: int,
        context: int,
        padding_page: int,
        no_adapters: AdapterStep | None,
    ):
        """Allocates the buffers that all graphs share; `capture` records the graphs."""
        device = first_gpu(model)
        assert device is not None  # the runner captures only models with a GPU
        self.model, self.cache, self.device, self.max_requests = model, cache, device, max_requests
        self.no_adapters = no_adapters
        # pages of the longest sequence; all pages before the padding page are those of sequences
        self.width = min(-(-context // PAGE_TOKENS), padding_page)
        self.inputs = Inputs(device, max_requests, self.width, padding_page)
        self.scratch: dict[Any, torch.Tensor] = {}
        lm_head: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        self.logits = torch.empty(max_requests, lm_head.out_features, dtype=model.dtype, device=device.torch)
        # output of an embedding on the CPU, which a graph cannot contain; None: the embedding is on the GPU
        self.hidden: torch.Tensor | None = None
        if not module_devices(model)[embedding].gpu:
            shape = 1, max_requests, embedding.embedding_dim
            self.hidden = torch.empty(shape, dtype=model.dtype, device=device.torch)
        self.graphs: dict[int, Graph] = {}
        # Graphs hold addresses, so the steps' tensors must live as long as the graphs.
        self.steps: dict[int, DecodeStep] = {}
        self.guard = replay_guard(model)
        self.replays = 0

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures all sizes, the largest first, because the smaller ones reuse its memory pool."""
        if not self.guard.holds():
            log.info("no CUDA graphs: a module has hooks or was replaced, which a replay would not call")
            return
        started, pool = time.perf_counter(), None if self.device.fake else torch.cuda.graph_pool_handle()
        bytes_before = self._reserved_bytes()
        for size in _with_progress(capture_sizes(self.max_requests)):
            self._fill([], size)
            self.steps[size] = DecodeStep(self, size)
            graph: Graph = EagerReplay() if self.device.fake else CudaGraph(self.model, self.device.torch, pool)
            graph.capture(self.steps[size])
            self.graphs[size] = graph
        sizes = ", ".join(map(str, sorted(self.graphs)))
        seconds, nbytes = time.perf_counter() - started, self._reserved_bytes() - bytes_before
        log.info(
            "CUDA graphs of steps with %s requests: %.1f s, %s on %s", sizes, seconds, format_bytes(nbytes), self.device
        )

    def _reserved_bytes(self) -> int:
        """Returns the bytes that torch has reserved on the device."""
        return 0 if self.device.fake else torch.cuda.memory_reserved(self.device.torch)

    def step(self, tokens: Sequence[DecodeToken]) -> torch.Tensor | None:
        """Replays the smallest graph that holds the tokens. Returns logits [tokens, vocabulary] on the device, valid
        until the next step; None when no graph fits this step.
        """
        size = min((size for size in self.graphs if size >= len(tokens)), default=0)
        if not size or any(len(token.pages) > self.width for token in tokens) or not self.guard.holds():
            return None
        self._fill(tokens, size)
        self.graphs[size].replay()
        self.replays += 1
        return self.logits[: len(tokens)]

    def _fill(self, tokens: Sequence[DecodeToken], size: int) -> None:
        """Fills the input buffers before a replay. An embedding on the CPU runs here, because a graph cannot
        contain it.
        """
        self.inputs.fill(tokens, size)
        if self.hidden is not None:
            ids = self.inputs.host_row_values[ROW_FIELDS.index("ids"), :size]
            self.hidden[:, :size].copy_(self.model.get_input_embeddings()(ids[None]))


def capture_sizes(max_requests: int) -> list[int]:
    """Returns the numbers of requests that steps are captured for, largest first: the maximum and the powers of two
    below it.
    """
    return [max_requests, *(1 << exponent for exponent in reversed(range((max_requests - 1).bit_length())))]


def _with_progress(sizes: Sequence[int]) -> Iterator[int]:
    """Yields the sizes, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        yield from sizes
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(sizes, "capturing CUDA graphs", console=Console(stderr=True), transient=True)


def module_devices(model: LoadedModel) -> dict[torch.nn.Module, Device]:
    """Returns the devices of modules, without those that a forward does not call."""
    modules, devices = dict(model.named_modules()), model.ktx.plan.devices
    return {modules[path]: device for path, device in devices.items() if path in modules}


def first_gpu(model: LoadedModel) -> Device | None:
    """Returns the first GPU that modules are on; None for a model on the CPU."""
    return next((device for device in model.ktx.plan.devices.values() if device.gpu), None)


def offloaded_experts(model: LoadedModel) -> dict[torch.nn.Module, Any]:
    """Returns experts in CPU memory -> their offload, whose calls a graph can contain."""
    blocks: list[Any] = [module for module in model.modules() if getattr(module, "offload", None) is not None]
    return {block.experts: block.offload for block in blocks}


def unsupported_reason(model: LoadedModel) -> str:
    """Returns why decode steps of a model on a GPU cannot be captured; empty if they can.

    A graph replays work on one GPU with fixed addresses, so nothing in it may be elsewhere, depend on a sequence's
    length, or be planned on the CPU. Offloaded experts are called through host functions.
    """
    gpu, devices, names = (
        first_gpu(model),
        module_devices(model),
        {module: path for path, module in model.named_modules()},
    )
    modules, offloads, embedding = dict(model.named_modules()), offloaded_experts(model), model.get_input_embeddings()
    rotary = [module for module in names if is_rotary(module)]
    for module in [*(modules[step.path] for step in model.ktx.plan if step.path in modules), *rotary]:
        allowed = (gpu, CPU) if module is embedding else (gpu,)
        if module not in offloads and devices.get(module, CPU) not in allowed:
            return f"{names[module]} is on {devices.get(module, CPU)}, other modules are on {gpu}"
    for module in rotary:
        if not (isinstance(module, RotaryEmbedding) and module.fixed):
            return f"the tables of {names[module]} depend on a sequence's length"
    if any(plans_on_host(getattr(module, "backend", "triton")) for module in names):
        return "FlashInfer, which a rule selects as backend, plans on the CPU"
    fake = gpu is None or gpu.fake
    if not fake and any(
        isinstance(expert_offload.stream, streams.ThreadStream) for expert_offload in offloads.values()
    ):
        return "this CUDA has no host functions, which a graph needs to call experts in CPU memory"
    return ""


def replay_guard(model: LoadedModel) -> Guard:
    """Returns a guard of the modules that a replay does not call: it holds as long as they are the same and have no
    hooks, which a replay would skip.
    """
    called_modules = {*offloaded_experts(model), model.get_input_embeddings(), getattr(model, "mtp", None), model}
    replayed_modules = [module for module in model.modules() if module not in called_modules]
    guard = Guard(
        (), replayed_modules, (module.copied_weight() for module in replayed_modules if isinstance(module, RMSNorm))
    )
    # `model` itself is called, but its children must stay the same
    guard.children.append((model._modules, tuple(model._modules.values())))
    # the graph contains the transfers of ktx's own hooks
    guard.hooks = [
        hooks for hooks in guard.hooks if not hooks or not all(isinstance(hook, ToDevice) for hook in hooks.values())
    ]
    return guard
