"""The declaration of a model family: its rule file, fusable classes, routing, GGUF names and chat format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Pairing = Literal["halves", "interleaved", "config"]


@dataclass(frozen=True)
class RoutingSpec:
    """How a router class scores and weighs experts.

    Attributes:
        scoring: softmax over all experts, sigmoid, or softmax_topk (softmax over the chosen ones).
        groups: how groups of experts are ranked: none, by their max, or by the sum of their top2 scores.
        renorm: whether the weights of a token are normalized to sum 1, or the name of the module's attribute with this
            boolean.
        scaled: whether weights are multiplied by the module's routed_scaling_factor.
        own_dtype: whether weights are returned in the dtype of the hidden states, not in f32.
    """

    scoring: Literal["softmax", "sigmoid", "softmax_topk"]
    groups: Literal["none", "max", "top2"] = "none"
    renorm: bool | str = False
    scaled: bool = False
    own_dtype: bool = False


@dataclass(frozen=True)
class GGUF:
    """How llama.cpp writes the family.

    Attributes:
        arch: `general.architecture`.
        config_keys: configuration attribute -> metadata key without the architecture prefix ("?": optional), in
            addition to those that every family has; a file whose value differs from the configuration is refused. None:
            the metadata lacks part of the configuration, so the folder is needed.
        fixed: configuration attributes without a key, because llama.cpp's graph fixes them.
        gating: accepted values of expert_gating_func (1 softmax, 2 sigmoid, 3 softmax of the chosen experts).
        norm_topk_prob: whether routing weights are normalized, where the configuration has no norm_topk_prob.
        interleaved_qk: the two halves of each head are interleaved in the rows of q and k (the converter's LlamaModel).
        norms_plus_one: norm weights are stored as 1 + w.
        tiled_value_heads: linear attention's value heads are ordered by their index within a key head.
    """

    arch: str
    config_keys: Mapping[str, str] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    gating: tuple[int, ...] = (1,)
    norm_topk_prob: bool | None = None
    interleaved_qk: bool = False
    norms_plus_one: bool = False
    tiled_value_heads: bool = False


@dataclass(frozen=True)
class Family:
    """The models of one architecture in transformers.

    Attributes:
        model_types: the family's `model_type`s of config.json.
        rules: the shipped rule file (`optimize_rules/`).
        rules_alias: an earlier name of that file, which still finds it.
        layers: decoder layer classes that compute x + attention(norm(x)), then x + mlp(norm(x)): they may be fused.
        attention: attention classes that project, normalize q and k if they have norms, rotate halves, cache, attend
            and project: they may be fused.
        half_tables: their rotary tables cover half a head (gpt-oss).
        mla: MLA attention classes -> how they pair rotated columns ("config": as `rope_interleave` says).
        routers: router classes -> how they route.
        gguf: how llama.cpp writes the family; None: no GGUF.
        chat: the chat format (`ktx/chat_formats/registry.py`) of models whose template has no marks of another.
        chat_model_types: more model types with this chat format.
    """

    model_types: tuple[str, ...]
    rules: str = "generic"
    rules_alias: str = ""
    layers: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    half_tables: bool = False
    mla: Mapping[str, Pairing] = field(default_factory=dict)
    routers: Mapping[str, RoutingSpec] = field(default_factory=dict)
    gguf: GGUF | None = None
    chat: str = ""
    chat_model_types: tuple[str, ...] = ()
