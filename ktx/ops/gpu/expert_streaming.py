"""Experts in the CPU's memory for many tokens on a GPU: brought there as the CPU has packed them, a piece at a time, instead of being computed by it.

Two buffers on the device are all that it takes: one that the next piece is copied into, and the planes of the piece that is computed with. A stream
beside the model's copies; what it waits for is that the last piece was taken to planes, so the way to the device is in use while the device computes.
Which piece follows is known before, the next layer's first behind a layer's last.
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ktx.devices import Device
from ktx.errors import DoesNotFit
from ktx.hardware import format_bytes
from ktx.injection.device_map import streaming
from ktx.kernels import cpu, microbench
from ktx.kernels.gpu import soa_layout
from ktx.kernels.gpu.repack_from_cpu import STREAMED, unpack
from ktx.ops.experts import PROJECTIONS, Experts
from ktx.ops.gpu.experts import computed
from ktx.ops.gpu.moe import MoE
from ktx.ops.gpu.offload import Stream
from ktx.ops.gpu.streams import CudaStream, ThreadStream, host_functions, pin


@dataclass(eq=False)
class ExpertChunk:
    """Some of the experts that a layer has in the CPU's memory; `first` counts from the first of these."""

    experts: Experts
    first: int
    count: int
    following: ExpertChunk | None = None

    def stretches(self, name: str) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Of a projection, on each memory node: the bytes, the first group of rows, and how many groups."""
        held = self.experts.weights[name]
        groups = -(-held.n // cpu.GROUP_ROWS)
        size = held.nbytes // held.matrices // groups
        ends = [cpu.ops.share_of(groups, node + 1) for node in range(cpu.ops.nodes())] if held.ends else [groups]
        for begin, end in zip([0, *ends], ends, strict=False):
            each = (end - begin) * size
            at = begin * size * held.matrices + self.first * each
            if each:
                yield held.data[at : at + self.count * each], begin, end - begin

    def nbytes(self, name: str) -> int:
        return sum(data.numel() for data, _, _ in self.stretches(name))

    def file_bytes(self, name: str) -> int:
        held = self.experts.weights[name]
        return self.count * held.n * held.qtype.row_bytes(held.k)


class Streamer:
    """What brings the experts of several layers to a device, in the order in which they are called."""

    def __init__(self, device: torch.device, layers: Sequence[Experts], stream: Stream, limit: int = STREAMED):
        self.device, self.stream = device, stream
        self.pieces = {experts: list(_pieces(experts, limit)) for experts in layers}
        line = [piece for pieces in self.pieces.values() for piece in pieces]
        for piece, following in zip(line, line[1:], strict=False):
            piece.following = following
        self.prefetching: ExpertChunk | None = None  # what is, or will be, in `raw`
        self.resident: ExpertChunk | None = None  # what `matrices` are
        self.matrices: list[soa_layout.SoAWeight] = []
        self.raw = {name: self._buffer(piece.nbytes(name) for piece in line) for name in PROJECTIONS}
        self.planes = {name: self._buffer(piece.file_bytes(name) for piece in line) for name in PROJECTIONS}
        self.biases = {experts: self._biases(experts) for experts in layers}

    def _buffer(self, sizes: Iterable[int]) -> torch.Tensor:
        return torch.empty(max(sizes), dtype=torch.uint8, device=self.device)

    def _biases(self, experts: Experts) -> list[torch.Tensor | None]:
        given = [experts.biases[name] for name in PROJECTIONS]
        return [None if bias is None else bias.to(self.device) for bias in given]

    def __call__(
        self, experts: Experts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [tokens, D], ids and weights [tokens, K] on the device -> [tokens, D]; pieces are added up in f32."""
        given = hidden, ids.to(torch.int64), weights.to(torch.float32)
        chosen = experts.chosen if experts.on_gpu is None else experts.on_gpu.chosen
        pieces, total = self.pieces[experts], None
        for piece in pieces:
            matrices = self._fetch(piece)
            some = slice(piece.first, piece.first + piece.count)
            biases = [None if bias is None else bias[some] for bias in self.biases[experts]]
            made = computed(experts.gate, given, matrices, biases, experts.first + piece.first, chosen)
            total = made if len(pieces) == 1 else made.float() if total is None else total + made
        assert total is not None
        return total.to(hidden.dtype)

    def _fetch(self, piece: ExpertChunk) -> list[soa_layout.SoAWeight]:
        """The planes of a piece; the copy of the next one is begun."""
        if piece is self.resident:
            return self.matrices
        if piece is not self.prefetching:
            for name in PROJECTIONS:
                self._copy(piece, name)
        self.stream.join()
        self.resident, self.matrices, self.prefetching = piece, [], piece.following
        for name in PROJECTIONS:
            self.matrices.append(self._taken(piece, name))
            if self.prefetching is not None:
                self._copy(self.prefetching, name)
        return self.matrices

    def _copy(self, piece: ExpertChunk, name: str) -> None:
        """Behind what the caller's stream has been given: the buffer may just be read."""
        self.stream.fork()
        at = 0
        for data, _, _ in piece.stretches(name):
            self.stream.copy(self.raw[name][at : at + data.numel()], data)
            at += data.numel()

    def _taken(self, piece: ExpertChunk, name: str) -> soa_layout.SoAWeight:
        held, at = piece.experts.weights[name], 0
        into = soa_layout.empty(held.qtype, held.n, held.k, piece.count, self.planes[name])
        for data, begin, groups in piece.stretches(name):
            unpack(self.raw[name][at : at + data.numel()].view(piece.count, groups, -1), into, begin)
            at += data.numel()
        return into


def _pieces(experts: Experts, limit: int) -> Iterator[ExpertChunk]:
    count = experts.num_experts
    most = max(1, limit * count // max(1, experts.weight_bytes()[0]))
    for first in range(0, count, most):
        yield ExpertChunk(experts, first, min(most, count - first))


def install(model: Any, wish: object = "auto") -> None:
    """Lets blocks on GPUs bring their experts from so many tokens on (`auto`: from where that is faster), or never. After everything is ready.

    `auto` on a pretended GPU is never: nothing is faster there. UsageError for another word, DoesNotFit where the buffers do not.
    """
    least = streaming(wish)
    blocks: dict[Device, list[MoE]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, MoE) and module.handover is not None and type(module.experts) is Experts:
            blocks[module.placement].extend([module] if module.experts.num_experts else [])
    if least == 0:
        return
    if least is not None and not any(blocks.values()):
        why = "no layer has its experts on the CPU and its MoE block on a GPU"
        warnings.warn(f"stream_experts={wish}: {why}; nothing is streamed", stacklevel=3)
    for device, of in blocks.items():
        if of and (least is not None or not device.pretended):
            _install_on(device, of, least)


def _install_on(device: Device, blocks: Sequence[MoE], least: int | None) -> None:
    layers = [block.experts for block in blocks]
    try:
        streamer = Streamer(device.torch, layers, _stream(device, layers))
    except torch.OutOfMemoryError:
        need = 2 * max(
            sum(piece.nbytes(name) for name in PROJECTIONS) for e in layers for piece in _pieces(e, STREAMED)
        )
        what = f"{device}: bringing experts from memory needs {format_bytes(need)} that are not free"
        if least is not None:
            raise DoesNotFit(f"{what}; put less on it, or leave --stream-experts at off") from None
        warnings.warn(f"{what}; the CPU computes them for prompts too", stacklevel=4)
        return
    link = rate = 0.0
    if least is None:
        link, rate = (
            microbench.link_bandwidth(device.torch) or microbench.DEFAULT_PCIE_GB_S,
            microbench.prompt_rate(layers[0].weights["up_proj"].qtype),
        )
    for block in blocks:
        if block.experts.on_gpu is None:
            block.experts.chosen = torch.zeros(block.experts.total, dtype=torch.int64, device=device.torch)
        block.streamer, block.streamed_from = streamer, least or _pays_from(block.experts, link, rate)


def _pays_from(experts: Experts, link: float, rate: float) -> int:
    return microbench.min_tokens_to_stream(experts.weight_bytes()[0], experts.weights_per_token(), link, rate)


def _stream(device: Device, layers: Sequence[Experts]) -> Stream:
    """CUDA's, where the weights' memory can be pinned as it stands; else a thread copies what it can without."""
    launch = host_functions() if device.torch.type == "cuda" else None
    if launch is None or not all(_pinned(w) for experts in layers for w in experts.weights.values()):
        return ThreadStream(device.torch)
    return CudaStream(device.torch, launch)


def _pinned(held: cpu.Packed) -> bool:
    """Pins packed weights where they are. Not those of a mapped file: they move to memory of their own behind the model's back (kernels/kept.py)."""
    if held.data.untyped_storage().nbytes() != held.nbytes:
        return False
    end = pin(held.data)
    if end is None:
        return False
    weakref.finalize(held, end).atexit = False  # before its memory is given back
    return True
