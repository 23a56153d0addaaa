"""Metadata of GGUF files that changes the computation: honoured, or refused by name before anything is loaded."""

from __future__ import annotations

import re

import gguf
import pytest
import torch

from ktx.errors import BadFile
from ktx.families import GGUF_MODEL_TYPES, gguf_of
from ktx.weights.check_config import gguf_mismatches
from ktx.weights.open import open_weights
from tests.families.test_families import IDS, LONGROPE, load, logits
from tests.support.gguf_writer import ARCH, write_gguf
from tests.support.tiny_models import FAMILIES, LINEAR, LLAMA3, YARN, tiny

HYBRID = LINEAR | {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "head_dim": 64}
CONFIGS = {"qwen3_5_text": HYBRID, "mistral": {"sliding_window": None}}


def file(folder, family, keys, tensors=(), **config):
    """A file of the family with some metadata keys changed or added, and tensors; the model that it was made of."""
    model = tiny(family, **(CONFIGS.get(family, {}) | config))

    def extra(writer):
        for name, value in tensors:
            writer.add_tensor(name, torch.tensor(value, dtype=torch.float32).numpy())
        for key, value in keys.items():
            if isinstance(value, list):
                writer.add_array(f"{ARCH[model.config.model_type]}.{key}", value)

    scalars = {key: value for key, value in keys.items() if not isinstance(value, list)}
    oracle = write_gguf(folder / "m.gguf", model, "F32", mangle=scalars, extra=extra)
    model.load_state_dict(oracle, strict=False)
    return folder / "m.gguf", model


def said(path, config):
    """What a file and a configuration differ in."""
    return "; ".join(open_weights(path, config).config_mismatches(config))


OFF = [  # what nothing here computes, and values that ask for nothing
    ("logit_scale", 0.5, (0.0, 1.0)),
    ("residual_scale", 2.0, (1.0,)),
    ("embedding_scale", 12.0, (1.0,)),
    ("attention.scale", 0.5, (0.125, 0.0)),
    ("attn_logit_softcapping", 50.0, (0.0,)),
    ("final_logit_softcapping", 30.0, (0.0,)),
    ("router_logit_softcapping", 30.0, (0.0,)),
    ("attention.clamp_kqv", 8.0, (0.0,)),
    ("attention.max_alibi_bias", 8.0, (0.0,)),
    ("attention.causal", False, (True,)),
    ("attention.sliding_window", 64, (0, 512)),
    ("attention.temperature_scale", 0.1, (0.0,)),
    ("attention.indexer.top_k", 2048, (0,)),
    ("use_parallel_residual", True, (False,)),
    ("rope.freq_base_swa", 5e6, (1e4,)),
    ("rope.dimension_count_swa", 32, (64,)),
    ("rope.scaling.attn_factor", 1.2, (1.0,)),
    ("rope.scaling.alpha", 1000.0, (1.0,)),
    ("attention.value_length", 32, (64,)),
    ("expert_weights_scale", 2.5, (1.0, 0.0)),
    ("swiglu_clamp_exp", 7.0, ()),
    ("a_key_of_tomorrow", 3, (0, False, "")),
]


@pytest.mark.parametrize("key,value,neutral", OFF, ids=[key for key, *_ in OFF])
def test_a_key_that_nobody_computes_is_refused_by_name(tmp_path, key, value, neutral):
    path, model = file(tmp_path, "llama", {key: value})
    model.config.save_pretrained(tmp_path)
    for source in (path, tmp_path):
        with pytest.raises(BadFile, match=f"{key.removeprefix('rope.').removeprefix('scaling.')}|window"):
            load(source, path)
    for fine in neutral:
        path, model = file(tmp_path, "llama", {key: fine})
        assert not said(path, model.config)


ROPES = [
    ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}),
    ("qwen3", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 1e6}),
    ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4,
               "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}),
    ("llama", {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5}),
    ("deepseek_v3", YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 24}),
]  # fmt: skip


def scaling(rope):
    """Keys as the converter writes them."""
    named = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
    }
    named |= {"beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
    keys = {f"rope.scaling.{key}": rope[name] for name, key in named.items() if name in rope}
    floats = {key: float(value) for key, value in keys.items() if "context" not in key}
    return {"rope.scaling.type": rope["rope_type"]} | keys | floats


@pytest.mark.parametrize("family,rope", ROPES)
def test_scaled_positions_of_a_file_alone(tmp_path, family, rope):
    path, model = file(tmp_path, family, scaling(rope), rope_parameters=rope)
    assert (logits(load(path, None)) - logits(model)).abs().max() < 1e-4
    assert not said(path, model.config)


@pytest.mark.parametrize("keys", [{"rope.scaling.factor": 3.0}, {"rope.scale_linear": 3.0}])
def test_a_factor_alone_is_linear(tmp_path, keys):
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
    path, model = file(tmp_path, "llama", keys, rope_parameters=rope)
    assert (logits(load(path, None)) - logits(model)).abs().max() < 1e-4
    assert "rope scaling: linear in the file, none in the configuration" in said(path, tiny("llama").config)


@pytest.mark.parametrize(
    "family,keys,words",
    [
        ("llama", {"rope.freq_base": 5e5}, "rope theta: 500000 in the file"),
        ("llama", {"attention.layer_norm_rms_epsilon": 1e-5}, "RMS norm's epsilon: 1e-05 in the file"),
        ("phi3", {"rope.dimension_count": 32}, "rotated columns: 32 in the file .*, 64 in the conf"),
        ("llama", {"attention.key_length": 32}, "key width: 32 in the file"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn in the file, none in the conf"),
        ("deepseek_v3", {"rope.scaling.type": "none"}, "none in the file, yarn in the configuration"),
        ("deepseek_v3", {"rope.scaling.factor": 40.0}, "scaling.factor: 40 in the file, 4 in the conf"),
        ("deepseek_v3", {"rope.scaling.original_context_length": 4096}, "original_context_length: 4096 in the file"),
        ("deepseek_v3", {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier: 0.1 in the file"),
        ("deepseek_v3", {"rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast: 8 in the file, 32"),
        ("deepseek_v3", {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ("deepseek_v3", {"expert_gating_func": 1}, "gating function: 1 in the file"),
        ("deepseek_v3", {"expert_weights_norm": False}, "normalized routing weights: False in the file"),
        ("deepseek_v3", {"expert_weights_scale": 2.5}, "scale of routing weights: 2.5 in the file .*, 1.5 in the conf"),
        ("deepseek_v3", {"expert_group_count": 8}, "expert groups: 8 in the file .*, 4 in the"),
        ("deepseek_v3", {"expert_group_used_count": 1}, "expert groups per token: 1 in the file"),
        ("deepseek_v3", {"expert_used_count": 2}, "experts per token: 2 in the file"),
        ("deepseek_v3", {"attention.key_length_mla": 64}, "key width: 64 in the file"),
        ("deepseek_v3", {"leading_dense_block_count": 2}, "leading dense layers: 2"),
        ("deepseek_v2", {"expert_weights_norm": True}, "normalized routing weights: True in the file"),
        ("qwen2_moe", {"expert_gating_func": 2}, "gating function: 2 in the file"),
        ("qwen3_moe", {"expert_weights_norm": False}, "normalized routing weights"),
        ("mixtral", {"expert_weights_norm": False}, "normalized routing weights"),
        ("glm4_moe", {"expert_gating_func": 1}, "gating function: 1 in the file"),
        ("ernie4_5_moe", {"interleave_moe_layer_step": 2}, "distance between MoE layers: 2"),
        ("gpt_oss", {"attention.sliding_window": 128}, "window: 128 tokens in the file, 8 in the"),
        ("gpt_oss", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]}, "sliding window: .* in different layers"),  # noqa: E501
        ("qwen3_5_text", {"ssm.group_count": 4}, "key heads of linear attention: 4"),
        ("qwen3_5_text", {"ssm.inner_size": 256}, "value columns of linear attention: 256"),
        ("qwen3_5_text", {"full_attention_interval": 2}, "linear attention: .* in different layers"),
        ("qwen3_5_text", {"attention.recurrent_layers": [True, False, True, False]}, "linear attention: .* in different layers"),  # noqa: E501
        ("qwen3_next", {"rope.dimension_count": 64}, "rotated columns"),
    ],
)  # fmt: skip
def test_what_the_configuration_contradicts_is_refused(tmp_path, family, keys, words):
    path, model = file(tmp_path, family, keys)
    assert re.search(words, said(path, model.config))


def test_numbers_that_differ_from_layer_to_layer_are_refused():
    metadata = {"llama.attention.head_count": [4, 2], "llama.feed_forward_length": [320, 320]}
    (found,) = gguf_mismatches(metadata, "llama", {}, tiny("llama").config)
    assert found == "llama.attention.head_count differs from layer to layer"


AGREEING = [
    ("qwen3_5_text", {"ssm.group_count": 2, "ssm.state_size": 32, "ssm.time_step_rank": 4, "ssm.inner_size": 128,
                      "ssm.conv_kernel": 4, "full_attention_interval": 4, "rope.dimension_sections": [3, 3, 2, 0]}),
    ("qwen3_5_text", {"attention.recurrent_layers": [True, True, True, False]}),
    ("gpt_oss", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False], "rope.freq_base": 150000.0}),  # noqa: E501
    ("glm4_moe", {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.0, "expert_shared_count": 1,  # noqa: E501
                  "expert_group_count": 2, "expert_group_used_count": 1, "leading_dense_block_count": 1}),
    ("ernie4_5_moe", {"interleave_moe_layer_step": 1, "leading_dense_block_count": 1, "expert_shared_count": 1}),
    ("minimax_m2", {"expert_gating_func": 2}),
    ("llama", {"tensor_data_layout": "Meta AI original pth", "vocab_size": 320, "rope.scaling.finetuned": True}),
    ("llama", {"attention.head_count_kv": [2, 2], "feed_forward_length": [320, 320]}),
]  # fmt: skip


@pytest.mark.parametrize("family,keys", AGREEING)
def test_what_agrees_is_read(tmp_path, family, keys):
    path, model = file(tmp_path, family, keys)
    assert not said(path, model.config)


@pytest.mark.parametrize("family", [*FAMILIES, *CONFIGS])
def test_a_file_of_each_family_agrees_with_its_configuration(tmp_path, family):
    path, model = file(tmp_path, family, {})
    assert not said(path, model.config)


def test_rope_tables_are_those_of_the_configuration(tmp_path):
    path, model = file(tmp_path, "llama", {}, rope_parameters=LLAMA3)
    assert not said(path, model.config)
    other = tiny("llama", rope_parameters=LLAMA3 | {"factor": 4.0}).config
    assert "the values of rope_freqs.weight differ" in said(path, other)
    plain = tiny("llama").config
    assert "llama3 in the file (rope_freqs.weight), none" in said(path, plain)
    longer = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}
    path, model = file(tmp_path, "phi3", {}, **longer)
    assert not said(path, model.config)
    other = tiny("phi3", **longer | {"rope_parameters": LONGROPE | {"short_factor": [2.0] * 32}}).config
    assert "the values of rope_factors_short.weight differ" in said(path, other)
    path, model = file(tmp_path, "llama", {}, tensors=[("rope_freqs.weight", [1.0] * 32)])
    assert (logits(load(path, None)) - logits(model)).abs().max() < 1e-4


def test_mistral_is_read_as_a_llama(tmp_path):
    path, model = file(tmp_path, "mistral", {})
    model.config.save_pretrained(tmp_path)
    assert (logits(load(tmp_path, path)) - logits(model)).abs().max() < 1e-4


def test_layers_for_guesses_are_not_the_models(tmp_path):
    path, model = file(tmp_path, "deepseek_v3", {"block_count": 3, "nextn_predict_layers": 1})
    assert (logits(load(path, None), IDS[:, :20]) - logits(model, IDS[:, :20])).abs().max() < 1e-4


def test_every_architecture_that_is_read_has_a_test():
    tested = {(gguf_of(family).arch, family) for family in [*FAMILIES, *CONFIGS]}
    assert tested | {("qwen35moe", "qwen3_5_moe_text")} == {
        (arch, family) for arch, families in GGUF_MODEL_TYPES.items() for family in families
    }


@pytest.mark.parametrize("arch,words", [
    ("gemma3", "general.architecture is 'gemma3', which ktx does not load from GGUF; supported: deepseek2, "),
    ("lama", "did you mean 'llama'"),
    ("qwen3", "is 'qwen3', supported for qwen3, but the configuration is of llama"),
    ("clip", "does not load from GGUF"),
])  # fmt: skip
def test_an_architecture_without_a_test_is_refused(tmp_path, arch, words, monkeypatch):
    monkeypatch.setitem(ARCH, "llama", arch)
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {**gguf.MODEL_ARCH_NAMES, gguf.MODEL_ARCH.LLAMA: arch})
    model = tiny("llama")
    write_gguf(tmp_path / "m.gguf", model, "F32")
    monkeypatch.undo()
    with pytest.raises(BadFile, match=words):
        open_weights(tmp_path / "m.gguf", model.config)
    if arch != "qwen3":
        with pytest.raises(BadFile, match=f"a {arch} file cannot be used alone"):
            load(tmp_path / "m.gguf", None)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_file_that_is_no_model_says_so(tmp_path, kind):
    model = tiny("llama")
    write_gguf(tmp_path / "m.gguf", model, "F32", extra=lambda writer: writer.add_string("general.type", kind))
    for go in (lambda: open_weights(tmp_path / "m.gguf", model.config), lambda: load(tmp_path / "m.gguf", None)):
        with pytest.raises(BadFile, match=f"general.type is '{kind}'"):
            go()


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q_norm.weight",
        "blk.1.post_ffw_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.layer_output_scale.weight",
    ],
)
def test_a_tensor_that_means_something_elsewhere_is_refused(tmp_path, name):
    path, _ = file(tmp_path, "llama", {}, tensors=[(name, [1.0] * 64)])
    with pytest.raises(BadFile, match=f"no module reads {name}.*used by llama.cpp's computation"):
        load(path, None)


def test_tensors_that_mean_nothing_are_listed(tmp_path):
    path, _ = file(
        tmp_path, "llama", {}, tensors=[("blk.0.attn_rot_embd.weight", [1.0]), ("blk.1.made_up.weight", [1.0])]
    )
    with pytest.warns(UserWarning, match="2 tensors that no module reads"):
        load(path, None)


def test_latent_keys_twice_are_no_fault(tmp_path):
    model = tiny("deepseek_v3")
    both = [(f"blk.{i}.attn_kv_b.weight", model.model.layers[i].self_attn.kv_b_proj.weight.tolist()) for i in range(2)]
    path, model = file(tmp_path, "deepseek_v3", {}, tensors=both)
    assert (logits(load(path, None), IDS[:, :20]) - logits(model, IDS[:, :20])).abs().max() < 1e-4
