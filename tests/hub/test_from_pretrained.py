"""transformers' from_pretrained takes a hub id with a KtxConfig.

The id's files come as transformers fetches them, and no other.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline

import ktx
from ktx import KtxConfig
from ktx.errors import BadFile, KtxError, UsageError
from tests.families.test_families import logits, relative
from tests.hub.fake import COMMIT, Repo, asked_in_process, hub
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny

CODE = """
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    said = {said!r}
"""


def files_of(folder, below=""):
    return {f"{below}{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer and settings, in two files of weights."""
    made = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(made, max_shard_size="2MB")
    tokenizer().save_pretrained(made)
    (made / "generation_config.json").write_text(json.dumps({"top_k": 17, "do_sample": True}))
    assert len(list(made.glob("*.safetensors"))) > 1
    return made


@pytest.fixture
def there(folder, tmp_path, monkeypatch):
    """A hub without a network beyond this machine, whose cache is `tmp_path / "hub"`."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with hub() as found:
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which keeps the address of a hub
        asked_in_process(found, tmp_path, monkeypatch)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        pickle = {"pytorch_model.bin": b"pickle" * 1000}
        found.repos = {
            "org/name": Repo(files_of(folder) | pickle | {"original/consolidated.safetensors": b"x" * 5000}),
            "org/private": Repo(files_of(folder), private=True),
            "org/deeper": Repo(files_of(folder, "deeper/") | {"model.safetensors": b"x" * 5000}),
        }
        yield found


def loaded(name, *, words=None, **more):
    return AutoModelForCausalLM.from_pretrained(
        name, quantization_config=KtxConfig(progress=False, **(words or {})), **more
    )


def fetched(hub):
    """Names of the large files that were sent."""
    return {path.rpartition("/")[2] for method, path, _ in hub.seen if method == "GET" and path.startswith("/far/")}


def test_a_hub_id_is_what_its_folder_is(there, folder, tmp_path):
    right = loaded(folder)
    model = loaded("org/name")
    assert torch.equal(logits(model), logits(right)) and model.config.name_or_path == "org/name"
    assert model.generation_config.top_k == 17 and len(model.ktx.tokenizer) == len(right.ktx.tokenizer)
    weights = {path.name for path in folder.glob("*.safetensors")}
    assert weights <= fetched(there) and not fetched(there) & {"pytorch_model.bin", "consolidated.safetensors"}
    assert model.ktx.weights == str(tmp_path / "hub/models--org--name/snapshots" / COMMIT)
    assert not any("ktx.safetensors" in path for _, path, _ in there.seen)
    there.seen.clear()
    assert torch.equal(logits(loaded("org/name", local_files_only=True)), logits(right)) and not fetched(there)
    plain = AutoModelForCausalLM.from_pretrained("org/name")  # transformers' own finds what it always found
    assert relative(logits(plain), logits(right)) < 1e-4


def test_a_revision_without_a_network(there, tmp_path, monkeypatch):
    loaded("org/name")
    root = tmp_path / "hub/models--org--name"
    shutil.copytree(root / "snapshots" / COMMIT, root / "snapshots" / ("b" * 40))
    (root / "refs/v2").write_text("b" * 40)
    (root / "snapshots" / ("b" * 40) / "generation_config.json").unlink()
    (root / "snapshots" / ("b" * 40) / "generation_config.json").write_text(json.dumps({"top_k": 3}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in ("v2", "b" * 40):
        model = loaded("org/name", revision=revision)
        assert model.ktx.weights.endswith("b" * 40) and model.generation_config.top_k == 3
    assert loaded("org/name").generation_config.top_k == 17
    with pytest.raises((OSError, KtxError)):
        loaded("org/name", revision="v3")


def test_arguments_of_the_hub_are_heeded(there, folder, tmp_path):
    right = logits(loaded(folder))
    with pytest.raises((OSError, KtxError)):
        loaded("org/private")
    model = loaded("org/private", token="hf_right", cache_dir=tmp_path / "other", revision=COMMIT)
    assert torch.equal(logits(model), right)
    assert model.ktx.weights == str(tmp_path / "other/models--org--private/snapshots" / COMMIT)
    assert not (tmp_path / "hub/models--org--private/snapshots").exists()
    there.seen.clear()
    loaded("org/private", token="hf_right", cache_dir=tmp_path / "other", revision=COMMIT)
    assert not fetched(there)
    loaded("org/private", token="hf_right", cache_dir=tmp_path / "other", force_download=True)
    assert fetched(there) >= {path.name for path in folder.glob("*.safetensors")}
    model = loaded("org/deeper", subfolder="deeper")
    assert torch.equal(logits(model), right) and "model.safetensors" not in fetched(there)
    for missing in ({"revision": "v9"}, {"subfolder": "none"}):
        with pytest.raises((OSError, ValueError)):  # transformers' own, which looks for the configuration
            loaded("org/name", **missing)


def test_only_weights_are_elsewhere(there, tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "Q8_0")
    model = loaded("org/name", words={"weights": tmp_path / "m.gguf"})
    assert not any(name.endswith(".safetensors") for name in fetched(there))
    by_load, _ = ktx.load("org/name", tmp_path / "m.gguf", progress=False)
    assert torch.equal(logits(model), logits(by_load)) and model.generation_config.top_k == 17


def test_other_doors_take_a_hub_id(there, folder):
    right = logits(loaded(folder))
    own = LlamaForCausalLM.from_pretrained("org/name", quantization_config=KtxConfig(progress=False))
    assert torch.equal(logits(own), right)
    config = AutoConfig.from_pretrained(folder)
    assert torch.equal(logits(loaded("org/name", config=config)), right)
    write = pipeline("text-generation", "org/name", model_kwargs={"quantization_config": KtxConfig(progress=False)})
    assert torch.equal(logits(write.model), right) and hasattr(write.model, "ktx")


@pytest.mark.parametrize(
    "more",
    [{"proxies": {"https": "x"}}, {"code_revision": "v2"}, {"variant": "fp16"}],
    ids=lambda more: next(iter(more)),
)
def test_arguments_that_are_refused_by_name(there, more):
    with pytest.raises(UsageError, match=next(iter(more))):
        loaded("org/name", **more)
    assert not fetched(there)


def test_what_cannot_be_is_said_before_weights_come(there):
    with pytest.raises(UsageError, match="device_map"):
        loaded("org/name", device_map={"model": "cpu", "lm_head": "cpu"})
    with pytest.raises(UsageError, match="LlamaForCausalLM for this configuration, not a LlamaModel"):
        AutoModel.from_pretrained("org/name", quantization_config=KtxConfig())
    there.repos["org/gguf"] = Repo({"config.json": there.repos["org/name"].files["config.json"], "m.gguf": b"GGUF"})
    with pytest.raises(BadFile, match=r"no \.gguf and no \.safetensors"):
        loaded("org/gguf")
    assert not fetched(there)


def test_code_is_of_the_weights_revision(there, folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}, "architectures": ["OwnForCausalLM"]}
    own = {"config.json": json.dumps(config).encode(), "modeling_own.py": CODE.format(said="here").encode()}
    there.repos["org/code"] = Repo(files_of(folder) | own)
    model = loaded("org/code", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and model.said == "here"
    assert torch.equal(logits(model), logits(loaded(folder)))
