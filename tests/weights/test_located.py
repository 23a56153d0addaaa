"""A model by its hub id is what the same files are in a folder: one revision, with settings, template and tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import ktx
from ktx.errors import BadFile
from tests.families.test_families import IDS, logits, relative
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import LINEAR, MOE, tiny

SETTINGS = {"eos_token_id": [2, 5, 6], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 17}
SHA = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub's with two revisions of org/name, without a network; a function that gives a revision's
    folder.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / "models--org--name"
    (root / "refs").mkdir(parents=True)
    folder = tmp_path / "made"
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} by the file")
    for revision, sha in SHA.items():
        (folder / "generation_config.json").write_text(
            json.dumps(SETTINGS | {"top_k": 17 if revision == "main" else 3})
        )
        shutil.copytree(folder, root / "snapshots" / sha)
        (root / "refs" / revision).write_text(sha)
    return lambda revision="main": root / "snapshots" / SHA[revision]


def settings(model):
    found = model.generation_config
    return {name: getattr(found, name) for name in SETTINGS}


def test_settings_and_template_come_along(hub):
    by_folder, its_tokenizer = ktx.load(hub(), progress=False)
    by_id, mine = ktx.load("org/name", progress=False)
    assert settings(by_id) == settings(by_folder) == SETTINGS
    assert torch.equal(logits(by_id), logits(by_folder))
    assert mine.chat_template == its_tokenizer.chat_template == "{{ messages[0].content }} by the file"
    assert mine.eos_token == its_tokenizer.eos_token and len(mine) == len(its_tokenizer)


def test_a_revision_is_one_of_everything(hub):
    (hub("v2") / "chat_template.jinja").write_text("another")
    for revision in ("v2", SHA["v2"]):
        model, mine = ktx.load(f"org/name@{revision}", progress=False)
        assert settings(model)["top_k"] == 3 and mine.chat_template == "another"
        assert model.ktx.weights == str(hub("v2"))


def test_only_weights_are_elsewhere(hub, tmp_path):
    """Configuration, settings and tokenizer by the id, weights from a GGUF; the cache holds no safetensors."""
    (hub() / "model.safetensors").unlink()
    model = tiny("llama")
    write_gguf(tmp_path / "m.gguf", model, "F32")
    loaded, mine = ktx.load("org/name", tmp_path / "m.gguf", progress=False)
    assert settings(loaded) == SETTINGS and mine.chat_template.endswith("by the file")
    assert relative(logits(loaded), logits(model)) < 1e-4


def test_a_plan_by_the_id_reads_what_is_beside_the_weights(hub):
    assert str(ktx.plan("org/name")) == str(ktx.plan(hub()))
    (hub() / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(BadFile, match="hf_quant_config.json: quant_method modelopt"):
        ktx.plan("org/name")


def test_without_such_a_file_there_is_what_the_configuration_says(hub):
    (hub() / "generation_config.json").unlink()
    assert ktx.load("org/name", progress=False)[0].generation_config.eos_token_id == 2


@pytest.mark.parametrize("name", ["org/other", "org/name@v3", "org", "org/name@"])
def test_what_is_not_in_the_cache_is_said(hub, name):
    if name == "org/name@":  # no revision is named: the newest
        assert ktx.plan(name).notes == []
        return
    with pytest.raises(BadFile, match=f"{name}: is no folder and cannot be fetched from the hub.*ktx download"):
        ktx.load(name, progress=False)


@pytest.mark.parametrize("name", ["/no/such", "./no", "~/no/such", "a/b/c"])
def test_a_path_is_no_hub_id(name):
    with pytest.raises(BadFile, match=f"{name}: no such folder"):
        ktx.load(name, progress=False)


# ---- composite models

VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 256}
COMPOSITE = {
    "qwen3_5": LINEAR | {"head_dim": 64},
    "qwen3_5_moe": LINEAR | MOE | {"shared_expert_intermediate_size": 128},
}
TIES = [  # what the top says, what the text's part says (None: nothing), and whether the output layer is the embedding
    (True, None, True),
    (True, False, True),
    (True, True, True),
    (False, None, False),
    (None, None, False),
    (False, False, False),
    (None, True, True),  # nothing at the top and no matrix in the file
    (False, True, True),
]


def composite(family, folder, top, part, tied):
    """A checkpoint of text and pictures as `save_pretrained` writes it, but for what it says of ties."""
    text = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 320, "vocab_size": 320, "max_position_embeddings": 512} | COMPOSITE[family]
    vision = VISION | {"patch_size": 4, "num_position_embeddings": 16}
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name and not name.endswith(("A_log", "dt_bias")):
                p.copy_(torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
    model.tie_weights()
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    for of, says in ((raw, top), (raw["text_config"], part)):
        of.pop("tie_word_embeddings", None)
        of |= {} if says is None else {"tie_word_embeddings": says}
    (folder / "config.json").write_text(json.dumps(raw))
    return model


@pytest.mark.parametrize("top,part,tied", TIES)
@pytest.mark.parametrize("family", COMPOSITE)
def test_an_output_layer_is_tied_where_the_top_says_so(tmp_path, monkeypatch, family, top, part, tied):
    monkeypatch.setattr("ktx.loader.load.read_tokenizer", lambda *args, **kwargs: None)
    model = composite(family, tmp_path, top, part, tied)
    with pytest.warns(UserWarning, match=r"21 tensors that no module reads: model.visual.\* \(21\), for images"):
        loaded = ktx.load(tmp_path, progress=False)[0]
    assert loaded.config.tie_word_embeddings == bool(top or part)
    with torch.inference_mode():
        assert relative(logits(loaded), model(IDS).logits) < 1e-4


@pytest.mark.parametrize("top", [True, False])
def test_a_matrix_in_the_file_counts(tmp_path, monkeypatch, top):
    """As transformers, which does not tie what a checkpoint holds twice with different values."""
    monkeypatch.setattr("ktx.loader.load.read_tokenizer", lambda *args, **kwargs: None)
    model = composite("qwen3_5", tmp_path, top, None, False)
    right = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(right(IDS).logits, model(IDS).logits)
        assert relative(logits(ktx.load(tmp_path, progress=False)[0]), model(IDS).logits) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_tied_matrix_may_have_the_output_layers_name(tmp_path, monkeypatch, family):
    monkeypatch.setattr("ktx.loader.load.read_tokenizer", lambda *args, **kwargs: None)
    model = tiny(family, tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "model.embed_tokens.weight"}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    right = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    loaded = ktx.load(tmp_path, progress=False)[0]
    assert loaded.ktx.plan.notes == []
    assert relative(logits(loaded), logits(right)) < 1e-4


@pytest.mark.parametrize("family", ["mistral3", "qwen2_5_vl", "llava"])
def test_a_composite_model_without_a_language_model_by_itself_is_refused(tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(
        BadFile, match=f"{tmp_path}: transformers has no built-in language model for model_type {family}"
    ):
        ktx.plan(tmp_path)
