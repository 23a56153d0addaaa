"""Declarations of families: the tables that are read from them, and what each must say."""

from __future__ import annotations

import importlib

import pytest
import transformers

from ktx import families
from ktx.chat_formats.registry import CHAT_FORMATS
from ktx.families import FAMILIES, Family
from ktx.families.family import RoutingSpec
from ktx.injection.rules import shipped_rules


def test_tables_have_every_declaration():
    assert {name for family in FAMILIES for name in family.model_types} == set(families.BY_MODEL_TYPE)
    assert len(families.BY_MODEL_TYPE) == sum(len(family.model_types) for family in FAMILIES)
    for family in FAMILIES:
        assert set(family.layers) <= families.PRE_NORM_LAYERS and set(family.attention) <= families.FUSABLE_ATTENTION
        assert all(families.ROUTERS[name] is spec for name, spec in family.routers.items())
        assert family.mla.items() <= families.MLA_PAIRING.items()
        if family.gguf:
            assert set(family.model_types) <= set(families.GGUF_MODEL_TYPES[family.gguf.arch])


def test_a_key_that_is_declared_twice_is_an_error():
    with pytest.raises(ValueError, match="declared twice: qwen3"):
        families._merged({"qwen3": 1, "llama": 1}, {"qwen3": 2})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_what_a_declaration_names_exists(family: Family):
    assert family.rules in shipped_rules()
    assert not family.chat or family.chat in CHAT_FORMATS
    if not (family.layers or family.attention or family.mla or family.routers):
        return
    module = importlib.import_module(_modeling_file(family.model_types[0]))
    for name in (*family.layers, *family.attention, *family.mla, *family.routers):
        assert hasattr(module, name), f"{module.__name__} has no {name}"


def _modeling_file(model_type: str) -> str:
    config = transformers.AutoConfig.for_model({"kimi_k2": "deepseek_v3"}.get(model_type, model_type))
    return type(config).__module__.replace("configuration_", "modeling_")


def test_earlier_names_of_rule_files_are_no_file_names():
    assert not set(families.RULE_ALIASES) & set(shipped_rules())
    assert set(families.RULE_ALIASES.values()) <= set(shipped_rules())


def test_gguf_of_knows_only_families_that_llama_cpp_writes():
    assert families.gguf_of("qwen3_5_text").tiled_value_heads and families.gguf_of("deepseek_v3").gating == (2,)
    assert families.gguf_of("olmoe") is families.gguf_of("no_such_type") is None


def test_routing_defaults_to_f32_weights_without_groups():
    spec = RoutingSpec("softmax")
    assert (spec.groups, spec.renorm, spec.scaled, spec.own_dtype) == ("none", False, False, False)
