"""Forwards are called as the installed transformers names things: the cache, by each name that it accepts, by position,
and never by one that it warns of.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import ktx
from ktx.cache.kv import KVCache
from ktx.cli.bench_ktx import time_forward
from ktx.engine.sampler import SamplingParams
from ktx.ops.forward_signature import ForwardSignature
from ktx.ops.fusion.layer import Layer
from ktx.ops.recurrent import Recurrent
from ktx.transformers_compat import CACHE_NAMES, cache_aliases, cache_argument, cache_name, cache_of, default_cache_name
from tests.families.test_families import IDS, Pair, relative
from tests.ops.test_fused_blocks import modules
from tests.support.tiny_chat_model import write_model

FAMILIES = ["llama", "deepseek_v3", "qwen3_next", "gpt_oss", "minimax_m2", "phi3"]


def accepted(module):
    name = cache_name(type(module)) or default_cache_name()
    return [name, *(alias for alias in cache_aliases(name) if alias != "cache_params")]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp(request.param), request.param, "F32")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_takes_its_cache_by_every_name_that_transformers_accepts(pair):
    with torch.inference_mode():
        whole = pair.reference(IDS[:, :30]).logits
        for name in accepted(pair.reference):
            cache = KVCache(pair.model.config, None)
            parts = [pair.model(IDS[:, at:end], **{name: cache}).logits for at, end in ((0, 20), (20, 29), (29, 30))]
            assert relative(torch.cat(parts, 1), whole) < 1e-4, name
            assert cache.get_seq_length(pair.model.config.num_hidden_layers - 1) == 30


def call_of_a_layer(model, length):
    """What a decoder layer of the model is given for the tokens of IDS, without a cache."""
    body = model.get_decoder()
    hidden = body.embed_tokens(IDS[:, :length])
    positions = torch.arange(length)[None]
    return {
        "hidden_states": hidden,
        "position_embeddings": body.rotary_emb(hidden, positions),
        "attention_mask": None,
        "position_ids": positions,
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe"])
def test_layers_and_attention_take_a_cache_by_name_and_by_position(family, tmp_path):
    model = Pair(tmp_path, family, "F32").model
    body = model.get_decoder()
    layer, attention = body.layers[0], body.layers[0].self_attn
    with torch.inference_mode():
        for length in (1, 3, 20):  # in one kernel call, and the long way
            given = call_of_a_layer(model, length)
            layers = given | {"attention_mask": None}
            parts = {key: given[key] for key in ("hidden_states", "position_embeddings", "attention_mask")}
            for module, call in ((layer, layers), (attention, parts)):
                outs = []
                for name in accepted(module):
                    cache = KVCache(model.config, None)
                    out = module(**call, **{name: cache})
                    outs.append(out[0] if isinstance(out, tuple) else out)
                    assert cache.get_seq_length(0) == length, (type(module), name)
                cache, names = KVCache(model.config, None), module.call.names
                by_place = [call.get(name, cache if name in CACHE_NAMES else None) for name in names]
                out = module(*by_place)
                outs.append(out[0] if isinstance(out, tuple) else out)
                assert cache.get_seq_length(0) == length
                assert all(torch.equal(outs[0], out) for out in outs)


def test_a_call_that_fits_no_forward_is_pythons_error(tmp_path):
    model = Pair(tmp_path, "llama", "F32").model
    given = call_of_a_layer(model, 2)
    layer = model.model.layers[0]
    with pytest.raises(TypeError, match="multiple values.*attention_mask"):
        layer(given["hidden_states"], None, attention_mask=None)
    with pytest.raises(TypeError, match="positional arguments"):
        layer(given["hidden_states"], *[None] * 20)


class Older(nn.Module):
    def forward(self, hidden_states, past_key_values=None, **kwargs):
        """As up to 5.23, where continuous batching passes something else that is called cache."""


class Newer(nn.Module):
    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        """As from 5.24 on, where transformers still takes the older names."""


class Without(nn.Module):
    def forward(self, hidden_states):
        """No cache at all."""


@pytest.mark.parametrize(
    ("module", "args", "kwargs", "given", "cache"),
    [
        (Older, (), {"past_key_values": 1, "cache": 2}, {"cache": 2}, 1),
        (Older, ("x", 1), {}, {"hidden_states": "x"}, 1),
        (Older, (), {"cache": 2}, {"cache": 2}, None),
        (Newer, (), {"past_key_values": 1}, {}, 1),
        (Newer, (), {"cache_params": 1}, {}, 1),
        (Newer, (), {"cache": 2, "past_key_values": 1}, {}, 2),
        (Newer, ("x", "m", 3), {"more": 4}, {"hidden_states": "x", "attention_mask": "m", "more": 4}, 3),
        (Without, ("x",), {}, {"hidden_states": "x"}, None),
    ],
)
def test_the_cache_is_found_as_the_forward_names_it(module, args, kwargs, given, cache):
    call = ForwardSignature.of(module())
    assert call.split(args, dict(kwargs)) == (given, cache)
    assert call.join(given, cache) == (given | {call.cache: cache} if call.cache else given)


def test_a_wrapper_is_asked_as_models_are():
    class Wrapper(nn.Module):
        def forward(self, *args, **kwargs):
            return kwargs

    assert Wrapper()(**cache_argument(Wrapper(), 5)) == {default_cache_name(): 5}


def test_every_module_with_a_cache_is_known_by_the_forward_that_it_replaces(pair):
    names = {default_cache_name(), "cache_params"} if default_cache_name() != "cache" else {"cache"}
    for module in [*modules(pair.model, Layer), *modules(pair.model, Recurrent)]:
        assert module.call.cache in names


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_our_own_calls_make_transformers_warn_of_nothing(family, tmp_path, caplog):
    folder = write_model(tmp_path / family, family)
    model, _ = ktx.load(folder, folder / "model.gguf", progress=False)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            time_forward(model, [5, 6, 7], None)
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
            with model.ktx.engine(kv_cache_tokens=1024) as engine:
                assert list(engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=3)))
            with torch.inference_mode():
                cache = KVCache(model.config)
                assert cache_of(model(torch.tensor([[5]]), **cache_argument(model, cache))) is cache
    finally:
        logger.removeHandler(caplog.handler)
    assert "deprecated" not in caplog.text
