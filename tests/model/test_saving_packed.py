"""A loaded model written with its packed weights as they are, and read again: the same bits, whatever types it has and
whatever was done to it.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ktx
import ktx.demo
from ktx.errors import BadFile, DoesNotFit, UsageError
from ktx.kernels import blocks, cpu
from ktx.model import checkpoint_folder
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor
from ktx.weights.open import open_weights
from ktx.weights.packed import PackedSource
from tests.families.test_families import load
from tests.model.test_saving import Opaque
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import FAMILIES, tiny

IDS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def of_gguf(family, folder, quant="Q8_0", config=None, **more):
    original = tiny(family, **(config or {}))
    folder.mkdir(exist_ok=True)
    original.config.save_pretrained(folder)
    write_gguf(folder / "model.gguf", original, quant)
    return load(folder, folder / "model.gguf", **more)


def again(model, folder, **options):
    model.save_pretrained(folder, packed=True, **options)
    return load(folder, None)


def same(mine, other):
    """Whether two models compute the same bits, for a prompt and for a token."""
    return all(torch.equal(mine(ids).logits, other(ids).logits) for ids in (IDS, IDS[:, :1]))


def types(model):
    """Types of all that a model has packed, by name."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, ktx.Operator):
            for name, value in module.packed_state().items():
                if isinstance(value, list):
                    found[f"{path}.{name}"] = [part.qtype.name for part in value]
    return found


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def mixed(name):
    """Types as quantised files mix them; rows that are no whole blocks of 256 get others."""
    if "attn_q" in name:
        return "Q6_K"
    return {"down": "Q5_K", "gate": "Q4_K", "up_": "Q3_K", "attn": "Q8_0"}.get(
        next((w for w in ("down", "gate", "up_", "attn") if w in name), ""), "Q4_K"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_to_the_same_bits(tmp_path, family):
    mine = of_gguf(family, tmp_path / "loaded", mixed)
    found = again(mine, tmp_path / "packed")
    assert types(found) == types(mine) and same(found, mine)
    assert 0.95 < size_of(tmp_path / "packed") / mine.get_memory_footprint() < 1.05
    assert found.state_dict().keys() == mine.state_dict().keys()
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "ktx", "version": 1}
    assert not found.ktx.plan.unread and len(found.ktx.plan.notes) == 1


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q4_0", "MXFP4", "IQ4_NL"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_types(tmp_path, family, quant):
    mine = of_gguf(family, tmp_path / "loaded", quant)
    found = again(mine, tmp_path / "packed")
    assert types(found) == types(mine) and same(found, mine)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("absorb", [True, False])
def test_latent_attention(tmp_path, split, quant, absorb):
    """kv_b_proj in one tensor or two of the file, and once more for prompts or not."""
    original = tiny("deepseek_v3")
    original.config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "model.gguf", original, quant, split_kvb=split)
    rule = ktx.Rule("self_attn$", cls=None, replace="MLA", kwargs={"absorb_for_prefill": True})
    rules = [rule, *ktx.injection.rules.load_rules("deepseek-v3")] if absorb else None
    mine = load(tmp_path, tmp_path / "model.gguf", rules=rules)
    mine.save_pretrained(tmp_path / "packed", packed=True)
    found, long = load(tmp_path / "packed", None, rules=rules), IDS.repeat(1, 9)
    assert same(found, mine) and torch.equal(found(long).logits, mine(long).logits)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    values = open_weights(tmp_path / "packed", mine.config).get(name).dequantize()  # as transformers has it
    assert torch.equal(values, mine.state_dict()[name].clone())
    assert same(load(tmp_path / "packed", None), mine)  # few tokens take the absorbed form by any rules


@pytest.mark.parametrize("name", ["quantize", "quantize_experts"])
@pytest.mark.parametrize("made", ["int8", "int4", "int4g64"])
def test_types_made_while_loading(tmp_path, name, made):
    tiny("qwen3_moe", moe_intermediate_size=128).save_pretrained(tmp_path / "loaded")
    mine = load(tmp_path / "loaded", None, **{name: made})
    found = again(mine, tmp_path / "packed")
    assert types(found) == types(mine) and same(found, mine)
    assert len({kind for parts in types(mine).values() for kind in parts}) == 2  # the embedding stays F32


def eights(*shape):
    """Random FP8 weights with a scale for each block of 128 x 128."""
    *before, n, k = shape
    values = (torch.randn(shape) * 50).to(torch.float8_e4m3fn).view(torch.uint8)
    scale = (torch.rand(*before, -(-n // 128), -(-k // 128)) + 0.5) / 1000
    return QuantizedTensor(values, QTYPES["F8_E4M3"], shape, scale)


@pytest.mark.parametrize("rows", [40, 128, 300])
def test_fp8_keeps_its_scales(tmp_path, rows, monkeypatch):
    config = {"intermediate_size": rows, "moe_intermediate_size": rows}
    for family in ("llama", "qwen3_moe"):
        mine = of_gguf(family, tmp_path / family, config=config)
        layer = mine.model.layers[0]
        if family == "llama":
            layer.mlp.up_proj.assign(cpu.pack(eights(rows, 256)))
        else:
            packed = cpu.pack_experts(eights(layer.mlp.experts.num_experts, rows, 256))
            layer.mlp.experts.weights = layer.mlp.experts.weights | {"up_proj": packed}
        monkeypatch.setattr(blocks, "UNPACK_CHUNK_WEIGHTS", 1 << 15)  # in pieces of 128 rows
        found = again(mine, tmp_path / f"{family}-packed")
        assert types(found) == types(mine) and same(found, mine)
        tensors = open_weights(tmp_path / f"{family}-packed", mine.config).tensors
        assert sum(key.endswith("_scale_inv") for key in tensors) == 1


def in_parts(module, *kinds):
    """Has a Linear hold its rows in parts of several types."""
    each = -(-module.out_features // len(kinds))
    values = module.weight.clone().split(each)
    module.parts = [
        cpu.pack(QuantizedTensor(QTYPES[kind].quantize(rows), QTYPES[kind], tuple(rows.shape)))
        for kind, rows in zip(kinds, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "model.layers.0.self_attn.q_proj"),
        ("phi3", "model.layers.1.self_attn.qkv_proj"),
        ("phi3", "model.layers.0.mlp.gate_up_proj"),
        ("deepseek_v3", "model.layers.1.mlp.shared_experts.down_proj"),
        ("llama", "lm_head"),
    ],
)
def test_rows_of_several_types(tmp_path, family, path):
    mine = of_gguf(family, tmp_path / "loaded", config={"n_shared_experts": 2} if family == "deepseek_v3" else None)
    kinds = ["Q8_0", "F16", "Q4_0"]
    in_parts(mine.get_submodule(path), *kinds)
    found = again(mine, tmp_path / "packed")
    assert [part.qtype.name for part in found.get_submodule(path).parts] == kinds
    assert same(found, mine) and types(found) == types(mine)
    assert same(again(found, tmp_path / "once more"), mine)


@pytest.mark.parametrize("limit", ["100KB", 30_000, "1MB"])
def test_several_files(tmp_path, limit):
    mine = of_gguf("qwen3_moe", tmp_path / "loaded")
    found = again(mine, tmp_path / "packed", max_shard_size=limit)
    assert same(found, mine)
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(open_weights(tmp_path / "packed", mine.config).tensors)
    assert index["metadata"]["total_parameters"] == mine.num_parameters()
    mine.save_pretrained(tmp_path / "packed", packed=True)  # in one file again
    assert [file.name for file in (tmp_path / "packed").glob("model*")] == ["model.safetensors"]
    assert same(load(tmp_path / "packed", None), mine)


# ---- what was done to a model


def merged(model):
    """An adapter in the matrices."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**options)).merge_and_unload(safe_merge=True)


def edited(path, kind=None, **which):
    def edit(model):
        with ktx.edit(model.get_submodule(path), dtype=kind, **which) as weight:
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))

    return edit


def other_parameters(model):
    for value in model.parameters():
        value.mul_(1.01)


def other_state(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


CHANGES = {
    "a linear layer": edited("model.layers.0.self_attn.o_proj"),
    "as a type": edited("model.layers.1.self_attn.v_proj", "Q4_0"),
    "an expert": edited("model.layers.1.mlp.experts", name="up_proj", expert=2),
    "the embedding and the tied output layer": edited("model.embed_tokens"),
    "parameters": other_parameters,
    "everything": other_state,
    "an adapter": merged,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_written(tmp_path, change):
    mine = of_gguf("qwen3_moe", tmp_path / "loaded")  # tied
    before = mine(IDS).logits
    mine = CHANGES[change](mine) or mine
    assert not torch.equal(mine(IDS).logits, before)
    mine.save_pretrained(tmp_path / "packed", packed=True)
    found = load(tmp_path / "packed", None)
    assert types(found) == types(mine) and same(found, mine)
    assert "lm_head.weight" not in open_weights(tmp_path / "packed", mine.config).tensors
    assert found.lm_head.parts[0] is found.model.embed_tokens.packed


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_what_computes_in_another_type(tmp_path, family):
    mine = of_gguf(family, tmp_path / "loaded", dtype=torch.bfloat16)
    mine.save_pretrained(tmp_path / "packed", packed=True)
    found = load(tmp_path / "packed", None, dtype=torch.bfloat16)
    assert types(found) == types(mine) and same(found, mine) and found(IDS).logits.dtype is torch.bfloat16
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_latent_attention_is_edited(tmp_path):
    mine = of_gguf("deepseek_v3", tmp_path / "loaded")
    edited("model.layers.1.self_attn", name="kv_b_proj")(mine)
    found = again(mine, tmp_path / "packed")
    assert types(found) == types(mine) and same(found, mine)


def test_an_output_layer_that_is_no_longer_tied(tmp_path):
    mine = of_gguf("qwen2", tmp_path / "loaded")
    mine.lm_head.weight = mine.lm_head.weight.clone().flip(0)
    found = again(mine, tmp_path / "packed")
    assert same(found, mine) and "lm_head.weight" in open_weights(tmp_path / "packed", mine.config).tensors


def test_fewer_layers_and_torchs_own_modules(tmp_path):
    mine = of_gguf("llama", tmp_path / "loaded", config={"num_hidden_layers": 4})
    mine.model.layers = torch.nn.ModuleList([mine.model.layers[i] for i in (0, 3)])
    mine.config.num_hidden_layers = 2
    mine.config.layer_types = None
    for i, layer in enumerate(mine.model.layers):
        layer.self_attn.layer_idx = i
    mine.model.layers[1].mlp.down_proj = ktx.dequantize(mine.model.layers[1].mlp.down_proj)
    found = again(mine, tmp_path / "packed")
    assert (found(IDS).logits - mine(IDS).logits).norm() < 1e-4 * mine(IDS).logits.norm()
    assert types(found)["model.layers.1.self_attn.q_proj.weight"] == ["Q8_0"]
    assert types(found)["model.layers.1.mlp.down_proj.weight"] == ["F32"]


def test_copies_pickles_and_stores_of_what_was_read(tmp_path):
    mine = again(of_gguf("qwen3_moe", tmp_path / "loaded"), tmp_path / "packed")
    assert same(pickle.loads(pickle.dumps(mine)), mine) and same(copy.deepcopy(mine), mine)
    for _ in range(2):  # written, then mapped
        assert same(load(tmp_path / "packed", None, packed_cache_dir=tmp_path / "store"), mine)
    mine.save_pretrained(tmp_path / "floats")  # where nothing speaks of packed weights any more
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32).eval()
    right = load(tmp_path / "floats", None)(IDS).logits
    assert (plain(IDS).logits - right).norm() < 1e-3 * right.norm()


def test_a_layer_that_guesses_tokens_is_written_behind_the_last(tmp_path):
    mine, _ = ktx.load(ktx.demo.path(), ktx.demo.safetensors(), progress=False, mtp=True)
    mine.save_pretrained(tmp_path, packed=True)
    found, tokenizer = ktx.load(tmp_path, progress=False, mtp=True)
    assert torch.equal(found.mtp.layer.eh_proj(torch.ones(1, 512)), mine.mtp.layer.eh_proj(torch.ones(1, 512)))
    assert same(found, mine) and tokenizer.chat_template == mine.ktx.tokenizer.chat_template
    assert same(ktx.load(tmp_path, progress=False)[0], mine)  # without it, its tensors are left out


# ---- what reads it


def test_commands_read_the_folder_alone(tmp_path, capsys):
    from ktx.__main__ import main

    mine, _ = ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False)
    mine.save_pretrained(tmp_path, packed=True)
    for words in (["plan"], ["verify", "--tokens", "8"], ["chat", "-p", "Hello", "--max-new-tokens", "4"]):
        assert main([words[0], "--model", str(tmp_path), *words[1:]]) == 0
    assert "quantized: ktx" in capsys.readouterr().out


FOREIGN = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (RuntimeError, ValueError) as error:
        print("refused", type(error).__name__)
"""


def test_transformers_alone_does_not_take_it_for_floats(tmp_path):
    """Whatever types it has; in a process that knows nothing of ktx."""
    folders = [tmp_path / quant for quant in ("F32", "F16", "Q8_0")]
    for folder in folders:
        of_gguf("qwen3_moe", tmp_path / f"{folder.name}-loaded", folder.name).save_pretrained(folder, packed=True)
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, *map(str, folders)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split().count("refused") == 3


def rewritten(folder, change):
    """The folder's one file with other metadata and tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    said = header["__metadata__"]
    types = json.loads(said["ktx.types"])
    change(said, types, tensors)
    if "ktx.types" in said and said["ktx.types"].startswith("{"):
        said["ktx.types"] = json.dumps(types)
    save_file(tensors, file, metadata=said)


NAME = "model.layers.0.mlp.up_proj.weight"
DAMAGES = {
    "has version '2'; this ktx reads packed weights of version 1": lambda s, t, x: s.update({"ktx.version": "2"}),
    f"{NAME} has the type 'Q8_1', which this ktx does not support.*Q8_0": lambda s, t, x: t.update({NAME: "Q8_1"}),
    f"{NAME} is 320 x 272 of U8, not rows of Q4_K": lambda s, t, x: t.update({NAME: "Q4_K"}),
    f"{NAME} is 320 x 256 of F32, not rows of Q8_0": lambda s, t, x: x.update({NAME: torch.zeros(320, 256)}),
    "its ktx.types lists nothing, which the file does not contain": lambda s, t, x: t.update({"nothing": "Q8_0"}),
    r"up_proj.weight is missing": lambda s, t, x: (t.pop(NAME), x.pop(NAME)),
    "is not a JSON object": lambda s, t, x: s.update({"ktx.types": "["}),
    r"up_proj.weight is 320 x 272, the model needs 320 x 256": lambda s, t, x: t.pop(NAME),
    "its config.json declares packed weights": lambda s, t, x: s.pop("ktx.version"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_what_is_not_understood_is_refused(tmp_path, words):
    of_gguf("llama", tmp_path / "loaded").save_pretrained(tmp_path / "packed", packed=True)
    rewritten(tmp_path / "packed", DAMAGES[words])
    with pytest.raises(BadFile, match=words):
        load(tmp_path / "packed", None)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"version": 2}, "ktx with version 2, not 1"),
        ({"version": None}, "ktx with version null, not 1"),
        ({"bits": 4}, "ktx with bits 4, an unknown parameter"),
    ],
)
def test_another_quantization_config_is_refused(tmp_path, said, words):
    of_gguf("llama", tmp_path / "loaded").save_pretrained(tmp_path / "packed", packed=True)
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= said
    file.write_text(json.dumps(config))
    with pytest.raises(BadFile, match=words):
        load(tmp_path / "packed", None)


def test_a_file_of_another_kind_among_them(tmp_path):
    mine = of_gguf("llama", tmp_path / "loaded")
    mine.save_pretrained(tmp_path / "packed", packed=True)
    save_file({"a": torch.ones(1)}, tmp_path / "packed" / "others.safetensors")
    with pytest.raises(BadFile, match="others.safetensors: is not packed, unlike the other files of its checkpoint"):
        load(tmp_path / "packed", None)


def test_other_weights_may_be_named(tmp_path):
    """Packed files say themselves what they are, and a packed model's configuration does not bind other files."""
    mine = of_gguf("llama", tmp_path / "loaded")
    mine.save_pretrained(tmp_path / "packed", packed=True)
    assert isinstance(open_weights(tmp_path / "packed", mine.config), PackedSource)
    assert same(load(tmp_path / "loaded", tmp_path / "packed" / "model.safetensors"), mine)
    assert same(load(tmp_path / "packed", tmp_path / "loaded" / "model.gguf"), mine)


# ---- what cannot be written


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    mine = of_gguf("llama", tmp_path / "loaded")
    before = set((tmp_path / "loaded").iterdir())
    cases = [
        ({"dtype": torch.float16}, "each weight in its own type; leave out dtype"),
        ({"state_dict": {}}, "packed applies to the model's own weights"),
        ({"max_shard_size": "a lot"}, "is not a size"),
        ({"push_to_hub": True}, "push_to_hub is not supported"),
    ]
    for options, words in cases:
        with pytest.raises(UsageError, match=words):
            mine.save_pretrained(tmp_path / "refused", packed=True, **options)
    with pytest.raises(UsageError, match=r"holds model.gguf, so ktx.load could not.*use another folder"):
        mine.save_pretrained(tmp_path / "loaded", packed=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(DoesNotFit, match="the model needs .*use another disk"):
        mine.save_pretrained(tmp_path / "full", packed=True)
    assert set((tmp_path / "loaded").iterdir()) == before and not (tmp_path / "refused").exists()


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def with_parametrization(model):
    model.model.layers[0].mlp.down_proj = ktx.dequantize(model.model.layers[0].mlp.down_proj)
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)


def with_wrapper(model):
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_adapter, "has no .*q_proj.lora_A.*merge adapters first"),
        (with_parametrization, r"model\.layers\.0\.mlp\.down_proj is parametrized"),
        (with_wrapper, r"has no model\.layers\.1\.mlp\.0\."),
    ],
)
def test_what_a_loaded_model_would_not_have_is_refused(tmp_path, change, words):
    mine = of_gguf("llama", tmp_path / "loaded")
    change(mine)
    with pytest.raises(UsageError, match=words):
        mine.save_pretrained(tmp_path / "packed", packed=True)
    assert not (tmp_path / "packed").exists()


def test_an_operator_that_does_not_say_its_packed_weights(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    rule = ktx.Rule(name="down_proj$", replace="tests.model.test_saving_packed.Floating")
    mine = load(tmp_path, None, rules=[rule, *ktx.injection.rules.load_rules("llama")])
    with pytest.raises(UsageError, match=r"down_proj: Floating does not implement packed_state\(\).*save_pretrained"):
        mine.save_pretrained(tmp_path / "packed", packed=True)
    mine.save_pretrained(tmp_path / "floats")  # the remedy
    assert not (tmp_path / "packed").exists() and (tmp_path / "floats" / "config.json").exists()


class Floating(Opaque):
    """An operator that implements floats() but not packed_state()."""

    def floats(self):
        from ktx.ops.float_views import view_tensor

        return {"weight": view_tensor(self.values)}


def test_a_type_that_is_not_taken_back(tmp_path, monkeypatch):
    mine = of_gguf("llama", tmp_path / "loaded")
    monkeypatch.delitem(blocks.soa_layout.FIELDS, "Q8_0")
    with pytest.raises(UsageError, match="weights of Q8_0 cannot be unpacked"):
        mine.save_pretrained(tmp_path / "packed", packed=True)
    assert not list(tmp_path.glob("packed/*"))


# ---- writing that is stopped


@pytest.mark.parametrize("before", [False, True])
def test_a_write_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, before):
    mine = of_gguf("llama", tmp_path / "loaded")
    if before:
        mine.save_pretrained(tmp_path / "packed", packed=True, max_shard_size="100KB")
    files = {file: file.read_bytes() for file in tmp_path.glob("packed/*")}
    written = []

    def full(*args):
        written.append(args)
        if len(written) > 10:
            raise OSError(28, "No space left on device")
        return os.__dict__["pwrite"](*args)

    monkeypatch.setattr(checkpoint_folder, "os", type("Full", (), {**os.__dict__, "pwrite": staticmethod(full)}))
    with pytest.raises(OSError, match="No space"):
        mine.save_pretrained(tmp_path / "packed", packed=True)
    assert {file: file.read_bytes() for file in tmp_path.glob("packed/*")} == files


KILLED = """
import os, signal, sys, pathlib
import ktx, torch
from ktx.model import checkpoint_folder
folder, at = sys.argv[1], int(sys.argv[2])
model, _ = ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False, self_test=False)
calls = 0
def killing(self, name, whole=pathlib.Path.replace):
    global calls
    calls += 1
    if calls > at:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, name)
pathlib.Path.replace = killing
model.save_pretrained(folder, packed=True, max_shard_size="4MB")
"""


@pytest.mark.parametrize("before", [False, True])
def test_a_process_that_is_killed_leaves_no_folder_that_looks_whole(tmp_path, before):
    mine, _ = ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False, self_test=False)
    if before:
        mine.save_pretrained(tmp_path, max_shard_size="20MB")  # floats, in several files
    source = KILLED.replace("import ktx, torch", "import ktx, ktx.demo, torch")
    done = subprocess.run([sys.executable, "-c", source, str(tmp_path), "1"], cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(BadFile):
        ktx.load(tmp_path, progress=False)


@pytest.mark.parametrize("packed", [True, False])
def test_progress(tmp_path, packed):
    class Tally:
        total = done = 0

        def advance(self, nbytes):
            self.done += nbytes

    mine, tally = of_gguf("qwen3_moe", tmp_path / "loaded"), Tally()
    mine.save_pretrained(tmp_path / "written", packed=packed, progress=tally)
    assert tally.total == tally.done > 0.9 * size_of(tmp_path / "written")


def test_little_memory_is_taken(tmp_path, monkeypatch):
    """Rows are taken back some at a time, of experts one matrix at a time."""
    mine = of_gguf("qwen3_moe", tmp_path / "loaded", "F16")
    mine.save_pretrained(tmp_path / "packed", packed=True)
    monkeypatch.setattr(blocks, "UNPACK_CHUNK_WEIGHTS", 1 << 15)
    made = []
    take = blocks.unpack
    monkeypatch.setattr(blocks, "unpack", lambda data, into: (made.append(into.n * into.k), take(data, into)))
    mine.save_pretrained(tmp_path / "pieces", packed=True)
    assert max(made) <= 1 << 15 and len(made) > 50
    assert (tmp_path / "pieces" / "model.safetensors").read_bytes() == (
        tmp_path / "packed" / "model.safetensors"
    ).read_bytes()
