"""Bytes that a placement counts beside those that a placed model has."""

from __future__ import annotations

import pytest

from ktx.placement import CPU, Budget, Placement
from ktx.preparing import measure
from tests.models.families import FAMILIES, tiny
from tests.models.test_families import load
from tests.test_placement import held


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placed_model_holds_what_is_planned_on_both_sides(tmp_path, family):
    tiny(family).save_pretrained(tmp_path)
    found = measure(tmp_path)[0]
    made = Placement(found, Budget((1 << 40,), 1 << 40), ["cuda:0"] * found.layers)
    model = load(tmp_path, None, device="cuda", devices={"embedding": "cpu"})
    there = {step.path: step.device for step in model.ktx.plan if step.tensors}
    assert {path: there[path] for path in made.devices if path in there} == made.devices
    both = sum(part.on(made.device(part) != CPU).held for part in found.parts)
    assert both == pytest.approx(held(model), rel=0.003)
