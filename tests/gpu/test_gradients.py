"""The GPU's operators have no gradient: forward says so wherever autograd would record one, and computes as ever where
not.
"""

from __future__ import annotations

import pytest
import torch

from ktx.errors import NoGradient
from tests.gpu.helpers import Twins

pytestmark = pytest.mark.filterwarnings("ignore:.*matched no module")
IDS = torch.tensor([[5, 9, 200, 31]])
ALL = {
    "cuda:0": {},
    "cpu layers first": {"rest": "cpu", "layers": {1: "cuda:0"}},
    "experts on the cpu": {"Experts": "cpu"},
}


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def twins(request, tmp_path_factory):
    return Twins(tmp_path_factory.mktemp(request.param), request.param)


def embeds(twins, model):
    x = twins.reference.get_input_embeddings()(IDS).detach()
    return x.to(next((p.device for p in model.parameters() if p.device.type != "cpu"), "cpu")).requires_grad_()


@pytest.mark.parametrize("placed", ALL)
def test_embeddings_that_require_grad(twins, placed):
    model = twins.on(**ALL[placed])
    with pytest.raises(NoGradient, match="on a GPU has no gradient.*device: cpu"):
        model(inputs_embeds=embeds(twins, model), use_cache=False)
    with torch.no_grad():
        assert model(inputs_embeds=embeds(twins, model), use_cache=False).logits.isfinite().all()


def test_parameters_that_are_trained(twins):
    model = twins.on()
    for ends in ("norm.weight", "mlp.gate.weight"):
        chosen = [p for name, p in model.named_parameters() if name.endswith(ends)]
        for p in chosen:
            p.requires_grad_()
        with pytest.raises(NoGradient, match="on a GPU has no gradient"):
            model(input_ids=IDS, use_cache=False)
        for p in chosen:
            p.requires_grad_(False)


def test_biases_and_dropped_weights(tmp_path):
    """Biases are parameters on the device too; attention weights are dropped where attention is computed by torch."""
    twins = Twins(tmp_path, "llama", attention_bias=True, mlp_bias=True, attention_dropout=0.4)
    model = twins.on()
    assert model.num_parameters() == twins.reference.num_parameters()
    assert all(p.device == model.model.norm.weight.device for p in model.parameters())
    with torch.no_grad():
        for one in (model, twins.reference):
            one.model.layers[0].self_attn.v_proj.bias.mul_(5)
            one.model.layers[1].mlp.down_proj.bias.data += 1
        usual = twins.reference(IDS).logits
        assert (model(IDS).logits.cpu() - usual).norm() < 1e-4 * usual.norm()
        twins.reference.set_attn_implementation("eager")
        found = []
        for one in (model, twins.reference):
            one.train()
            torch.manual_seed(3)
            found.append(one(IDS, use_cache=False).logits.cpu())
            one.eval()
        assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm() < 0.1 * (usual - found[1]).norm()
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        bias = model.model.layers[1].get_submodule(part).bias
        bias.requires_grad_()
        with pytest.raises(NoGradient, match="Linear on a GPU has no gradient"):
            model(input_ids=IDS, use_cache=False)
        bias.requires_grad_(False)
