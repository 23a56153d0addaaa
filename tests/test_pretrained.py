"""from_pretrained of transformers with a KtxConfig: the model of ktx.load, and every argument heeded or refused."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import ktx
import ktx.demo
from ktx import KtxConfig
from ktx.errors import BadFile, UsageError
from ktx.pretrained import REFUSED
from tests.gguf_writer import write_gguf
from tests.models.families import tiny
from tests.models.test_families import IDS, load, relative

PROMPT = IDS[:, :20]
HEEDED = {  # by ktx, or by transformers before it shows the quantiser anything
    *(
        "pretrained_model_name_or_path",
        "config",
        "cache_dir",
        "force_download",
        "local_files_only",
        "token",
        "revision",
    ),
    *("proxies", "tqdm_class", "output_loading_info", "_from_pipeline", "_from_auto", "dtype", "torch_dtype"),
    *("device_map", "quantization_config", "subfolder", "_commit_hash", "adapter_kwargs", "adapter_name"),
    *("generation_config", "trust_remote_code", "attn_implementation", "experts_implementation"),
    "weights_only",  # of pickles, which are not read
}
NOTHING = {"mirror", "_fast_init", "low_cpu_mem_usage", "from_tf", "from_flax", "offload_state_dict", "gguf_file"}


def answer(model):
    with torch.no_grad():
        return model(PROMPT).logits


def loaded(folder, *, words=None, **more):
    config = KtxConfig(progress=False, kv_dtype="f32", **(words or {}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **more)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def gguf(request, tmp_path_factory):
    """A folder with a configuration and a GGUF file."""
    folder = tmp_path_factory.mktemp(request.param)
    made = tiny(request.param)
    made.config.save_pretrained(folder)
    write_gguf(folder / "model.gguf", made, "Q8_0")
    return folder


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    tiny("qwen3_moe").save_pretrained(folder)
    return folder


def test_a_folder_without_safetensors(gguf):
    right = load(gguf, gguf / "model.gguf", kv_dtype="f32")
    for words in ({}, {"weights": gguf / "model.gguf"}, {"weights": str(gguf)}):
        model = loaded(gguf, words=words)
        assert torch.equal(answer(model), answer(right)) and type(model) is type(right)
        assert model.ktx.model() is model and not model.training and "hf_quantizer" not in model.__dict__
        assert model.config.to_dict() == right.config.to_dict()
        assert model.generation_config.to_dict() == right.generation_config.to_dict()


def test_generate_answers_as_the_model_of_load(gguf):
    models = loaded(gguf), load(gguf, gguf / "model.gguf", kv_dtype="f32")
    mine, theirs = (model.generate(PROMPT, max_new_tokens=6, do_sample=False) for model in models)
    assert torch.equal(mine, theirs)


def test_a_folder_with_safetensors(floats, gguf):
    assert torch.equal(answer(loaded(floats)), answer(load(floats, None, kv_dtype="f32")))
    if "qwen3_moe" in gguf.name:  # the file that is named counts, not the one beside the configuration
        words = {"weights": gguf / "model.gguf"}
        assert torch.equal(answer(loaded(floats, words=words)), answer(load(gguf, gguf / "model.gguf", kv_dtype="f32")))


def test_rules_and_options_are_those_of_load(floats, tmp_path):
    (tmp_path / "rules.yaml").write_text("- match: {class: torch.nn.Linear}\n  replace: {class: Linear}\n")
    words = {"rules": tmp_path / "rules.yaml", "weight_dtype": "int8"}
    model, right = loaded(floats, words=words), load(floats, None, kv_dtype="f32", **words)
    assert torch.equal(answer(model), answer(right)) and str(model.ktx.plan) == str(right.ktx.plan)
    own = inspect.signature(ktx.load).parameters
    fields = {of.name: of.default for of in dataclasses.fields(KtxConfig) if of.init}
    elsewhere = {
        "model",
        "dtype",
        "trust_remote_code",
        "attn_implementation",
        "config",
        "tokenizer",
    }  # from_pretrained's own
    assert fields == {name: own[name].default for name in own if name not in elsewhere}


def test_a_configuration_may_be_a_dictionary_and_becomes_json(floats):
    rules = [ktx.Rule(cls="torch.nn.Linear", replace="Linear")]
    made = json.loads(KtxConfig(floats, rules, kv_dtype=torch.float16, devices={"all": "cpu"}).to_json_string())
    assert made["weights"] == str(floats) and made["devices"] == {"all": "cpu"} and made["kv_dtype"] == "torch.float16"
    given = {"quant_method": "ktx", "progress": False, "kv_dtype": "f32"}
    model = AutoModelForCausalLM.from_pretrained(floats, quantization_config=given)
    assert torch.equal(answer(model), answer(loaded(floats)))
    with pytest.raises(TypeError, match="weight"):
        KtxConfig(weight="model.gguf")


@pytest.mark.parametrize("name, wish", [("dtype", torch.bfloat16), ("torch_dtype", "bfloat16"), ("dtype", "auto")])
def test_dtype(floats, name, wish):
    kind = None if wish == "auto" else torch.bfloat16
    model, right = loaded(floats, **{name: wish}), load(floats, None, kv_dtype="f32", dtype=kind)
    assert model.dtype is right.dtype and torch.equal(answer(model), answer(right))


def test_attention_and_experts(floats):
    model = loaded(floats, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert len(model(PROMPT, output_attentions=True).attentions) == 2
    assert torch.equal(answer(loaded(floats, experts_implementation="ktx")), answer(loaded(floats)))
    with pytest.raises(UsageError, match="experts_implementation='eager'"):
        loaded(floats, experts_implementation="eager")
    with pytest.raises(ValueError, match="nonsense"):
        loaded(floats, attn_implementation="nonsense")


def test_a_configuration_and_its_settings_count(floats):
    config = AutoConfig.from_pretrained(floats)
    config.num_experts_per_tok = 1
    right = load(floats, None, kv_dtype="f32", moe_experts=1)
    assert torch.equal(answer(loaded(floats, config=config)), answer(right))
    assert torch.equal(answer(loaded(floats, num_experts_per_tok=1)), answer(right))
    assert not torch.equal(answer(loaded(floats)), answer(right))


def test_other_arguments_that_are_heeded(floats, tmp_path):
    right = answer(loaded(floats))
    (tmp_path / "below").symlink_to(floats)
    assert torch.equal(answer(loaded(tmp_path, subfolder="below")), right)
    for wish in ("cpu", {"": "cpu"}, "auto", torch.device("cpu")):
        assert torch.equal(answer(loaded(floats, device_map=wish)), right)
    model, info = loaded(floats, output_loading_info=True)
    assert torch.equal(answer(model), right) and not any(info.values())
    settings = GenerationConfig(max_new_tokens=3, eos_token_id=None)
    model = loaded(floats, generation_config=settings, low_cpu_mem_usage=True)
    assert model.generation_config.max_new_tokens == 3 and model.generation_config.disable_compile


@pytest.mark.parametrize(
    "more",
    [
        {"variant": "fp16"},
        {"use_safetensors": False},
        {"ignore_mismatched_sizes": True},
        {"max_memory": {"cpu": "1GB"}},
        {"offload_folder": "."},
        {"use_kernels": True},
        {"key_mapping": {"a": "b"}},
        {"disable_mmap": True},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
        {"dtype": {"": "float16"}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_arguments_that_are_refused_by_name(floats, more):
    with pytest.raises(UsageError, match=next(iter(more))):
        loaded(floats, **more)


def test_errors_name_what_is_wrong(floats, tmp_path):
    with pytest.raises(TypeError, match="nonsense"):
        loaded(floats, nonsense=1)
    with pytest.raises(UsageError, match="device"):
        loaded(floats, words={"device": "cpu"}, device_map="cpu")
    with pytest.raises(UsageError, match="AutoModelForCausalLM"):
        AutoModel.from_pretrained(floats, quantization_config=KtxConfig())
    with pytest.raises(BadFile, match=r"none\.gguf"):
        loaded(floats, words={"weights": tmp_path / "none.gguf"})
    AutoConfig.from_pretrained(floats).save_pretrained(tmp_path)
    with pytest.raises(BadFile):
        loaded(tmp_path)


def test_a_configuration_that_names_another_quantisation(gguf, tmp_path):
    """transformers refuses that by itself; without it the GGUF file counts."""
    config = json.loads((gguf / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = {"weights": gguf / "model.gguf"}
    with pytest.raises(ValueError, match="KtxConfig"):
        loaded(tmp_path, words=words)
    config = AutoConfig.from_pretrained(tmp_path)
    del config.quantization_config
    assert torch.equal(answer(loaded(tmp_path, words=words, config=config)), answer(loaded(gguf)))


def test_an_adapter_in_the_folder(floats, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    own = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    right = get_peft_model(AutoModelForCausalLM.from_pretrained(floats), own).eval()
    right.save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert list(model.peft_config) == ["default"]
    assert relative(answer(model), answer(right)) < 1e-4 < relative(answer(loaded(floats)), answer(right))


def test_every_argument_of_from_pretrained_is_known():
    """A version with another one fails here before it drops that without a word."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(PreTrainedModel.from_pretrained.__func__))))
    popped = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "pop" and node.args
        if getattr(node.func.value, "id", "") == "kwargs" and isinstance(node.args[0], ast.Constant)
    }
    named = {argument.arg for argument in (*tree.body[0].args.args, *tree.body[0].args.kwonlyargs)} - {"cls"}
    assert {"subfolder", "dtype"} <= popped and popped | named <= {*REFUSED, *HEEDED, *NOTHING}


def test_the_name_is_imported_when_it_is_asked_for():
    code = "import ktx, sys; assert 'torch' not in sys.modules; ktx.KtxConfig; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_packed_folder_says_by_itself_what_reads_it(floats, tmp_path):
    load(floats, None, weight_dtype="int8").save_pretrained(tmp_path, packed=True, progress=False)
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(tmp_path)), answer(load(tmp_path, None)))
