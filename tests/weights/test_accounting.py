"""Every tensor of a checkpoint is read, listed, or refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import ktx
import ktx.loader.load
from ktx.__main__ import main
from ktx.errors import BadFile
from tests.families.test_families import logits, relative
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(ktx.loader.load, "read_tokenizer", lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> a folder of it, the model, its tensors; each made once."""
    made = {}

    def of(family):
        if family not in made:
            folder, model = tmp_path_factory.mktemp(family), tiny(family)
            model.save_pretrained(folder)
            made[family] = folder, model, load_file(folder / "model.safetensors")
        return made[family]

    return of


def with_more(saved, tmp_path, more, family="llama"):
    """A copy of the family's checkpoint with more tensors; and the model."""
    folder, model, tensors = saved(family)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors | {name: tensor.clone() for name, tensor in more.items()}, tmp_path / "model.safetensors")
    return tmp_path, model


ONE = torch.ones(3)
EXTRA = "model.layers.0.self_attn.extra"


@pytest.mark.parametrize("where", [EXTRA, "model.layers.1.mlp.down_proj.counter", "model.extra", "extra"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1]),
        torch.ones(4, 4, dtype=torch.bool),
        torch.rand(3).double(),
        torch.ones(3, dtype=torch.uint8),
        torch.zeros(0),
        torch.tensor(7, dtype=torch.int32),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, 4).to(torch.float8_e5m2),
        torch.ones(2, 0, 4, dtype=torch.int16),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tensor.numel()}".removeprefix("torch."),
)
def test_a_tensor_that_no_module_needs_is_named_whatever_its_type(saved, tmp_path, where, tensor):
    folder, _ = with_more(saved, tmp_path, {where: tensor})
    plan = ktx.plan(folder)
    plan.check()
    assert plan.notes == [f"1 tensor that no module reads: {where} (1)"]


def test_such_a_model_computes_what_it_should_and_warns(saved, tmp_path):
    folder, model = with_more(saved, tmp_path, {EXTRA: torch.tensor([1]), "model.empty": torch.zeros(0)})
    with pytest.warns(UserWarning, match=rf"{folder}: 2 tensors that no module reads: model.empty .1.; {EXTRA} .1.$"):
        loaded = ktx.load(folder, progress=False)[0]
    assert relative(logits(loaded), logits(model)) < 1e-4


def test_a_checkpoint_that_is_read_whole_says_nothing(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ktx.load(saved("llama")[0], progress=False)[0].ktx.plan.notes == []


@pytest.mark.parametrize("tensor", [torch.ones(256, dtype=torch.float64), torch.ones(256, dtype=torch.int64)])
def test_a_type_that_a_module_would_have_to_read_is_refused(saved, tmp_path, tensor):
    folder, _ = with_more(saved, tmp_path, {"model.norm.weight": tensor})
    kind = {torch.float64: "F64", torch.int64: "I64"}[tensor.dtype]
    with pytest.raises(BadFile, match=f"model.norm.weight is {kind}; ktx reads F32 F16 BF16 F8_E4M3"):
        ktx.load(folder, progress=False)


def in_layers(name, layers=range(2)):
    return {f"model.layers.{i}.{name}": ONE for i in layers}


@pytest.mark.parametrize(
    "more,listed",
    [
        (in_layers("self_attn.rotary_emb.inv_freq"), "2 {}model.layers.*.self_attn.rotary_emb.inv_freq (2), a computed table"),  # noqa: E501
        (in_layers("self_attn.masked_bias"), "2 {}model.layers.*.self_attn.masked_bias (2), a computed mask"),
        (in_layers("self_attn.bias"), "2 {}model.layers.*.self_attn.bias (2), a computed mask"),
        ({"model.embeddings.position_ids": ONE}, "1 {}model.embeddings.position_ids (1), computed positions"),
        (in_layers("self_attn.q_norm.weight"), "2 {}model.layers.*.self_attn.q_norm.weight (2)"),
        (in_layers("self_attn.q_norm.bias") | in_layers("self_attn.q_norm.weight"), "4 {}model.layers.*.self_attn.q_norm.bias (2); model.layers.*.self_attn.q_norm.weight (2)"),  # noqa: E501
        (in_layers("mlp.up_proj.weight", [2, 3]), "2 {}model.layers.2.mlp.up_proj.weight (1), after the 2 layers of the configuration; model.layers.3.mlp.up_proj.weight (1), after the 2 layers of the configuration"),  # noqa: E501
        (in_layers("mlp.up_proj.weight_scale", [2]) | in_layers("eh_proj.weight", [2]), "2 {}model.layers.2.* (2), multi-token prediction"),  # noqa: E501
        ({"mtp.layers.0.mlp.up_proj.bias": ONE, "mtp.fc.weight": ONE}, "2 {}mtp.* (2), multi-token prediction"),
        ({"model.visual.blocks.0.attn.qkv.bias": ONE, "model.visual.blocks.1.attn.qkv.weight_scale": ONE}, "2 {}model.visual.* (2), for images, only text is supported"),  # noqa: E501
        ({"vision_tower.a.3.weight": ONE, "vision_tower.b.weight": ONE, "multi_modal_projector.linear_1.bias": ONE}, "3 {}multi_modal_projector.linear_1.bias (1), for images, only text is supported; vision_tower.* (2), for images, only text is supported"),  # noqa: E501
        ({"audio_tower.conv1.weight": ONE, "audio_tower.conv2.weight": ONE}, "2 {}audio_tower.* (2), for audio, only text is supported"),  # noqa: E501
        ({"classifier.weight": ONE, "classifier.weight_scale": ONE}, "2 {}classifier.weight (1); classifier.weight_scale (1)"),  # noqa: E501
    ],
)  # fmt: skip
def test_what_is_left_out_is_listed_by_pattern(saved, tmp_path, more, listed, capsys):
    folder, _ = with_more(saved, tmp_path, more)
    line = listed.format(f"tensor{'s' * (len(more) > 1)} that no module reads: ")
    assert main(["plan", "--model", str(folder)]) == 0
    assert line in capsys.readouterr().out.splitlines()
    assert main(["plan", "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [{"code": "weights", "text": line}]


def test_a_line_does_not_grow_without_bounds(saved, tmp_path):
    folder, _ = with_more(saved, tmp_path, {f"model.{letter}.weight": ONE for letter in "abcdefghijkl"})
    (note,) = ktx.plan(folder).notes
    assert note.startswith("12 tensors that no module reads: model.a.weight (1); ") and note.endswith(
        "; and 4 other patterns"
    )


@pytest.mark.parametrize(
    "name",
    [
        "mlp.up_proj.weight_scale",
        "mlp.up_proj.weight_scale_inv2.scale",
        "mlp.up_proj.weight_scale_2",
        "mlp.up_proj.input_scale",
        "mlp.up_proj.activation_scale",
        "mlp.up_proj.scales",
        "mlp.up_proj.qzeros",
        "mlp.up_proj.g_idx",
        "mlp.up_proj.weight_g_idx",
        "mlp.up_proj.pre_quant_scale",
        "mlp.up_proj.weight_zero_point",
        "mlp.up_proj.weight_global_scale",
        "mlp.up_proj.weight.absmax",
        "mlp.up_proj.weight.quant_map",
        "mlp.up_proj.weight.nested_quant_map",
        "mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
        "mlp.up_proj.SCB",
        "mlp.up_proj.codebooks",
        "mlp.up_proj.weight_g",
        "mlp.up_proj.parametrizations.weight.original0",
        "self_attn.k_scale",
        "self_attn.v_proj.v_scale",
        "self_attn.attn.k_scale",
        "self_attn.q_proj.qweight",
        "self_attn.q_proj.lora_A.weight",
        "self_attn.q_proj.lora_B.default.weight",
        "self_attn.q_proj.lora_magnitude_vector",
        "mlp.up_proj.bias",
        "self_attn.o_proj.bias",
        "input_layernorm.bias",
    ],
)
def test_what_changes_the_meaning_of_others_is_refused(saved, tmp_path, name):
    folder, _ = with_more(saved, tmp_path, in_layers(name))
    with pytest.raises(BadFile) as error:
        ktx.load(folder, progress=False)
    assert f"no module reads model.layers.*.{name} (2), " in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "family,name",
    [
        ("qwen3_moe", "mlp.experts.0.up_proj.bias"),
        ("qwen3_moe", "mlp.experts.0.up_proj.input_scale"),
        ("qwen3_moe", "mlp.gate.e_score_correction_bias"),
        ("gpt_oss", "mlp.experts.gate_up_proj_scales"),
        ("gpt_oss", "mlp.experts.gate_up_proj_blocks"),
        ("deepseek_v3", "self_attn.kv_b_proj.weight_scale"),
        ("deepseek_v3", "self_attn.kv_a_layernorm.bias"),
    ],
)
def test_in_blocks_that_read_their_childrens_weights_too(saved, tmp_path, family, name):
    folder, _ = with_more(saved, tmp_path, in_layers(name, [1]), family)
    with pytest.raises(BadFile, match=rf"no module reads model.layers.1.{name} \(1\), "):
        ktx.plan(folder).check()


def test_an_adapter_in_the_folder_is_no_part_of_the_model(saved, tmp_path):
    folder, _ = with_more(saved, tmp_path, {})
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ONE}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(BadFile, match="lora_A of an adapter, which must be merged into its model first"):
        ktx.plan(folder).check()


@pytest.mark.parametrize(
    "name,said",
    [
        ("blk.0.ffn_up.bias", "no module reads blk.0.ffn_up.bias .1., a bias that its module does not add"),
        ("blk.0.ffn_up.scale", "no module reads blk.0.ffn_up.scale .1., which changes the meaning of other weights"),
    ],
)
def test_a_gguf_is_accounted_for_too(tmp_path, name, said):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "m.gguf", model, "F32", extra=lambda w: w.add_tensor(name, ONE.numpy()))
    with pytest.raises(BadFile, match=said):
        ktx.plan(tmp_path).check()


def test_an_unknown_tensor_of_a_gguf_is_listed(tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    more = lambda w: [w.add_tensor(f"blk.{i}.made_up.weight", ONE.numpy()) for i in range(2)]  # noqa: E731
    write_gguf(tmp_path / "m.gguf", model, "F32", extra=more)
    assert ktx.plan(tmp_path).notes == ["2 tensors that no module reads: blk.*.made_up.weight (2)"]
