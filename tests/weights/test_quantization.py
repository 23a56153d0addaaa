"""What a checkpoint says of its quantisation: computed where every key is what we compute, refused by name
otherwise.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import ktx
import ktx.loader.load
from ktx.__main__ import main
from ktx.errors import BadFile
from ktx.kernels.check import multiplies_in_bf16
from ktx.quant.types import expand_scale
from ktx.weights.quantization import SCHEMES, UNSUPPORTED_METHODS, check_quantization
from tests.families.test_families import IDS, logits, relative
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(ktx.loader.load, "read_tokenizer", lambda *args, **kwargs: None)


def said(folder, config=None, **files):
    """Puts a quantization_config, or other keys, into a folder's config.json, and files beside it."""
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(raw | (config or {})))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def plain(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A folder of block FP8 as transformers and DeepSeek write it, and the model whose numbers it holds."""
    folder, model, tensors = tmp_path_factory.mktemp("fp8"), tiny("llama", intermediate_size=300), {}
    model.config.save_pretrained(folder)
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            scale = torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)) * 0.01 + 0.005
            spread = expand_scale(scale, *tensor.shape)
            tensors[name], tensors[f"{name}_scale_inv"] = (tensor / spread).to(torch.float8_e4m3fn), scale
            tensor.copy_(tensors[name].float() * spread)
        else:
            tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors")
    return folder, model, tensors


CONFIGS = {  # as each method's own tools write it
    "gptq": {"bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
    "fbgemm_fp8": {"activation_scale_ub": 1200.0},
    "mxfp4": {"modules_to_not_convert": ["lm_head"]},
    "torchao": {"quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
    "quanto": {"weights": "int8"},
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4}}},
    "aqlm": {"in_group_size": 8, "num_codebooks": 1},
    "vptq": {"config_for_layers": {}},
    "higgs": {"bits": 4, "p": 2},
    "spqr": {"bits": 3, "beta1": 16},
    "eetq": {"weights": "int8"},
    "auto-round": {"bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq"},
    "modelopt": {"quant_algo": "NVFP4"},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_methods_that_are_not_computed_are_refused_by_name(plain, method):
    said(plain, {"quantization_config": {"quant_method": method} | CONFIGS[method]})
    first = next(iter(CONFIGS[method]))
    with pytest.raises(BadFile) as error:
        ktx.load(plain, progress=False)
    words = (str(plain / "config.json"), f"quant_method {method} ", f"{first} ", "ktx supports fp8", "GGUF")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_method_of_transformers_is_computed_or_refused():
    """Also those that a newer version adds: by name, as unknown."""
    assert not {*UNSUPPORTED_METHODS} & {*SCHEMES}
    theirs = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    for method in theirs - {*SCHEMES}:
        with pytest.raises(BadFile, match=f"config.json: quantization_config: quant_method .?{method}.? "):
            check_quantization({"quantization_config": {"quant_method": method}}, "config.json")


@pytest.mark.parametrize(
    "config,words",
    [
        ({"quantization_config": {"quant_method": "brand_new", "bits": 3}}, '"brand_new" is unknown.*bits 3'),
        ({"quantization_config": {"quant_method": "gptqq"}}, "did you mean 'gptq'"),
        ({"quantization_config": {"quant_method": 8}}, "quant_method 8 is unknown"),
        ({"quantization_config": {"bits": 4}}, "quant_method is missing"),
        ({"quantization_config": {"load_in_8bit": True}}, "quant_method bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "config.json: quantization: quant_method is missing"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config: .*compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "text_config.quantization_config: .*AWQ"),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, 'fp8 with fmt "e5m2", not "e4m3"'),
        ({"quantization_config": FP8 | {"weight_block_size": [64, 128]}}, r"weight_block_size \[64, 128\], not \[128"),
        ({"quantization_config": FP8 | {"weight_block_size": None}}, "weight_block_size null"),
        ({"quantization_config": FP8 | {"weight_block_size": 128}}, "weight_block_size 128"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, 'activation_scheme "static", not "dynamic"'),
        ({"quantization_config": FP8 | {"scale_fmt": "e3m4"}}, "scale_fmt"),
        ({"quantization_config": FP8 | {"expert_dtype": "fp4"}}, "expert_dtype"),
        ({"quantization_config": FP8 | {"kv_cache_scheme": {"num_bits": 8}}}, "kv_cache_scheme"),
        ({"quantization_config": FP8 | {"modules_to_convert": ["model.embed_tokens"]}}, "modules_to_convert"),
        ({"quantization_config": FP8 | {"modules_to_not_convert": "lm_head"}}, "not a list of modules"),
        ({"quantization_config": FP8 | {"dequantize": 1}}, "dequantize 1"),
        (
            {"quantization_config": FP8 | {"weight_blok_size": [1, 1]}},
            "an unknown parameter .did you mean 'weight_block_size'",
        ),
        (
            {"quantization_config": FP8 | {"rotation": True}},
            "fp8 with rotation true, an unknown parameter",
        ),
    ],
)
def test_a_parameter_that_says_something_else_is_refused(plain, config, words):
    with pytest.raises(BadFile, match=words):
        ktx.plan(said(plain, config))


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("hf_quant_config", {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, "modelopt.*FP8"),
        ("hf_quant_config", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, "modelopt"),
        ("hf_quant_config", {"quantization": "NVFP4"}, "modelopt.*NVFP4"),
        ("quantize_config", {"bits": 4, "group_size": 128, "desc_act": True}, "gptq.*desc_act true"),
        ("quant_config", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq.*w_bit 4"),
        ("quantize_config", [4], "contains list"),
    ],
)
def test_files_of_their_own(plain, name, content, words):
    with pytest.raises(BadFile, match=rf"{name}.json: .*{words}"):
        ktx.plan(said(plain, **{name: content}))


def test_files_that_quantise_nothing(plain):
    nothing = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}
    assert ktx.plan(said(plain, {"quantization_config": None}, hf_quant_config=nothing)).notes == []
    (plain / "hf_quant_config.json").write_text("{")
    with pytest.raises(BadFile, match="hf_quant_config.json: is not valid JSON"):
        ktx.plan(plain)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"scale_fmt": "ue8m0"},  # DeepSeek-V3.1, whose scales are floats all the same
        {"modules_to_not_convert": ["lm_head"], "ignored_layers": None, "dequantize": False},
    ],
)
def test_block_fp8_is_computed(fp8, more, capsys):
    folder, model, _ = fp8
    said(folder, {"quantization_config": FP8 | more})
    loaded = ktx.load(folder, progress=False)[0]
    assert relative(logits(loaded), logits(model)) < (1e-2 if multiplies_in_bf16() else 1e-4)
    assert main(["plan", "--model", str(folder)]) == 0
    assert (
        f"quantized: fp8, e4m3 with one scale per 128 x 128 weights ({folder / 'config.json'}"
        in capsys.readouterr().out
    )
    assert main(["plan", "--model", str(folder), "--json"]) == 0
    assert "quantized: fp8" in json.loads(capsys.readouterr().out)["notes"][0]["text"]


NAME = "model.layers.0.mlp.up_proj.weight"  # 300 x 256


@pytest.mark.parametrize(
    "change,words",
    [
        ({f"{NAME}_scale_inv": None}, f"{NAME} is F8_E4M3 but {NAME}_scale_inv is missing"),
        ({f"{NAME}_scale_inv": None, f"{NAME}_scale": torch.ones(1)}, f"no module reads {NAME}_scale"),
        ({f"{NAME}_scale_inv": torch.ones(())}, "is 300 x 256 of F8_E4M3, but .*scale_inv is a scalar"),
        ({f"{NAME}_scale_inv": torch.ones(300, 1)}, "is 300 x 1; ktx reads"),
        ({f"{NAME}_scale_inv": torch.ones(5, 4)}, "is 5 x 4; ktx reads"),  # blocks of 64
        ({f"{NAME}_scale_inv": torch.ones(3, 2).to(torch.float8_e8m0fnu)}, "of F8_E8M0"),
        ({"model.norm.weight": torch.ones(256).to(torch.float8_e4m3fn)}, "model.norm.weight is F8_E4M3 but"),
        ({NAME: torch.ones(300, 256).to(torch.float8_e5m2)}, "up_proj.weight is F8_E5M2"),
    ],
)
def test_scales_of_another_form_are_refused_before_loading(fp8, tmp_path, change, words):
    folder, _, tensors = fp8
    said(folder, {"quantization_config": FP8})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({k: v for k, v in (tensors | change).items() if v is not None}, tmp_path / "model.safetensors")
    with pytest.raises(BadFile, match=words):
        ktx.plan(tmp_path).check()


def test_a_gguf_beside_such_a_configuration_is_read(plain):
    model = tiny("llama")
    (plain / "model.safetensors").unlink()
    write_gguf(plain / "m.gguf", model, "F32")
    said(plain, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert relative(logits(ktx.load(plain, progress=False)[0]), logits(model)) < 1e-4


def test_weights_from_another_folder_bring_their_own_configuration(plain, tmp_path_factory):
    other = tmp_path_factory.mktemp("weights")
    tiny("llama").save_pretrained(other)
    said(other, {"quantization_config": {"quant_method": "awq", "bits": 4}})
    for weights in (other, other / "model.safetensors"):
        with pytest.raises(BadFile, match=f"{other / 'config.json'}.*AWQ"):
            ktx.plan(plain, weights)
    with torch.inference_mode():
        assert ktx.load(plain, progress=False)[0](IDS).logits.isfinite().all()
