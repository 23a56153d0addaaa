"""Streams experts from CPU memory to a GPU for large batches, instead of computing them on the CPU.

Experts are copied in the CPU's packed layout, one chunk at a time. There are two buffers on the device: the raw buffer
that the next chunk is copied into, and the SoA buffer of the chunk that the kernels compute with. The copies run on a
side stream; a copy waits only until the previous chunk has been repacked into the SoA buffer, so the PCIe link is in
use while the device computes. The order of chunks is fixed (a layer's last chunk is followed by the next layer's
first), so the next chunk is always prefetched.
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ktx.devices import Device
from ktx.errors import DoesNotFit
from ktx.hardware import format_bytes
from ktx.injection.device_map import parse_stream_experts
from ktx.kernels import cpu, microbench
from ktx.kernels.gpu import soa_layout
from ktx.kernels.gpu.repack_from_cpu import STREAM_CHUNK_BYTES, unpack
from ktx.ops.experts import PROJECTIONS, Experts
from ktx.ops.gpu.experts import run_experts
from ktx.ops.gpu.moe import MoE
from ktx.ops.gpu.offload import Stream
from ktx.ops.gpu.streams import CudaStream, ThreadStream, host_functions, pin


@dataclass(eq=False)
class ExpertChunk:
    """A range of the experts that a layer has in CPU memory.

    Attributes:
        experts: the layer's CPU operator.
        first: index of the first expert, relative to the first one in CPU memory.
        count: number of experts.
        next_chunk: the next chunk to prefetch; None for the last one.
    """

    experts: Experts
    first: int
    count: int
    next_chunk: ExpertChunk | None = None

    def node_ranges(self, name: str) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Yields a projection's packed bytes on each NUMA node, with the first row group there and the group count.

        Each node holds a range of the rows of all experts (cpu.Packed.numa_ends), so a chunk is one range per node.
        """
        packed = self.experts.weights[name]
        groups = -(-packed.n // cpu.GROUP_ROWS)
        group_bytes = packed.nbytes // packed.matrices // groups
        ends = (
            [cpu.ops.node_begin(groups, node + 1) for node in range(cpu.ops.nodes())] if packed.numa_ends else [groups]
        )
        for begin, end in zip([0, *ends], ends, strict=False):
            node_bytes = (end - begin) * group_bytes
            offset = begin * group_bytes * packed.matrices + self.first * node_bytes
            if node_bytes:
                yield packed.data[offset : offset + self.count * node_bytes], begin, end - begin

    def nbytes(self, name: str) -> int:
        """Bytes of a projection in the CPU's packed layout."""
        return sum(data.numel() for data, _, _ in self.node_ranges(name))

    def file_bytes(self, name: str) -> int:
        """Bytes of a projection as stored in the weight file, which is also its size in SoA layout."""
        packed = self.experts.weights[name]
        return self.count * packed.n * packed.qtype.row_bytes(packed.k)


class Streamer:
    """Copies the experts of several layers to a device, in the order of the layers, and computes with them there.

    Args:
        device: the GPU.
        layers: the CPU operators of the layers, in the order of their calls.
        stream: the side stream of the copies.
        limit: maximum packed bytes of a chunk; a chunk has at least one expert.
    """

    def __init__(
        self, device: torch.device, layers: Sequence[Experts], stream: Stream, limit: int = STREAM_CHUNK_BYTES
    ):
        """Allocates the raw and the SoA buffer for the largest chunk, and links each chunk to the next one."""
        self.device, self.stream = device, stream
        self.chunks = {experts: list(_split_into_chunks(experts, limit)) for experts in layers}
        chunks_in_order = [chunk for chunks in self.chunks.values() for chunk in chunks]
        for chunk, following in pairwise(chunks_in_order):
            chunk.next_chunk = following
        self.prefetching: ExpertChunk | None = None  # in `raw_buffers`, or being copied there
        self.resident: ExpertChunk | None = None  # the chunk of `matrices`
        self.matrices: list[soa_layout.SoAWeight] = []
        self.raw_buffers = {
            name: self._allocate(chunk.nbytes(name) for chunk in chunks_in_order) for name in PROJECTIONS
        }
        self.soa_buffers = {
            name: self._allocate(chunk.file_bytes(name) for chunk in chunks_in_order) for name in PROJECTIONS
        }
        self.biases = {experts: self._copy_biases(experts) for experts in layers}

    def _allocate(self, sizes: Iterable[int]) -> torch.Tensor:
        return torch.empty(max(sizes), dtype=torch.uint8, device=self.device)

    def _copy_biases(self, experts: Experts) -> list[torch.Tensor | None]:
        biases = [experts.biases[name] for name in PROJECTIONS]
        return [None if bias is None else bias.to(self.device) for bias in biases]

    def __call__(
        self, experts: Experts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Computes a layer's experts on the GPU, chunk by chunk; the outputs of several chunks are summed in f32.

        hidden [tokens, D], ids and weights [tokens, K], all on the device -> [tokens, D].
        """
        inputs = hidden, ids.to(torch.int64), weights.to(torch.float32)
        gpu_counts = experts.gpu_counts if experts.on_gpu is None else experts.on_gpu.gpu_counts
        chunks, total = self.chunks[experts], None
        for chunk in chunks:
            matrices = self._fetch(chunk)
            indices = slice(chunk.first, chunk.first + chunk.count)
            biases = [None if bias is None else bias[indices] for bias in self.biases[experts]]
            out = run_experts(experts.gate, inputs, matrices, biases, experts.first_expert + chunk.first, gpu_counts)
            total = out if len(chunks) == 1 else out.float() if total is None else total + out
        assert total is not None
        return total.to(hidden.dtype)

    def _fetch(self, chunk: ExpertChunk) -> list[soa_layout.SoAWeight]:
        """Returns a chunk's matrices in SoA layout and starts the copy of the next chunk.

        A projection of the next chunk is copied as soon as that of this chunk has left the raw buffer.
        """
        if chunk is self.resident:
            return self.matrices
        if chunk is not self.prefetching:
            for name in PROJECTIONS:
                self._copy(chunk, name)
        self.stream.join()
        self.resident, self.matrices, self.prefetching = chunk, [], chunk.next_chunk
        for name in PROJECTIONS:
            self.matrices.append(self._unpack(chunk, name))
            if self.prefetching is not None:
                self._copy(self.prefetching, name)
        return self.matrices

    def _copy(self, chunk: ExpertChunk, name: str) -> None:
        """Queues the copy of a projection behind the caller's stream, whose kernels may still read the buffer."""
        self.stream.fork()
        offset = 0
        for data, _, _ in chunk.node_ranges(name):
            self.stream.copy(self.raw_buffers[name][offset : offset + data.numel()], data)
            offset += data.numel()

    def _unpack(self, chunk: ExpertChunk, name: str) -> soa_layout.SoAWeight:
        """Repacks a projection from the raw buffer into the SoA buffer, whose layout the GPU kernels read."""
        packed, offset = chunk.experts.weights[name], 0
        target = soa_layout.empty(packed.qtype, packed.n, packed.k, chunk.count, self.soa_buffers[name])
        for data, begin, groups in chunk.node_ranges(name):
            unpack(self.raw_buffers[name][offset : offset + data.numel()].view(chunk.count, groups, -1), target, begin)
            offset += data.numel()
        return target


def _split_into_chunks(experts: Experts, limit: int) -> Iterator[ExpertChunk]:
    """Splits a layer's experts into chunks of at most `limit` packed bytes."""
    count = experts.num_experts
    max_experts = max(1, limit * count // max(1, experts.weight_bytes()[0]))
    for first in range(0, count, max_experts):
        yield ExpertChunk(experts, first, min(max_experts, count - first))


def install_streaming(model: Any, requested: object = "auto") -> None:
    """Enables expert streaming for the MoE blocks on GPUs whose experts are in CPU memory. Call it after `ready`.

    Args:
        model: the loaded model.
        requested: the minimum number of tokens to stream for; `auto` computes it per layer from the measured PCIe
            bandwidth and CPU speed (never on a fake GPU, where streaming cannot be faster); `off` disables streaming.

    Raises:
        UsageError: `requested` is none of these.
        DoesNotFit: the buffers do not fit on the device and a number of tokens was requested.
    """
    min_tokens = parse_stream_experts(requested)
    blocks: dict[Device, list[MoE]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, MoE) and module.offload is not None and type(module.experts) is Experts:
            blocks[module.placement].extend([module] if module.experts.num_experts else [])
    if min_tokens == 0:  # off
        return
    if min_tokens is not None and not any(blocks.values()):
        reason = "no layer has its experts on the CPU and its MoE block on a GPU"
        warnings.warn(f"stream_experts_min_tokens={requested}: {reason}; nothing is streamed", stacklevel=3)
    for device, device_blocks in blocks.items():
        if device_blocks and (min_tokens is not None or not device.fake):
            _install_on(device, device_blocks, min_tokens)


def _install_on(device: Device, blocks: Sequence[MoE], min_tokens: int | None) -> None:
    """Installs one streamer, which all blocks of a device share.

    Args:
        device: the GPU.
        blocks: its MoE blocks with experts in CPU memory, in the order of their calls.
        min_tokens: the requested number of tokens to stream from; None: computed for each layer.

    Raises:
        DoesNotFit: the buffers do not fit on the device, and `min_tokens` was requested; otherwise a warning.
    """
    layers = [block.experts for block in blocks]
    try:
        streamer = Streamer(device.torch, layers, _create_stream(device, layers))
    except torch.OutOfMemoryError:
        needed_bytes = 2 * max(  # a raw and an SoA buffer, for the largest chunk
            sum(chunk.nbytes(name) for name in PROJECTIONS)
            for e in layers
            for chunk in _split_into_chunks(e, STREAM_CHUNK_BYTES)
        )
        message = f"{device}: the buffers for streaming experts need {format_bytes(needed_bytes)} that are not free"
        if min_tokens is not None:
            raise DoesNotFit(f"{message}; place fewer modules on it, or set --stream-experts-min-tokens off") from None
        warnings.warn(f"{message}; the CPU computes the experts in prefill too", stacklevel=4)
        return
    link_gb_s = cpu_gops = 0.0
    if min_tokens is None:
        link_gb_s, cpu_gops = (
            microbench.link_bandwidth(device.torch) or microbench.DEFAULT_PCIE_GB_S,
            microbench.prompt_rate(layers[0].weights["up_proj"].qtype),
        )
    for block in blocks:
        if block.experts.on_gpu is None:
            block.experts.gpu_counts = torch.zeros(block.experts.total_experts, dtype=torch.int64, device=device.torch)
        block.streamer, block.stream_min_tokens = (
            streamer,
            min_tokens or _min_tokens(block.experts, link_gb_s, cpu_gops),
        )


def _min_tokens(experts: Experts, link_gb_s: float, cpu_gops: float) -> int:
    """Returns the number of tokens from which streaming a layer is faster than computing it on the CPU."""
    return microbench.min_tokens_to_stream(experts.weight_bytes()[0], experts.weights_per_token(), link_gb_s, cpu_gops)


def _create_stream(device: Device, layers: Sequence[Experts]) -> Stream:
    """Returns a CUDA stream where the weights' memory can be pinned in place, else a thread that copies unpinned."""
    launch = host_functions() if device.torch.type == "cuda" else None
    if launch is None or not all(_pin_in_place(w) for experts in layers for w in experts.weights.values()):
        return ThreadStream(device.torch)
    return CudaStream(device.torch, launch)


def _pin_in_place(packed: cpu.Packed) -> bool:
    """Pins packed weights in place and returns whether that succeeded.

    Weights in a mapped file are not pinned, because kernels/packed_cache.py moves them to anonymous memory in the
    background.
    """
    if packed.data.untyped_storage().nbytes() != packed.nbytes:  # part of a larger memory: a mapped file
        return False
    unpin = pin(packed.data)
    if unpin is None:
        return False
    weakref.finalize(packed, unpin).atexit = False  # unpins before the memory is freed
    return True
