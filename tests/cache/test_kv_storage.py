"""In which types, shapes and memory keys and values are stored."""

from __future__ import annotations

import pytest
import torch

from ktx.cache.kv import (
    allocate_buffer,
    clamp_to,
    kv_type,
    round_up_capacity,
    store_kv,
    stored_row_format,
    to_floats,
)
from ktx.errors import NoGradient, UsageError

CPU, GPU, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("requested", "stored"),
    [
        (None, None),
        ("auto", None),
        ("f16", torch.float16),
        ("bf16", torch.bfloat16),
        ("f32", torch.float32),
        ("q8_0", "q8_0"),
        ("fp8", "fp8"),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_a_requested_type_is_a_storage_type(requested, stored):
    assert kv_type(requested) == stored


@pytest.mark.parametrize("requested", ["f8", "", 16, torch.float64, torch.uint8])
def test_any_other_type_is_refused(requested):
    with pytest.raises(UsageError, match="is not a storage type of the KV cache.*give auto or one of f16 bf16"):
        kv_type(requested)


def test_memory_of_two_mebibytes_is_a_mapping_of_its_own():
    """A mapping begins with zeros; torch's own memory is NaN during tests."""
    rows = 2 * 1024 * 1024 // (2 * 64)  # of 64 columns in f16
    mapped, smaller = (allocate_buffer((1, 1, count, 64), torch.float16, CPU) for count in (rows, rows - 1))
    assert mapped.shape == (1, 1, rows, 64) and mapped.dtype == torch.float16
    assert smaller.shape == (1, 1, rows - 1, 64) and smaller.dtype == torch.float16
    assert not mapped.any() and smaller.isnan().all()


def test_memory_of_another_device_is_torch_s():
    for rows in (1, 1 << 20):
        buffer = allocate_buffer((1, 1, rows, 64), torch.float16, META)
        assert buffer.device == META and buffer.shape == (1, 1, rows, 64)


@pytest.mark.parametrize(
    ("positions", "capacity"),
    [(0, 256), (1, 256), (256, 256), (257, 512), (512, 512), (513, 1024), (100_000, 131_072)],
)
def test_capacities_are_powers_of_two_from_256_on(positions, capacity):
    assert round_up_capacity(positions) == capacity


@pytest.mark.parametrize(
    ("store", "columns", "device", "row"),
    [
        (None, 64, CPU, (64, torch.bfloat16)),
        (torch.float16, 64, CPU, (64, torch.float16)),
        (torch.float16, 64, GPU, (64, torch.float16)),
        ("q8_0", 64, CPU, (2 * 34, torch.uint8)),  # a block of 32 columns: two bytes of scale, 32 of values
        ("fp8", 64, CPU, (2 * 34, torch.uint8)),
        ("q8_0", 63, CPU, (63, torch.float16)),
        ("q8_0", 65, CPU, (65, torch.float16)),
        ("q8_0", 64, GPU, (64, torch.float16)),
        ("fp8", 64, GPU, (64, E4M3)),
        ("fp8", 65, GPU, (65, E4M3)),
    ],
)
def test_a_row_is_stored_in_its_type_for_the_device(store, columns, device, row):
    assert stored_row_format(store, columns, torch.bfloat16, device) == row


def test_floats_are_stored_in_the_buffer_s_type():
    stored = torch.zeros(1, 1, 2, 32, dtype=torch.float16)
    store_kv(torch.full((1, 1, 2, 32), 1 + 2**-20), stored)
    assert torch.equal(stored, torch.ones_like(stored))
    assert to_floats(stored) is stored


# of each block of 32 the largest is 127, so the scale is 1 and whole numbers are exact
WHOLE = torch.arange(96, 128).float().repeat(2, 2, 3, 2) * torch.tensor([1, -1]).repeat(32)


@pytest.mark.parametrize(
    "states",
    [
        WHOLE,
        WHOLE.transpose(2, 3).contiguous().transpose(2, 3),
        WHOLE.repeat_interleave(2, 3)[..., ::2],
        WHOLE.transpose(1, 2).contiguous().transpose(1, 2),
    ],
    ids=["dense", "transposed", "every other column", "heads inside"],
)
def test_blocks_of_eight_bits_hold_states_of_any_strides(states):
    stored = torch.full((2, 2, 3, 2 * 34), 255, dtype=torch.uint8)
    store_kv(states, stored)
    assert torch.equal(to_floats(stored).float(), WHOLE)


def test_a_gradient_would_be_lost():
    with pytest.raises(NoGradient, match="a cache that grows in place"):
        store_kv(torch.zeros(1, 1, 1, 32, requires_grad=True), torch.zeros(1, 1, 1, 32))


def test_only_eight_bit_floats_are_clamped():
    states = torch.tensor([-1000.0, -448.0, 3.0, 449.0])
    assert clamp_to(states, E4M3).tolist() == [-448, -448, 3, 448]
    assert clamp_to(states, torch.float16) is states
