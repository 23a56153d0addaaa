"""Copies of a loaded model: they share packed bytes and nothing else; pickles of it refer to its files."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import os
import pickle
import shutil

import pytest
import torch
from torch import nn

import ktx
from ktx.cache.kv import KVCache
from ktx.errors import BadFile, KtxError, UsageError
from ktx.injection.rules import load_rules
from ktx.kernels import cpu
from ktx.model.notes import Note
from ktx.ops.base import Operator
from ktx.ops.fusion.layer import Layer
from ktx.ops.guard import valid_fast_path
from ktx.transformers_compat import cache_argument
from tests.families.test_families import load
from tests.support.tiny_chat_model import write_model
from tests.support.tiny_models import FAMILIES, tiny

IDS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(5))
WITH = {"input_ids": IDS[:, :20]}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def chat(tmp_path):
    """A model with a tokenizer, of GGUF."""
    folder = write_model(tmp_path / "chat")
    return ktx.load(folder, folder / "model.gguf", progress=False)[0]


def answers(model, ids=IDS):
    """Logits of a prompt, and of a token after it, which takes the shortcuts."""
    cache = KVCache(model.config, None)
    first = model(ids[:, :-1], **cache_argument(model, cache)).logits
    return torch.cat([first, model(ids[:, -1:], **cache_argument(model, cache)).logits], 1)


def pickled(model, protocol=pickle.DEFAULT_PROTOCOL):
    return pickle.loads(pickle.dumps(model, protocol))


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def floats_of(family, folder, **more):
    tiny(family).save_pretrained(folder)
    return load(folder, None, **more)


def packed_of(model):
    """Where the packed bytes of a model are, by module."""
    return {
        path: [part.data.data_ptr() for part in module.parts]
        for path, module in model.named_modules()
        if hasattr(module, "parts")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_every_family_answer_alike(tmp_path, family):
    model = floats_of(family, tmp_path)
    right = answers(model)
    others = [copy.deepcopy(model), torch_saved(model), copy.copy(model)]
    del model
    gc.collect()
    for other in others:
        assert torch.equal(answers(other), right)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_a_gguf_model(chat, protocol):
    text = pickle.dumps(chat, protocol)
    assert len(text) < 0.5 * chat.ktx.nbytes + 300_000  # names and norms, no matrices
    other = pickle.loads(text)
    assert torch.equal(answers(other), answers(chat))
    assert packed_of(other).keys() == packed_of(chat).keys() and packed_of(other) != packed_of(chat)


def test_a_copy_shares_packed_bytes_alone(chat):
    other = copy.deepcopy(chat)
    assert packed_of(other) == packed_of(chat)
    assert not {id(m) for m in other.modules()} & {id(m) for m in chat.modules()}
    mine = {t.data_ptr() for t in [*chat.parameters(), *chat.buffers()]}
    assert not mine & {t.data_ptr() for t in [*other.parameters(), *other.buffers()]}
    steps = {id(step) for m in chat.modules() for step in getattr(getattr(m, "fused_group", None), "steps", ())}
    assert steps and not steps & {
        id(step) for m in other.modules() for step in getattr(getattr(m, "fused_group", None), "steps", ())
    }


def test_a_copy_has_a_handle_of_its_own(chat):
    right = answers(chat)
    for other in (copy.deepcopy(chat), pickled(chat), copy.copy(chat)):
        assert other.ktx.model() is other and chat.ktx.model() is chat
        assert other.ktx is not chat.ktx and other.ktx.nbytes == chat.ktx.nbytes
        assert str(other.ktx.plan) == str(chat.ktx.plan)
    other = copy.deepcopy(chat)
    other.ktx.tokenizer.add_tokens(["<new>"])
    other.ktx.notes.append(Note("flag", "x"))
    del other.ktx.plan[0]
    assert len(chat.ktx.tokenizer) == len(other.ktx.tokenizer) - 1
    assert len(chat.ktx.notes) == len(other.ktx.notes) - 1 and len(chat.ktx.plan) == len(other.ktx.plan) + 1
    del chat
    gc.collect()
    with other.ktx.engine(max_batch_size=1, kv_cache_tokens=256) as engine:
        ((_, last),) = [event for event in engine.generate(["a b c"]) if hasattr(event[1], "reason")][-1:]
    assert last.usage["completion_tokens"] if isinstance(last.usage, dict) else last.usage
    assert torch.equal(answers(other), right)


def test_edits_of_a_copy_stay_there(chat):
    right, other = answers(chat), copy.deepcopy(chat)
    for norm in (
        other.model.norm,
        other.model.layers[0].input_layernorm,
        other.model.layers[1].post_attention_layernorm,
    ):
        norm.weight.mul_(1.5)
    again = copy.deepcopy(other)  # which has copied the norms as they are now
    assert torch.equal(answers(chat), right)
    assert not torch.allclose(answers(again), right, atol=1e-3)
    assert torch.equal(answers(pickled(other)), answers(again))


def test_another_module_in_a_copy_is_pickled_with_it(chat):
    other = copy.deepcopy(chat)
    other.model.layers[0].mlp = nn.Identity()
    other.model.layers[1].self_attn.q_proj = nn.Linear(256, 256, bias=False)
    assert torch.allclose(answers(pickled(other)), answers(other), atol=1e-6)
    assert not torch.allclose(answers(other), answers(chat), atol=1e-3)


@pytest.mark.parametrize("make", [copy.deepcopy, pickled, torch_saved, copy.copy])
@pytest.mark.parametrize("path", ["model", "model.layers.0", "model.layers.1.mlp", "model.embed_tokens", "lm_head"])
def test_parts_of_a_model(chat, make, path):
    part = chat.get_submodule(path)
    other = make(part)
    assert type(other).__name__ == type(part).__name__ and isinstance(other, type(part))
    right = answers(chat)
    if path == "model":
        chat.model = other
    else:
        chat.set_submodule(path, other)
    assert torch.equal(answers(chat), right)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize_experts": "int8"},
        {"quantize": "int4"},
        {"kv_dtype": "q8_0"},
        {"num_experts_per_tok": 2},
        {"defer_experts": 1},
        {"dtype": torch.bfloat16},
        {"rules": "list"},
        {"packed_cache_dir": "here"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_model_was_loaded_with_holds_for_its_copies(tmp_path, options):
    if "rules" in options:
        rules = load_rules("qwen3-moe")
        options = {"rules": [ktx.Rule(name=r"^model\.layers\.0\.self_attn$", replace=None), *rules]}
    if "packed_cache_dir" in options:
        options = {"packed_cache_dir": tmp_path / "packed"}
        floats_of("qwen3_moe", tmp_path / "model", **options)  # the second one maps what this has written
    model = floats_of("qwen3_moe", tmp_path / "model", **options)
    right = answers(model)
    for other in (copy.deepcopy(model), pickled(model)):
        assert torch.equal(answers(other), right)
        assert other.ktx.kv_dtype == model.ktx.kv_dtype and other.dtype == model.dtype


def test_mapped_weights_are_mapped_again(tmp_path):
    for _ in range(2):
        model = floats_of("qwen3_moe", tmp_path / "model", packed_cache_dir=tmp_path / "packed")
    text, files = pickle.dumps(model), sorted((tmp_path / "packed").rglob("*"))
    other = pickle.loads(text)
    assert torch.equal(answers(other), answers(model)) and sorted((tmp_path / "packed").rglob("*")) == files
    shutil.rmtree(tmp_path / "packed")
    assert torch.equal(answers(pickle.loads(text)), answers(model)) and not list(tmp_path.rglob("*.part"))


def change(file):
    with open(file, "r+b") as opened:
        opened.seek(-64, os.SEEK_END)
        opened.write(b"\1" * 64)


def test_a_file_that_has_changed_is_refused(chat, tmp_path):
    file = tmp_path / "chat" / "model.gguf"
    text, about = pickle.dumps(chat), file.stat()
    shutil.copy(file, tmp_path / "copy")
    change(file)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(BadFile, match=r"model\.gguf: has changed since the model was pickled.*ktx\.load"):
        pickle.loads(text)
    os.utime(file)
    with pytest.raises(BadFile, match=r"has changed since the model was loaded.*save_pretrained"):
        pickle.dumps(chat)
    shutil.copy(tmp_path / "copy", file)  # what it was, at another time
    assert torch.equal(answers(pickle.loads(text)), answers(copy.deepcopy(chat)))
    file.unlink()
    with pytest.raises(BadFile, match=r"model\.gguf: .*No such file"):
        pickle.loads(text)
    with pytest.raises(BadFile, match=r"No such file"):
        pickle.dumps(chat.model.layers[0])


def test_what_comes_from_no_file_is_written_as_it_is(chat, monkeypatch):
    head = chat.lm_head
    head.parts = [cpu.pack(part) for part in [as_f32(head)]]
    text = pickle.dumps(head)
    assert torch.equal(pickle.loads(text)(torch.ones(1, 256)), head(torch.ones(1, 256)))
    monkeypatch.setattr(cpu, "packing_key", lambda: ("another", 1, ""))
    with pytest.raises(KtxError, match=r"another processor.*ktx\.load"):
        pickle.loads(text)


def as_f32(head):
    from ktx.weights.base import QuantizedTensor

    return QuantizedTensor.from_float(head.weight)


def test_copies_keep_hooks_and_caches_apart(chat):
    seen = []
    chat.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *of: seen.append(1))
    other = copy.deepcopy(chat)
    answers(other)
    assert len(seen) == 2  # the copy's hook, for a prompt and a token
    cache = KVCache(chat.config, None)
    chat(IDS[:, :8], **cache_argument(chat, cache))
    twin = copy.deepcopy(cache)
    mine = chat(IDS[:, 8:9], **cache_argument(chat, cache)).logits
    assert torch.equal(other(IDS[:, 8:9], **cache_argument(other, twin)).logits, mine)


def test_modules_on_a_gpu_are_not_copied(chat):
    class Elsewhere:
        gpu = True

        def __str__(self):
            return "cuda:0"

    chat.model.layers[0].mlp.placement = Elsewhere()
    for make in (copy.deepcopy, pickled):
        with pytest.raises(UsageError, match=r"layers\.0\.mlp is on cuda:0.*load the model again"):
            make(chat)


def child(model, ids, right, found):
    with torch.no_grad():
        found.put(float((answers(model, ids) - right).abs().max()))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_children_answer(chat, how):
    chat.share_memory()
    context, right = multiprocessing.get_context(how), answers(chat)
    found = context.Queue()
    process = context.Process(target=child, args=(chat, IDS, right, found))
    process.start()
    try:
        assert found.get(timeout=90) == 0
    finally:
        process.join(30)
    assert process.exitcode == 0


def child_of_an_edited_model(model, state, ids, right, found):
    with torch.no_grad():
        same = all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
        found.put((same, float((answers(model, ids) - right).abs().max())))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_children_get_weights_that_come_from_no_file(tmp_path, how):
    model = floats_of("deepseek_v3", tmp_path)
    for module in (model.lm_head, model.model.embed_tokens, model.model.layers[0].self_attn.o_proj):
        with ktx.edit(module) as weight:
            weight.mul_(0.9)
    with ktx.edit(model.model.layers[1].mlp.experts, "down_proj", expert=0) as weight:
        weight.mul_(0.9)
    context, right = multiprocessing.get_context(how), answers(model)
    found = context.Queue()
    given = (model, model.state_dict(), IDS, right, found)
    process = context.Process(target=child_of_an_edited_model, args=given)
    process.start()
    try:
        assert found.get(timeout=90) == (True, 0)
    finally:
        process.join(30)
    assert process.exitcode == 0 and torch.equal(answers(model), right)


def test_shortcuts_read_memory_that_torch_has_moved(tmp_path):
    """torch moves a tensor in place when it shares it with another process, and says it to nobody."""
    model = floats_of("deepseek_v3", tmp_path)
    right = answers(model)
    block = model.model.layers[1].mlp
    shared, experts = (block.experts.counts, block.gate.e_score_correction_bias.detach()), block.experts.num_experts
    before, where = block.experts.counts.clone(), [tensor.data_ptr() for tensor in shared]
    for tensor in shared:
        tensor.share_memory_()
    assert all(tensor.data_ptr() != address for tensor, address in zip(shared, where, strict=True))
    assert torch.equal(answers(model), right)
    assert (block.experts.counts - before)[:experts].sum() == IDS.numel() * model.config.num_experts_per_tok


def test_a_layer_of_its_own_makes_its_shortcuts_anew(chat):
    layer = copy.deepcopy(chat.model.layers[0])
    assert isinstance(layer, Layer) and valid_fast_path(layer) is not None and layer.fused_group is None
    assert all(module.is_ready for module in layer.modules() if isinstance(module, Operator))


EDITS = [
    ("model.layers.1.self_attn.o_proj", "weight"),
    ("model.layers.1.self_attn", "kv_b_proj"),
    ("model.layers.1.mlp.experts", "down_proj"),
    ("model.embed_tokens", "weight"),
]


@pytest.mark.parametrize("path,name", EDITS)
def test_edited_weights_are_copied_and_pickled_as_they_are(tmp_path, path, name):
    model = floats_of("deepseek_v3", tmp_path)
    right, twin = answers(model), copy.deepcopy(model)
    (counted,) = model.ktx.activity().values()
    often = max(range(16), key=lambda number: counted.activations[number])
    with ktx.edit(twin.get_submodule(path), name, expert=often if name == "down_proj" else None) as weight:
        weight.mul_(-1)
    assert torch.equal(answers(model), right)  # what they shared was not written to
    changed = answers(twin)
    assert not torch.allclose(changed, right, atol=1e-3)
    for other in (copy.deepcopy(twin), pickled(twin)):
        assert torch.allclose(answers(other), changed, atol=1e-6)
    twin.save_pretrained(tmp_path / "edited")
    assert torch.allclose(answers(load(tmp_path / "edited", None)), changed, atol=1e-3)


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_what_is_tied_in_a_model_is_tied_in_its_copy(tmp_path, make):
    model = floats_of("qwen2", tmp_path)
    right, twin = answers(model), make(model)
    with ktx.edit(twin.model.embed_tokens) as weight:
        weight[5] += 1
    assert twin.lm_head.parts[0] is twin.model.embed_tokens.packed
    assert torch.equal(answers(model), right) and model.lm_head.parts[0] is model.model.embed_tokens.packed
    assert not torch.allclose(answers(twin)[..., 5], right[..., 5], atol=1e-3)
