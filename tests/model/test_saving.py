"""The state of a loaded model: as tensors, as a checkpoint, in numbers; and what casts, other vocabularies and other
weights make of it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

import ktx
import ktx.demo
from ktx.errors import DoesNotFit, UsageError
from ktx.model import checkpoint_folder
from ktx.ops import float_views
from ktx.ops.float_views import Dequantized
from tests.families.test_families import load
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_chat_model import write_model
from tests.support.tiny_models import FAMILIES, tiny

IDS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def of_gguf(family, folder, quant="F32", **more):
    """A family's model in transformers with the weights of a file, and in ktx."""
    original = tiny(family, **more)
    original.config.save_pretrained(folder)
    original.load_state_dict(write_gguf(folder / "model.gguf", original, quant), strict=False)
    return original, load(folder, folder / "model.gguf")


def of_floats(family, folder, **more):
    original = tiny(family, **more)
    original.save_pretrained(folder)
    return original, load(folder, None)


def away(mine, right):
    return float((mine.float() - right.float()).norm() / right.float().norm())


def tensors_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_as_transformers_writes_it(tmp_path, family):
    original, mine = of_gguf(family, tmp_path / "loaded")
    state, right = mine.state_dict(), original.state_dict()
    assert state.keys() == right.keys()
    for name, value in right.items():
        assert state[name].shape == value.shape and torch.allclose(state[name], value, atol=1e-5), name
    mine.save_pretrained(tmp_path / "mine")
    original.save_pretrained(tmp_path / "theirs")
    written, theirs = tensors_in(tmp_path / "mine"), tensors_in(tmp_path / "theirs")
    assert written.keys() == theirs.keys()
    assert all(
        written[name].shape == value.shape and written[name].dtype == value.dtype for name, value in theirs.items()
    )
    logits = original(IDS).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32).eval()
    assert away(again(IDS).logits, logits) < 1e-3
    assert away(load(tmp_path / "mine", None)(IDS).logits, logits) < 1e-3
    assert mine.num_parameters() == original.num_parameters()
    assert mine.num_parameters(exclude_embeddings=True) == original.num_parameters(exclude_embeddings=True)
    assert mine.num_parameters(only_trainable=True) == 0
    assert mine.get_memory_footprint() >= mine.ktx.nbytes


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_quantised_weights_are_written_as_what_they_stand_for(tmp_path, family):
    original, mine = of_gguf(family, tmp_path / "loaded", "Q8_0")
    mine.save_pretrained(tmp_path / "mine")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32).eval()
    assert away(again(IDS).logits, original(IDS).logits) < 1e-3
    floats_, packed = mine.get_memory_footprint(), sum(p.nbytes for p in original.parameters())
    assert 0.2 * packed < floats_ < 0.6 * packed


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_pieces_and_types(tmp_path, family, monkeypatch):
    original, mine = of_floats(family, tmp_path / "loaded")
    mine.save_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    asked = []
    monkeypatch.setattr(float_views, "MAX_RANGE_VALUES", 1 << 13)
    read = float_views.Floats.values
    monkeypatch.setattr(
        float_views.Floats, "values", lambda self, dtype: (asked.append(self.shape), read(self, dtype))[1]
    )
    mine.save_pretrained(tmp_path / "pieces", max_shard_size="300KB", dtype=torch.bfloat16)
    assert not [shape for shape in asked if len(shape) == 3]  # no stack of experts at once
    whole, pieces = tensors_in(tmp_path / "whole"), tensors_in(tmp_path / "pieces")
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)
    index = json.loads((tmp_path / "pieces" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert index["metadata"]["total_parameters"] == original.num_parameters()
    config = json.loads((tmp_path / "pieces" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == [type(original).__name__]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pieces", dtype=torch.float32).eval()
    assert away(again(IDS).logits, load(tmp_path / "pieces", None)(IDS).logits) < 2e-2
    assert all("e_score_correction_bias" not in name or value.dtype is torch.float32 for name, value in whole.items())


def test_a_folder_that_was_written_before(tmp_path):
    _, mine = of_floats("llama", tmp_path / "loaded")
    mine.save_pretrained(tmp_path / "twice", max_shard_size="300KB")
    mine.save_pretrained(tmp_path / "twice")
    assert [file.name for file in tmp_path.glob("twice/model*")] == ["model.safetensors"]
    mine.save_pretrained(tmp_path / "twice", variant="fp32")
    assert {file.name for file in tmp_path.glob("twice/*.safetensors")} == {
        "model.safetensors",
        "model.fp32.safetensors",
    }
    mine.save_pretrained(tmp_path / "loaded")  # the very files that it was loaded from
    assert torch.equal(load(tmp_path / "loaded", None)(IDS).logits, mine(IDS).logits)


def test_a_chat_model_is_written_with_all_that_it_needs(tmp_path):
    write_model(tmp_path / "loaded", quant="F32")
    mine, tokenizer = ktx.load(tmp_path / "loaded", tmp_path / "loaded" / "model.gguf", progress=False)
    mine.generation_config.temperature, mine.generation_config.do_sample = 0.5, True
    mine.save_pretrained(tmp_path / "mine")
    again, same = ktx.load(tmp_path / "mine", progress=False)
    assert torch.allclose(again(IDS).logits, mine(IDS).logits, atol=1e-4)
    assert same.get_vocab() == tokenizer.get_vocab() and same.chat_template == tokenizer.chat_template
    assert again.generation_config.temperature == 0.5
    assert "disable_compile" not in json.loads((tmp_path / "mine" / "generation_config.json").read_text())
    assert mine.generation_config.disable_compile


def test_a_layer_that_guesses_tokens_is_written_behind_the_last(tmp_path):
    mine, _ = ktx.load(ktx.demo.path(), ktx.demo.safetensors(), progress=False, mtp=True)
    mine.save_pretrained(tmp_path, dtype=torch.bfloat16)  # as the file has them
    again, _ = ktx.load(tmp_path, progress=False, mtp=True)
    for model in (again, copy.deepcopy(mine)):
        joined, right = model.mtp.layer.eh_proj, mine.mtp.layer.eh_proj
        assert torch.allclose(joined(torch.ones(1, 512)), right(torch.ones(1, 512)), atol=1e-5)
        assert torch.allclose(model(IDS).logits, mine(IDS).logits, atol=1e-4)


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    _, mine = of_floats("llama", tmp_path / "loaded")
    cases = [
        ({"push_to_hub": True}, "push_to_hub is not supported.*huggingface_hub"),
        ({"max_shard": 3}, "max_shard is not supported"),
        ({"max_shard_size": "5 apples"}, "max_shard_size '5 apples' is not a size"),
        ({"dtype": torch.int8}, "dtype torch.int8 is not supported"),
        ({"safe_serialization": False}, "safetensors"),
        ({"variant": "../other"}, "variant '../other' cannot be part"),
        ({"variant": "../other", "packed": True}, "variant '../other' cannot be part"),
        ({"dtype": torch.bfloat16, "state_dict": {}}, "dtype applies to the model's own weights"),
    ]
    for options, words in cases:
        with pytest.raises(UsageError, match=words):
            mine.save_pretrained(tmp_path / "refused", **options)
    with pytest.raises(UsageError, match="path of the folder is empty"):
        mine.save_pretrained("")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        mine.save_pretrained(tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(DoesNotFit, match="GB are free.*bfloat16"):
        mine.save_pretrained(tmp_path / "full")
    assert not list(tmp_path.glob("full/*"))


def test_a_write_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    _, mine = of_floats("llama", tmp_path / "loaded")
    mine.save_pretrained(tmp_path / "mine")
    before = {file: file.read_bytes() for file in (tmp_path / "mine").iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folder.os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        mine.save_pretrained(tmp_path / "mine", dtype=torch.bfloat16)
    assert {file: file.read_bytes() for file in (tmp_path / "mine").iterdir()} == before


class Opaque(ktx.Operator):
    """An operator that has packed weights and does not implement floats()."""

    @classmethod
    def from_hf(cls, old, ctx, **kwargs):
        return cls()

    def tensors(self):
        return [f"{self.path}.weight"]

    def load(self, source):
        self.values = source.get(f"{self.path}.weight").dequantize()

    def forward(self, x):
        return x @ self.values.T


def test_an_operator_that_does_not_say_its_weights(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    rule = ktx.Rule(name="down_proj$", replace="tests.model.test_saving.Opaque")
    mine = load(tmp_path, None, rules=[rule, *ktx.injection.rules.load_rules("llama")])
    for ask in (mine.state_dict, mine.num_parameters, lambda: mine.save_pretrained(tmp_path / "mine")):
        with pytest.raises(UsageError, match=r"down_proj: Opaque does not implement floats\(\)"):
            ask()
    assert torch.equal(copy.deepcopy(mine)(IDS).logits, mine(IDS).logits)


def test_a_packed_weight_is_a_tensor_for_programs_that_read_it(tmp_path):
    original, mine = of_floats("qwen3_moe", tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    value, right = mine.state_dict()[name], original.state_dict()[name]
    assert isinstance(value, Dequantized) and value.numel() == right.numel() and value.is_contiguous()
    assert "Dequantized" in repr(value) and value.nbytes == right.nbytes
    assert torch.allclose(value.to(torch.float64).sum(), right.to(torch.float64).sum())
    assert torch.allclose(value[1, :3] + 1, right[1, :3] + 1) and (value.numpy() == right.numpy()).all()
    assert torch.allclose(torch.einsum("eoi,i->eo", value, torch.ones(256)), right.sum(-1), atol=1e-4)
    assert type(value.clone()) is torch.Tensor and type(value.detach()) is Dequantized
    torch.save({name: value}, tmp_path / "part.pt")
    assert torch.equal(torch.load(tmp_path / "part.pt")[name], value.clone())
    for write in (value.zero_, lambda: value.mul_(2), lambda: value.__setitem__(0, 1), lambda: value.copy_(right)):
        with pytest.raises(UsageError, match="cannot be written to.*load_state_dict"):
            write()


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "gpt_oss"])
def test_weights_and_biases_are_parameters_to_who_asks(tmp_path, family):
    """As programs do that exchange parameters; what they assign counts, in the state too."""
    original, mine = of_floats(family, tmp_path)
    for path in ("q_proj", "v_proj"):
        for model in (original, mine):
            module = model.model.layers[0].self_attn.get_submodule(path)
            for name in ("weight", "bias"):
                value = getattr(module, name)
                assert isinstance(value, nn.Parameter)
                setattr(module, name, nn.Parameter(0.5 * value.detach(), requires_grad=False))
    assert away(mine(IDS).logits, original(IDS).logits) < 1e-4
    state = mine.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())
    assert mine.num_parameters() == original.num_parameters() and state.keys() == original.state_dict().keys()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "deepseek_v3"])
def test_a_state_that_is_given_is_written_by_transformers(tmp_path, family):
    original, mine = of_floats(family, tmp_path / "loaded")
    mine.save_pretrained(tmp_path / "mine", state_dict=mine.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32).eval()
    assert away(again(IDS).logits, original(IDS).logits) < 1e-4


def test_safetensors_of_a_state(tmp_path):
    original, mine = of_floats("llama", tmp_path)
    save_file(dict(mine.state_dict()), tmp_path / "all.safetensors")
    with safe_open(tmp_path / "all.safetensors", "pt") as opened:
        for name, value in original.state_dict().items():
            assert torch.equal(opened.get_tensor(name), value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_safetensors_of_a_model(tmp_path, family):
    """save_model and load_model look for tensors that share memory: of tied ones one is written."""
    original, mine = of_floats(family, tmp_path)
    save_model(mine, str(tmp_path / "mine.safetensors"))
    save_model(original, str(tmp_path / "right.safetensors"))
    written, right = (load_file(tmp_path / f"{name}.safetensors") for name in ("mine", "right"))
    assert written.keys() == right.keys() and all(torch.equal(written[name], right[name]) for name in right)
    twin = tiny(family)
    for model in (twin, mine):
        model.load_state_dict({name: torch.zeros_like(value) for name, value in twin.state_dict().items()})
    for model in (twin, mine):
        load_model(model, str(tmp_path / "mine.safetensors"))
        assert away(model(IDS).logits, original(IDS).logits) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_other_weights_are_taken(tmp_path, family):
    original, mine = of_floats(family, tmp_path)
    before = mine(IDS).logits
    done = mine.load_state_dict(mine.state_dict())
    assert not done.missing_keys and not done.unexpected_keys and torch.equal(mine(IDS).logits, before)
    with torch.no_grad():
        for value in original.parameters():
            value.mul_(1.1)
    mine.load_state_dict(original.state_dict())
    assert away(mine(IDS).logits, original(IDS).logits) < 1e-4
    assert away(mine(IDS[:, :5]).logits, original(IDS[:, :5]).logits) < 1e-4  # few tokens: shortcuts
    assert torch.equal(copy.deepcopy(mine)(IDS).logits, mine(IDS).logits)


@pytest.mark.parametrize("path", ["model.layers.1.mlp", "model.layers.1.self_attn", "model.layers.0"])
def test_weights_of_a_part_are_taken(tmp_path, path):
    original, mine = of_floats("qwen3_moe", tmp_path)
    mine(IDS[:, :5])
    with torch.no_grad():
        for value in original.get_submodule(path).parameters():
            value.mul_(1.2)
    mine.get_submodule(path).load_state_dict(original.get_submodule(path).state_dict())
    assert away(mine(IDS[:, :5]).logits, original(IDS[:, :5]).logits) < 1e-4
    assert away(mine(IDS).logits, original(IDS).logits) < 1e-4


def test_some_weights_and_wrong_ones(tmp_path):
    original, mine = of_floats("llama", tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        original.get_parameter(name).zero_()
    done = mine.load_state_dict({name: original.get_parameter(name)}, strict=False)
    assert name not in done.missing_keys and len(done.missing_keys) == len(original.state_dict()) - 1
    assert away(mine(IDS[:, :5]).logits, original(IDS[:, :5]).logits) < 1e-4
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.mlp\.down_proj\.weight"):
        mine.load_state_dict({name: torch.ones(2, 2)}, strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj"):
        mine.load_state_dict({name: original.get_parameter(name)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nothing"):
        mine.load_state_dict(dict(mine.state_dict()) | {"nothing": torch.ones(1)})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_casts(tmp_path, family, cast):
    original, mine = of_floats(family, tmp_path)
    right = original(IDS).logits
    assert cast(mine) is mine
    out = mine(IDS).logits
    assert out.dtype == mine.dtype == cast(original).dtype and away(out, right) < 0.05
    few = mine(IDS[:, :5]).logits
    assert few.dtype == mine.dtype and away(few, right[:, :5]) < 0.05
    assert copy.deepcopy(mine)(IDS).logits.dtype == mine.dtype
    assert mine.float()(IDS).logits.dtype is torch.float32 and away(mine(IDS).logits, right) < 0.05


@pytest.mark.parametrize("plain", ["embed_tokens", "lm_head"])
def test_where_packed_weights_do_not_go(tmp_path, plain):
    tiny("llama").save_pretrained(tmp_path)
    mine = load(
        tmp_path, None, rules=[ktx.Rule(name=plain), *ktx.injection.rules.load_rules("llama")]
    )  # a module stays torch's
    right = mine(IDS).logits
    for move in (lambda: mine.to("meta"), lambda: mine.to(device="meta", dtype=torch.bfloat16)):
        with pytest.raises(UsageError, match=r"cannot move to meta.*ktx\.load\(\.\.\., device"):
            move()
    with pytest.raises(UsageError, match=r"does not compute in torch\.float64"):
        mine.double()
    assert torch.equal(mine.to("cpu")(IDS).logits, right)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize("size", [300, 352])
def test_other_vocabularies(tmp_path, family, size):
    original, mine = of_floats(family, tmp_path)
    for model in (original, mine):
        torch.manual_seed(3)
        new = model.resize_token_embeddings(size, mean_resizing=False)
        assert isinstance(new, nn.Embedding) and new is model.get_input_embeddings()
    ids = IDS % 300
    assert mine(ids).logits.shape[-1] == size == mine.config.vocab_size
    assert away(mine(ids).logits[..., :300], original(ids).logits[..., :300]) < 1e-4
    assert (
        mine.state_dict().keys() == original.state_dict().keys() and mine.num_parameters() == original.num_parameters()
    )
    mine.save_pretrained(tmp_path / "mine")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32).eval()
    assert away(again(ids).logits, mine(ids).logits) < 1e-4


def test_the_vocabulary_as_it_is(tmp_path):
    _, mine = of_floats("llama", tmp_path)
    before = mine.get_input_embeddings()
    assert mine.resize_token_embeddings() is before
    assert mine.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 320


def test_pruning_says_what_to_do(tmp_path):
    original, mine = of_floats("llama", tmp_path)
    layer, twin = mine.model.layers[0].mlp.up_proj, original.model.layers[0].mlp.up_proj
    with pytest.raises(UsageError, match=r"up_proj: a packed weight is not a parameter.*state_dict.*ktx\.dequantize"):
        prune.l1_unstructured(layer, "weight", amount=0.3)
    plain = ktx.dequantize(layer)
    for module in (twin, plain):
        prune.l1_unstructured(module, "weight", amount=0.3)
        prune.remove(module, "weight")
    assert torch.equal(plain.weight, twin.weight)  # one remedy
    mine.load_state_dict({"model.layers.0.mlp.up_proj.weight": twin.weight}, strict=False)  # another
    assert away(mine(IDS).logits, original(IDS).logits) < 1e-4
