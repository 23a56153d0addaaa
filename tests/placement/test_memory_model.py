"""Bytes that a placement counts beside those that a placed model has."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ktx.loader.build import measure_footprint
from ktx.ops.experts import experts_by_path
from ktx.placement.solver import CPU, Budget, Placement
from tests.families.test_families import load
from tests.placement.test_placement import held
from tests.support.tiny_models import FAMILIES, tiny


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    """A GPU is pretended where there is none."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("KTX_GPU", "fake:1")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placed_model_holds_what_is_planned_on_both_sides(tmp_path, family):
    tiny(family).save_pretrained(tmp_path)
    found = measure_footprint(tmp_path)[0]
    made = Placement(found, Budget((1 << 40,), 1 << 40), ["cuda:0"] * found.num_layers)
    model = load(tmp_path, None, device="cuda", devices={"embedding": "cpu"}, self_test=False)
    there = {step.path: step.device for step in model.ktx.plan if step.tensors}
    assert {path: there[path] for path in made.devices if path in there} == made.devices
    both = sum(part.weight_bytes(made.device(part) != CPU).held_bytes for part in found.modules)
    assert both == pytest.approx(held(model), rel=0.003)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_share_of_the_experts_takes_what_is_planned_on_each_side(tmp_path, family):
    tiny(family).save_pretrained(tmp_path)
    found = measure_footprint(tmp_path)[0]
    layers = {part.layer: 1 for part in found.modules if part.num_experts}
    made = Placement(found, Budget((1 << 40,), 1 << 40), ["cuda:0"] * found.num_layers, num_gpu_experts=layers)
    model = load(tmp_path, None, device="cuda", gpu_experts=1, devices={"embedding": "cpu"}, self_test=False)
    experts = [module for _, module in experts_by_path(model)]
    sides = {CPU: sum(one.weight_bytes()[0] for one in experts)}
    sides["cuda:0"] = sum(one.on_gpu.weight_bytes()[0] for one in experts)
    assert {device: made.bytes["routed experts"][device] for device in sides} == pytest.approx(sides, rel=0.01)
    assert {step.path: step.device for step in model.ktx.plan if step.tensors}.items() >= made.devices.items()
