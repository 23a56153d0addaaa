"""Experts that are added one layer later: what the model then computes, and what cannot be asked for."""

from __future__ import annotations

import pytest
import torch

from ktx.cache.kv import KVCache
from ktx.errors import UsageError
from ktx.ops.moe import MoE
from tests.families.test_families import load
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny

IDS = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_moe", "mixtral"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    original = tiny(request.param, num_hidden_layers=4, num_experts_per_tok=3)
    original.config.save_pretrained(made)
    write_gguf(made / "model.gguf", original, "F32")
    return made


def deferring(folder, count, **more):
    return load(folder, folder / "model.gguf", defer_experts=count, **more)


def logits(model, ids=IDS, **more):
    with torch.inference_mode():
        return model(input_ids=ids, **more).logits


def one_by_one(folder, count, monkeypatch):
    """The same by a dictionary and a loop over tokens: each token's experts sorted by weight, the last ones kept for
    the next block.
    """
    model = load(folder, folder / "model.gguf")
    blocks, late = [module for module in model.modules() if isinstance(module, MoE)], {}

    def mixed(self, flat, ids, weights):
        out = self.shared_output(flat)
        out = torch.zeros_like(flat) if out is None else out.clone()
        kept = torch.zeros_like(flat)
        for t in range(len(flat)):
            for rank, j in enumerate(sorted(range(ids.shape[1]), key=lambda j, t=t: -weights[t, j].item())):
                made = self.experts(flat[t : t + 1], ids[t : t + 1, j : j + 1], weights[t : t + 1, j : j + 1])[0]
                last = rank >= ids.shape[1] - count and self is not blocks[-1]
                (kept if last else out)[t] += made
        out += late.pop("kept", 0.0)
        late["kept"] = kept
        return out

    for block in blocks:
        block.block = None
    monkeypatch.setattr(MoE, "routed_and_shared", mixed)
    return logits(model)


@pytest.mark.parametrize("count", [1, 2])
def test_the_experts_that_weigh_least_come_one_layer_later(folder, count, monkeypatch):
    found = logits(deferring(folder, count))
    exact = logits(load(folder, folder / "model.gguf"))
    expected = one_by_one(folder, count, monkeypatch)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found - exact).norm() > 1e-3 * exact.norm()  # it is another function


def test_token_by_token_is_the_whole(folder):
    model = deferring(folder, 1)
    whole, cache = logits(model), KVCache(model.config, "f32")
    single = [logits(model, IDS[:, i : i + 1], past_key_values=cache, use_cache=True) for i in range(IDS.shape[1])]
    assert (torch.cat(single, 1) - whole).norm() < 1e-3 * whole.norm()


def test_a_forward_that_is_given_up_leaves_nothing_behind(folder):
    model = deferring(folder, 2)
    whole = logits(model)

    def broken(*args):
        raise RuntimeError("enough")

    hook = model.model.layers[2].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="enough"):
        logits(model, IDS[:, :7])
    hook.remove()
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("count", [3, 9, -1])
def test_a_number_that_leaves_no_expert_is_refused_before_weights_are_read(folder, count):
    with pytest.raises(UsageError, match=f"defer_experts={count}: must be 0 to 2"):
        deferring(folder, count)


def test_a_model_without_experts_has_none_to_put_off(tmp_path):
    original = tiny("llama")
    original.config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "model.gguf", original, "F32")
    with pytest.raises(UsageError, match="llama has fewer than two MoE layers"):
        deferring(tmp_path, 1)
