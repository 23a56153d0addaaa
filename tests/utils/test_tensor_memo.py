"""A value for each tensor, freed with it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import torch

from ktx.ops.fusion.fused import rotary_tables
from ktx.ops.masks import ranges_of
from ktx.utils.tensor_memo import TensorMemo


class Value:
    pass


def test_a_value_is_computed_once_for_each_tensor():
    memo, calls = TensorMemo[int](), []
    one, equal = torch.ones(2), torch.ones(2)
    for tensor in (one, one, equal):
        memo.get_or_compute(tensor, lambda: calls.append(1) or len(calls))
    assert (memo.get(one), memo.get(equal)) == (1, 2), "by identity: equal tensors have values of their own"
    assert memo.get(one.clone()) is None and memo.get(one[:]) is None and memo.get(copy.deepcopy(one)) is None
    assert memo.pop(one) == 1 and memo.get(one) is None and memo.pop(one) is None
    memo.set(equal, 7)
    assert memo.get(equal) == 7


def test_none_is_a_value_too():
    memo, calls = TensorMemo[None](), []
    tensor = torch.ones(1)
    for _ in range(2):
        assert memo.get_or_compute(tensor, lambda: calls.append(1)) is None
    assert len(calls) == 1


def test_a_value_is_freed_with_its_tensor_without_a_collection():
    gc.disable()
    try:
        memo, tensor, value = TensorMemo[Value](), torch.ones(1), Value()
        memo.set(tensor, value)
        watched = weakref.ref(value)
        del value
        assert watched() is not None
        del tensor
        assert watched() is None
    finally:
        gc.enable()


def test_what_layers_share_of_masks_and_tables_does_not_outlive_them():
    gc.disable()
    try:
        mask = torch.zeros(1, 1, 3, 2, dtype=torch.int32)
        derived = weakref.ref(ranges_of(mask))
        assert ranges_of(mask) is derived(), "shared by the layers"
        del mask
        assert derived() is None
        for dtype in (torch.float32, torch.bfloat16):
            tables = torch.ones(1, 3, 8, dtype=dtype), torch.zeros(1, 3, 8, dtype=dtype)
            converted = rotary_tables(tables)
            assert all(one.dtype is torch.float32 for one in converted)
            assert rotary_tables(tables)[0] is converted[0], "converted once"
            watched = weakref.ref(tables[0]), weakref.ref(converted[0])
            del tables, converted
            assert [one() for one in watched] == [None, None]
        table = torch.polar(torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
        watched = weakref.ref(rotary_tables(table)[0])
        assert rotary_tables(table)[0] is watched()
        del table
        assert watched() is None
    finally:
        gc.enable()


def test_a_stored_tensor_has_no_value():
    memo, tensor = TensorMemo[Value](), torch.ones(2)
    memo.set(tensor, Value())
    assert memo.get(pickle.loads(pickle.dumps(tensor))) is None
