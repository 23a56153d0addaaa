"""What the CPU has packed, taken to a GPU's planes: the bytes that packing for the GPU makes."""

from __future__ import annotations

import pytest
import torch

from ktx.kernels import cpu
from ktx.kernels.blocks import unpack_rows
from ktx.kernels.check import random_matrix
from ktx.kernels.gpu import soa_layout
from ktx.kernels.gpu.repack_from_cpu import unpack
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor


def both(
    name: str, rows: int, k: int, count: int = 3
) -> tuple[torch.Tensor, soa_layout.SoAWeight, soa_layout.SoAWeight]:
    """Groups as the CPU has them, the planes that should come of them, and empty ones."""
    parts: list[QuantizedTensor] = [random_matrix(name, rows, k, seed) for seed in range(count)]
    held, wanted = cpu.pack(parts), soa_layout.pack(parts, device="cpu")
    scale = None if wanted.scale is None else torch.zeros_like(wanted.scale)
    empty = soa_layout.SoAWeight(torch.zeros_like(wanted.data), wanted.qtype, rows, k, count, scale)
    return held.data.view(count, -(-rows // cpu.GROUP_ROWS), -1), wanted, empty


@pytest.mark.parametrize("name", QTYPES)
@pytest.mark.parametrize("rows", [272, 50, 5])
def test_planes_are_those_of_the_file(name, rows):
    k = max(320, QTYPES[name].block * 3)
    data, wanted, found = both(name, rows, k // QTYPES[name].block * QTYPES[name].block)
    unpack(data, found)
    assert torch.equal(found.data, wanted.data)
    assert wanted.scale is None or torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("name", ["Q4_K", "F8_E4M3", "BF16", "MXFP4", "Q5_1", "IQ1_M", "IQ2_XS"])
def test_each_memory_nodes_rows_come_by_themselves(name):
    data, wanted, found = both(name, 296, 512)
    for begin, end in ((0, 5), (5, 11), (11, 19)):
        unpack(data[:, begin:end], found, begin)
    assert torch.equal(found.data, wanted.data)
    assert wanted.scale is None or torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ3_XXS"])
def test_bits_are_put_back_some_matrices_at_a_time(name, monkeypatch):
    data, wanted, found = both(name, 50, 512, 5)
    monkeypatch.setattr("ktx.kernels.gpu.repack_from_cpu.CHUNK_BYTES", 2 * data[0].numel())
    unpack(data, found)
    assert torch.equal(found.data, wanted.data)


@pytest.mark.parametrize("name", QTYPES)
@pytest.mark.parametrize("rows", [272, 50])
def test_rows_are_those_of_the_file(name, rows, monkeypatch):
    """Of one matrix, of experts, and of planes; in one piece or several."""
    k = max(320, QTYPES[name].block * 3) // QTYPES[name].block * QTYPES[name].block
    parts = [random_matrix(name, rows, k, seed) for seed in range(3)]
    for span in (1 << 26, 128 * k):
        monkeypatch.setattr("ktx.kernels.blocks.UNPACK_CHUNK_WEIGHTS", span)
        for found, wanted in (
            (cpu.pack(parts[0]), parts[:1]),
            (cpu.pack_experts(parts), parts),
            (soa_layout.pack(parts, device="cpu"), parts),
        ):
            taken = list(unpack_rows(found))
            assert torch.equal(torch.cat([some.data for some in taken]), torch.cat([part.data for part in wanted]))
            scales = [some.scale for some in taken if some.scale is not None]
            assert len(scales) == (len(taken) if name == "F8_E4M3" else 0)
            if scales:
                assert torch.equal(torch.cat(scales), torch.cat([part.scale for part in wanted]))
