"""from_pretrained of transformers with a KtxConfig: the model of ktx.load, and every argument heeded or refused."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    QuantoConfig,
    Qwen3MoeForCausalLM,
    modeling_utils,
    pipeline,
)
from transformers.quantizers import AutoHfQuantizer

import ktx
import ktx.demo
from ktx import KtxConfig
from ktx.errors import BadFile, KtxError, UsageError
from ktx.integrations.from_pretrained import REQUIRED_LOCALS, UNSUPPORTED_ARGUMENTS
from tests.families.test_families import IDS, load, relative
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny
from tests.weights.test_located import TIES, composite

PROMPT = IDS[:, :20]
SOURCE = textwrap.dedent(inspect.getsource(inspect.unwrap(PreTrainedModel.from_pretrained.__func__)))
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
    *("tqdm_class", "output_loading_info", "_from_pipeline", "_from_auto", "dtype", "torch_dtype"),
    *("device_map", "quantization_config", "subfolder", "_commit_hash", "adapter_kwargs", "adapter_name"),
    *("generation_config", "trust_remote_code", "attn_implementation", "experts_implementation"),
    "weights_only",  # of pickles, which are not read
}
NOTHING = {"mirror", "_fast_init", "low_cpu_mem_usage", "from_tf", "from_flax", "offload_state_dict", "gguf_file"}


def answer(model):
    with torch.no_grad():
        return model(PROMPT).logits


def quiet(**words):
    return KtxConfig(progress=False, kv_dtype="f32", **words)


def loaded(folder, *, words=None, **more):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quiet(**(words or {})), **more)


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
    words = {"rules": tmp_path / "rules.yaml", "quantize": "int8"}
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
    right = load(floats, None, kv_dtype="f32", num_experts_per_tok=1)
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
        {"code_revision": "v2"},
        {"proxies": {"https": "localhost"}},
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


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "nobody's"])
def test_a_configuration_that_names_another_quantisation(gguf, tmp_path, method):
    """What the folder says is of its own weights; here a GGUF file counts."""
    config = json.loads((gguf / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = loaded(tmp_path, words={"weights": gguf / "model.gguf"})
    assert torch.equal(answer(model), answer(loaded(gguf))) and not hasattr(model.config, "quantization_config")
    given = {"quant_method": "ktx", "weights": str(gguf / "model.gguf"), "progress": False, "kv_dtype": "f32"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=given)
    assert torch.equal(answer(model), answer(loaded(gguf)))


def test_a_checkpoint_in_blocks_of_fp8(floats, tmp_path):
    """As DeepSeek's; other methods are refused by what ktx.load says of them."""
    state = tiny("qwen3_moe").save_pretrained(tmp_path) or load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if name.endswith("_proj.weight")]:
        made = state.pop(name)
        rows, columns = (-(-size // 128) for size in made.shape)
        state[name] = (made * 100).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = torch.full((rows, columns), 0.01)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    right = load(tmp_path, None, kv_dtype="f32")
    assert {"F8_E4M3"} < {part.qtype.name for part in right.model.layers[0].self_attn.q_proj.parts} | {"F32"}
    for made in (loaded(tmp_path), Qwen3MoeForCausalLM.from_pretrained(tmp_path, quantization_config=quiet())):
        assert torch.equal(answer(made), answer(right)) and relative(answer(made), answer(loaded(floats))) < 0.1
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="gptq"):
        loaded(tmp_path)


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
    tree = ast.parse(SOURCE)
    popped = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "pop" and node.args
        if getattr(node.func.value, "id", "") == "kwargs" and isinstance(node.args[0], ast.Constant)
    }
    named = {argument.arg for argument in (*tree.body[0].args.args, *tree.body[0].args.kwonlyargs)} - {"cls"}
    assert {"subfolder", "dtype"} <= popped and popped | named <= {*UNSUPPORTED_ARGUMENTS, *HEEDED, *NOTHING}


def without(name):
    """A from_pretrained as another version of transformers might have it, without one of its variables."""
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == name:
            node.id = "renamed"
        if isinstance(node, ast.arg) and node.arg == name:
            node.arg = "renamed"
    tree.body[0].decorator_list = []
    space = modeling_utils.__dict__.copy()
    exec(compile(tree, "another", "exec"), space)
    return classmethod(space["from_pretrained"])


@pytest.mark.parametrize("name", ["subfolder", "dtype", "trust_remote_code", "generation_config", "cache_dir", "cls"])
def test_a_version_without_what_is_read_is_said(floats, monkeypatch, name):
    assert name in REQUIRED_LOCALS
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", without("nothing of it"))
    assert torch.equal(answer(loaded(floats)), answer(load(floats, None, kv_dtype="f32")))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", without(name))
    with pytest.raises(
        KtxError, match=rf"has no {name}, which KtxConfig reads; use ktx.load, or pip install 'transformers>"
    ):
        loaded(floats)


def test_outside_of_from_pretrained():
    with pytest.raises(UsageError, match="KtxConfig is an argument of from_pretrained"):
        AutoHfQuantizer.from_config(KtxConfig(), pre_quantized=False)


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification", "own"])
def test_other_classes_are_refused_by_name(floats, kind):
    made = type("OwnForCausalLM", (Qwen3MoeForCausalLM,), {}) if kind == "own" else getattr(transformers, kind)
    with pytest.raises(
        UsageError, match="KtxConfig loads a Qwen3MoeForCausalLM for this configuration, not a .*call Auto"
    ):
        made.from_pretrained(floats, quantization_config=quiet())


def test_explicit_classes_and_pipelines(floats, gguf):
    right = answer(load(floats, None, kv_dtype="f32"))
    assert torch.equal(answer(Qwen3MoeForCausalLM.from_pretrained(floats, quantization_config=quiet())), right)

    def piped(task, folder, **more):
        options = {"quantization_config": quiet()}
        return pipeline(task, str(folder), tokenizer=tokenizer(), model_kwargs=options, **more).model

    assert torch.equal(answer(piped("text-generation", floats)), right)
    made = piped("text-generation", gguf, device_map="auto", dtype=torch.bfloat16)
    assert torch.equal(answer(made), answer(load(gguf, gguf / "model.gguf", kv_dtype="f32", dtype=torch.bfloat16)))
    with pytest.raises(UsageError, match="not a Qwen3MoeModel"):
        piped("feature-extraction", floats)


@pytest.mark.parametrize("top, part, tied", TIES)
def test_the_text_of_a_composite_model(tmp_path, top, part, tied):
    """AutoModel hands over the text's configuration alone; what the whole says of the output layer counts as in
    ktx.load.
    """
    model = composite("qwen3_5", tmp_path, top, part, tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that no module reads
        made = loaded(tmp_path)
    assert relative(answer(made), model(PROMPT).logits) < 1e-4
    with pytest.raises(UsageError, match="KtxConfig loads a Qwen3_5ForCausalLM"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=quiet())


def test_a_model_of_pictures_without_a_language_model_by_itself(tmp_path):
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no built-in language model for model_type llava"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=quiet())


CODE = """
from transformers import Qwen3MoeForCausalLM

class OwnForCausalLM(Qwen3MoeForCausalLM):
    said = "by its code"
"""


def test_code_in_the_folder(floats, tmp_path):
    shutil.copytree(floats, tmp_path / "code")
    config = json.loads((floats / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "code/config.json").write_text(json.dumps(config))
    (tmp_path / "code/modeling_own.py").write_text(CODE)
    made = loaded(tmp_path / "code", trust_remote_code=True)
    assert type(made).__name__ == "OwnForCausalLM" and made.said == "by its code"
    usual = loaded(tmp_path / "code", trust_remote_code=False)
    assert type(usual).__name__ == "Qwen3MoeForCausalLM" and torch.equal(answer(made), answer(usual))


@pytest.mark.parametrize("wish", [torch.float64, "float64"])
def test_a_type_that_nothing_is_computed_in(floats, wish):
    with pytest.raises(UsageError, match=r"dtype torch.float64: ktx computes in torch.float32, "):
        loaded(floats, dtype=wish)


def test_the_name_is_imported_when_it_is_asked_for():
    code = "import ktx, sys; assert 'torch' not in sys.modules; ktx.KtxConfig; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def packed(floats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    load(floats, None, quantize="int8").save_pretrained(folder, packed=True, progress=False)
    return folder


def test_a_packed_folder_says_by_itself_what_reads_it(packed):
    right = load(packed, None)
    for kind in (AutoModelForCausalLM, Qwen3MoeForCausalLM):
        assert torch.equal(answer(kind.from_pretrained(packed)), answer(right))
    made = pipeline("text-generation", str(packed), tokenizer=tokenizer()).model
    assert torch.equal(answer(made), answer(right)) and made.ktx.weights == right.ktx.weights


def test_options_of_a_packed_folder_count(packed, floats):
    """Those that are given, and not the two words in its configuration; and nothing warns of the contrary."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = loaded(packed, words={"num_experts_per_tok": 1})
    assert torch.equal(answer(made), answer(load(packed, None, kv_dtype="f32", num_experts_per_tok=1)))
    assert made.ktx.kv_dtype is torch.float32 or made.ktx.kv_dtype == "f32"
    made = loaded(packed, words={"weights": floats})
    assert torch.equal(answer(made), answer(loaded(floats)))
    with pytest.raises(ValueError, match="QuantoConfig"):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config=QuantoConfig(weights="int8"))


SEEN = """
import {first}
from transformers import AutoModelForCausalLM
{then}
print(hasattr(AutoModelForCausalLM.from_pretrained({folder!r}), "ktx"))
"""


@pytest.mark.parametrize("first, then", [("ktx", ""), ("torch", "import ktx"), ("torch", "")])
def test_what_a_user_sees_of_a_packed_folder(packed, first, then):
    """`import ktx` suffices; without it transformers names what it does not know, and ends in an error."""
    code = SEEN.format(first=first, then=then, folder=str(packed))
    env = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}  # commands set it
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if "ktx" in (first, then.rpartition(" ")[2]):
        assert done.stdout == "True\n", done.stderr
    else:
        assert done.returncode and not done.stdout
        assert "Unknown quantization type, got ktx" in done.stderr and "mismatch" in done.stderr


def test_a_saved_model_comes_back(gguf, tmp_path):
    made = loaded(gguf)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again, "ktx") and relative(answer(again), answer(made)) < 0.05
    assert torch.equal(answer(loaded(tmp_path)), answer(load(tmp_path, None, kv_dtype="f32")))


def test_push_to_hub_writes_what_save_pretrained_writes(floats, tmp_path, monkeypatch):
    made = loaded(floats)
    api = SimpleNamespace(create_repo=lambda *args, **more: SimpleNamespace(repo_id="me/mine"))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **more: card)
    monkeypatch.setattr(
        made, "_upload_modified_files", lambda folder, *args, **more: shutil.copytree(folder, tmp_path / "sent")
    )
    made.push_to_hub("me/mine")
    assert torch.equal(answer(loaded(tmp_path / "sent")), answer(made))
    with pytest.raises(UsageError, match="push_to_hub"):
        made.save_pretrained(tmp_path / "other", push_to_hub=True)
