"""What scripts look at in a model on a GPU: attention weights, and hooks on shared experts."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ktx.errors import UsageError
from ktx.transformers_compat import cache_argument
from tests.families.test_families import IDS, relative
from tests.gpu.helpers import Twins


@pytest.fixture(scope="module", params=["glm4_moe", "deepseek_v3"])
def twins(request, tmp_path_factory):
    return Twins(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def placed(twins):
    return twins.on()


def answered(model, **options):
    """Logits and weights of a prompt and of a token."""
    cache = DynamicCache(config=model.config)
    pieces = [IDS[:, at:end] for at, end in ((0, 9), (9, 10))]
    out = [model(ids, **cache_argument(model, cache), **options) for ids in pieces]
    return torch.cat([one.logits.cpu() for one in out], 1), [one.attentions for one in out]


@torch.no_grad()
def test_attention_weights_or_an_error_that_says_where_there_are_some(twins, placed):
    twins.reference.set_attn_implementation("eager")
    expected, wanted = answered(twins.reference, output_attentions=True)
    if twins.family == "deepseek_v3":
        for how in ("call", "eager"):
            placed.set_attn_implementation("eager" if how == "eager" else "ktx")
            with pytest.raises(UsageError, match="MLA on a GPU returns no attention weights"):
                answered(placed, output_attentions=how == "call")
    else:
        logits, found = answered(placed, output_attentions=True)
        assert relative(logits, expected) < 1e-4
        for mine, theirs in zip(found, wanted, strict=True):
            assert all((x.cpu() - y).abs().max() < 1e-4 for x, y in zip(mine, theirs, strict=True))
    placed.set_attn_implementation("ktx")
    assert relative(answered(placed)[0], expected) < 1e-4


@torch.no_grad()
def test_shared_experts_are_given_what_transformers_gives_them(twins, placed):
    calls = []
    for model in (placed, twins.reference):
        shared, shapes = model.model.layers[1].mlp.shared_experts, []
        handles = [
            module.register_forward_hook(lambda module, args, out, to=shapes: to.append((*args[0].shape, *out.shape)))
            for module in (shared, shared.act_fn, shared.down_proj)
        ]
        answered(model)
        for handle in handles:
            handle.remove()
        calls.append(shapes)
    assert calls[0] == calls[1] and calls[0]
