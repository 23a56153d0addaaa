"""The state of a model whose modules are on GPUs: its names and counts are whole, values that are out of reach are
refused where they are read.
"""

from __future__ import annotations

import copy

import pytest
import torch

from ktx.errors import UsageError
from ktx.weights.open import open_weights
from tests.families.test_families import load
from tests.gpu.helpers import F32, Twins


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
            with pytest.raises(UsageError, match="is on .*cannot be read back.*load the model on the CPU"):
                value.sum()
        else:
            assert torch.allclose(value.float(), right[name].float(), atol=1e-5), name
    if away:
        with pytest.raises(UsageError, match="cannot be read back"):
            mine.save_pretrained(tmp_path / "mine")
        assert not list((tmp_path / "mine").glob("*"))
    assert not mine.load_state_dict(state).missing_keys  # the same weights: nothing is read
    with pytest.raises(UsageError, match="is on cuda:0, where modules cannot be copied or pickled"):
        copy.deepcopy(mine)


@pytest.mark.parametrize("quant", ["Q8_0", "F16"])
@pytest.mark.parametrize(
    ("family", "others"), [("deepseek_v3", {}), ("deepseek_v3", {"Experts": "cpu"}), ("qwen3_moe", {}), ("gpt_oss", {})]
)
def test_packed_weights_are_written_from_where_they_are(tmp_path, family, others, quant):
    twins = Twins(tmp_path, family, quant)
    for name, model in (("gpu", twins.on(**others)), ("cpu", twins.cpu)):
        model.save_pretrained(tmp_path / name, packed=True)
    ours, theirs = (open_weights(tmp_path / name, twins.cpu.config) for name in ("gpu", "cpu"))
    only = {key for key in theirs.tensors if key.endswith(".expanded")}  # a GPU has one matrix for both forms
    assert ours.tensors.keys() == theirs.tensors.keys() - only
    for key in ours.tensors:
        assert ours.read(key).qtype is theirs.read(key).qtype and torch.equal(
            ours.read(key).data, theirs.read(key).data
        )
    again = load(tmp_path / "gpu", None, rules=twins.rules(**others), self_test=False, **F32)
    assert torch.equal(again(torch.tensor([[3, 4, 5]])).logits, twins.on(**others)(torch.tensor([[3, 4, 5]])).logits)


def test_experts_of_a_layer_on_two_devices_are_one_tensor(tmp_path):
    twins = Twins(tmp_path, "qwen3_moe", "Q8_0")
    shared = twins.load(twins.rules(Experts="cpu"), gpu_experts=1)
    shared.save_pretrained(tmp_path / "shared", packed=True)
    twins.cpu.save_pretrained(tmp_path / "cpu", packed=True)
    name = "model.layers.1.mlp.experts.up_proj"
    found, right = (open_weights(tmp_path / folder, twins.cpu.config).get(name) for folder in ("shared", "cpu"))
    assert found.shape == right.shape and torch.equal(found.data, right.data)


@pytest.mark.parametrize("kind", ["Qwen3MoeRMSNorm", "Qwen3MoeAttention", "Qwen3MoeSparseMoeBlock", "Qwen3MoeExperts"])
@pytest.mark.parametrize("others", [{}, {"Experts": "cpu"}])
def test_methods_put_on_classes_are_refused(tmp_path, kind, others, monkeypatch):
    twins, ids = Twins(tmp_path, "qwen3_moe"), torch.tensor([[3, 4, 5]])
    mine = twins.on(**others)
    usual = mine(ids).logits
    old = next(type(module) for module in twins.reference.modules() if type(module).__name__ == kind)
    whole = old.forward
    with monkeypatch.context() as patch:
        patch.setattr(old, "forward", lambda self, *args, **kwargs: whole(self, *args, **kwargs))
        with pytest.raises(UsageError, match="a method"):
            mine(ids)
    assert torch.equal(mine(ids).logits, usual)
