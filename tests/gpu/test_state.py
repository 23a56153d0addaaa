"""The state of a model whose modules are on GPUs: its names and counts are whole, values that are out of reach are refused where they are read."""

from __future__ import annotations

import copy

import pytest
import torch

from ktx.errors import UsageError
from tests.gpu.placed import Twins


@pytest.mark.parametrize("family,others", [("deepseek_v3", {}), ("qwen3_moe", {}), ("qwen3_moe", {"Experts": "cpu"})])
def test_names_counts_and_values(tmp_path, family, others):
    twins = Twins(tmp_path, family)
    mine, right = twins.on(**others), twins.reference.state_dict()
    state = mine.state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in right.items()}
    assert mine.num_parameters() == twins.reference.num_parameters()
    away = ["kv_b_proj"] if family == "deepseek_v3" else []
    away += ["experts"] if not others else []
    for name, value in state.items():
        if any(f".{part}." in name for part in away) and "shared" not in name:
            with pytest.raises(UsageError, match="is on .*not read back.*load the model on the CPU"):
                value.sum()
        else:
            assert torch.allclose(value.float(), right[name].float(), atol=1e-5), name
    if away:
        with pytest.raises(UsageError, match="not read back"):
            mine.save_pretrained(tmp_path / "mine")
        assert not list((tmp_path / "mine").glob("*"))
    assert not mine.load_state_dict(state).missing_keys  # the same weights: nothing is read
    with pytest.raises(UsageError, match="is on cuda:0, where modules can neither be copied nor pickled"):
        copy.deepcopy(mine)
