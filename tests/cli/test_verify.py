"""ktx verify sees wrong kernels, routers and experts in mixtures of experts.

A router's near tie is counted apart.
"""

from __future__ import annotations

import argparse

import pytest
import torch

from ktx.cli import verify
from ktx.ops.experts import experts_by_path
from ktx.ops.router import Router
from tests.families.test_families import IDS, load
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny

UNDECIDED = ["gpt_oss", "qwen3_moe", "deepseek_v3", "qwen2_moe"]


class Loaded:
    """A tiny model on disk and in ktx, with routers that are often undecided between two experts."""

    def __init__(self, folder, family, quant="Q8_0"):
        original = tiny(family)
        with torch.no_grad():
            for name, p in original.named_parameters():
                if name.endswith(("router.weight", "gate.weight")) and p.shape[0] > 1:
                    p[1] = p[0] * (1 + 2e-3 * torch.randn(p.shape[1]))
                elif name.endswith("router.bias"):
                    p[1] = p[0]
            for name, b in original.named_buffers():
                if "correction" in name:
                    b.view(-1)[1] = b.view(-1)[0]
        original.config.save_pretrained(folder)
        write_gguf(folder / "model.gguf", original, quant)
        self.weights = folder / "model.gguf"
        self.model = load(folder, self.weights)
        self.args = argparse.Namespace(
            model=str(folder),
            weights=str(self.weights),
            quantize="auto",
            quantize_experts=None,
            trust_remote_code=False,
        )

    def compared(self):
        return verify.compare(self.model, self.args, IDS[:, :64])


@pytest.fixture(params=UNDECIDED)
def loaded(request, tmp_path):
    return Loaded(tmp_path, request.param)


def test_near_ties_are_counted_and_no_difference(loaded):
    rows, summary = loaded.compared()
    assert summary["ok"] and summary["worst_layer"] < 0.03 and summary["logits_error"] < 0.1
    assert 0 < summary["changed_choices"] == sum(row.get("changed_choices", 0) for row in rows) < summary["choices"]
    plain = verify._record(loaded.model, IDS[:, :64])
    assert len(plain["choices"]) and not any(module._forward_pre_hooks for _, module in experts_by_path(loaded.model))


def one_expert_is_damaged(model):
    """The one of each layer that is chosen most."""
    with torch.inference_mode():
        model(IDS[:, :64])
    for _, experts in experts_by_path(model):
        weights, most = experts.weights["down_proj"], int(experts.total_counts()[: experts.total_experts].argmax())
        share = weights.nbytes // weights.matrices
        weights.data[most * share : (most + 1) * share] = 0


def weights_of_choices_are_wrong(model):
    for module in model.modules():
        if isinstance(module, Router):
            whole = module.forward
            module.forward = lambda *args, whole=whole: (lambda made: (made[0], made[1] * 1.2, made[2]))(whole(*args))


def choices_are_wrong(model):
    for module in model.modules():
        if isinstance(module, Router):
            whole = module.forward
            count = experts_by_path(model)[0][1].total_experts
            module.forward = lambda *args, whole=whole, count=count: (
                lambda made: (made[0], made[1], (made[2] + 1) % count)
            )(whole(*args))


def output_is_wrong(model):
    model.lm_head.parts[0].data[: model.lm_head.parts[0].nbytes // 4] = 0


@pytest.mark.parametrize(
    "breaks", [one_expert_is_damaged, weights_of_choices_are_wrong, choices_are_wrong, output_is_wrong]
)
def test_what_is_wrong_is_seen(loaded, breaks):
    breaks(loaded.model)
    assert not loaded.compared()[1]["ok"]


def test_what_is_shown(loaded, capsys):
    verify._print_report(*loaded.compared())
    said = capsys.readouterr().out
    assert "other experts" in said and "routing decisions chose other experts" in said and "agrees with" in said
