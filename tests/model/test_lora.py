"""LoRA adapters from files: what PEFT computes with them on transformers' own model, in forwards, and in an engine each
request with its own.
"""

from __future__ import annotations

import itertools
import json
import queue
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

import ktx
from ktx.engine.request import Finished
from ktx.engine.sampler import SamplingParams
from ktx.errors import BadFile, Overloaded, UsageError
from ktx.ops.guard import valid_fast_path
from ktx.ops.linear import Linear
from ktx.ops.lora import AdapterUse
from ktx.weights.lora import CONFIG_FILE, WEIGHTS_FILE, AdapterSpec
from tests.families.test_families import IDS, load, relative
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny

NEAR = 2e-5
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
    "qwen3_moe": ["q_proj", "v_proj", "lm_head"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "o_proj"],
    "qwen3_next": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "o_proj"],
}
EXPERTS = {  # LoraConfig's target_parameters
    "qwen3_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "deepseek_v3": ["mlp.experts.down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "qwen3_next": ["mlp.experts.gate_up_proj"],
}
MORE = [
    {"r": 4, "lora_alpha": 16},
    {
        "r": 3,
        "lora_alpha": 8,
        "use_rslora": True,
        "layers_to_transform": [1],
        "alpha_pattern": {"q_proj": 5, r"o_pro.": 3},
    },
]
PROMPTS = [IDS[0, :20].tolist(), IDS[0, 5:90].tolist(), IDS[0, 40:43].tolist(), IDS[0, :130].tolist()]


@pytest.fixture(scope="module", params=TARGETS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A model, and adapters one, two beside it."""
    made = tmp_path_factory.mktemp(family)
    tiny(family, tie_word_embeddings=False).save_pretrained(made)
    for number, (name, more) in enumerate(zip(("one", "two"), MORE, strict=True)):
        write(family, made / name, seed=number, **more)
    return made


def write(family, folder, seed=0, **more):
    """An adapter of random numbers, by PEFT."""
    torch.manual_seed(70 + seed)
    known = {"target_modules": TARGETS[family], "target_parameters": EXPERTS.get(family)}
    config = LoraConfig(**{**known, "init_lora_weights": False, **more})
    get_peft_model(tiny(family, tie_word_embeddings=False), config).save_pretrained(folder)


@pytest.fixture(scope="module")
def right(family, folder):
    """Logits of transformers' own model for ids, with an adapter."""
    base = tiny(family, tie_word_embeddings=False).eval()
    adapted = PeftModel.from_pretrained(base, folder / "one", adapter_name="one").eval()
    adapted.load_adapter(folder / "two", "two")

    @torch.no_grad()
    def computed(ids, *names):
        if not names:
            with adapted.disable_adapter():
                return adapted(input_ids=ids).logits
        adapted.base_model.set_adapter(list(names))
        return adapted(input_ids=ids).logits

    return computed


@pytest.fixture(scope="module")
def model(folder):
    loaded = load(folder, None, kv_dtype="f32", lora=[str(folder / "one"), folder / "two"])
    loaded.ktx.tokenizer = tokenizer()
    return loaded


@torch.no_grad()
def stepwise(model, ids):
    """Logits of a prompt in three pieces and two tokens."""
    cache, found = None, []
    for piece in ids.split([70, 30, ids.shape[1] - 102, 1, 1], 1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("names", [(), ("one",), ("two",), ("one", "two")], ids=lambda names: "+".join(names) or "none")
def test_forwards_are_those_of_peft(model, right, names):
    expected = right(IDS, *names)
    assert not names or relative(expected, right(IDS)) > 1e-2
    model.ktx.use_lora(*names)
    with torch.no_grad():
        assert relative(model(input_ids=IDS).logits, expected) < NEAR
        assert relative(model(input_ids=IDS.expand(3, -1)).logits[2:], expected) < NEAR
    model.ktx.use_lora()


def answer(logits, prompt, count=6):
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def ask(engine, asked, new=6, **more):
    """Answers of (prompt, adapters) side by side, and of each how much of its prompt was cached."""
    events = queue.SimpleQueue()
    sampling = SamplingParams(max_new_tokens=new, ignore_eos=True, **more)
    for i, (prompt, lora) in enumerate(asked):
        engine.submit(prompt, sampling, lambda event, i=i: events.put((i, event)), lora=lora)
    done = {}
    while len(done) < len(asked):
        i, event = events.get(timeout=120)
        if isinstance(event, Finished):
            assert event.reason == "length", event.error
            done[i] = event
    return [done[i].ids for i in range(len(asked))], [done[i].usage.cached for i in range(len(asked))]


def test_requests_of_one_step_have_their_own_adapters(model, right):
    choices = [(), ("one",), "two", ("two", "one")]
    asked = [(prompt, choices[(i + j) % 4]) for j, prompt in enumerate(PROMPTS) for i in range(4)]
    with model.ktx.engine(max_batch_size=6, kv_cache_tokens=4096) as engine:
        found, cached = ask(engine, asked)
        again, cached_again = ask(engine, asked)
        engine.check_integrity()
    for (prompt, lora), ids in zip(asked, found, strict=True):
        names = (lora,) if isinstance(lora, str) else lora
        assert ids == answer(lambda ids, names=names: right(ids, *names), prompt), (len(prompt), lora)
    assert again == found
    assert cached == [0] * len(asked), "a prompt has pages of one with another adapter"
    assert max(cached_again) >= 128 or engine.runner.recurrent  # of which few states are kept


def test_requests_that_name_none_have_those_in_use(model, right):
    model.ktx.use_lora("two")
    try:
        with model.ktx.engine(max_batch_size=2, kv_cache_tokens=1024) as engine:
            (ids, base), _ = ask(engine, [(PROMPTS[0], None), (PROMPTS[0], ())])
        with torch.no_grad():
            assert relative(model(input_ids=IDS).logits, right(IDS, "two")) < NEAR
    finally:
        model.ktx.use_lora()
    assert ids == answer(lambda ids: right(ids, "two"), PROMPTS[0])
    assert base == answer(right, PROMPTS[0])
    with torch.no_grad():
        assert relative(model(input_ids=IDS).logits, right(IDS)) < NEAR


def test_adapters_come_and_go_in_a_running_engine(folder, right):
    mine = load(folder, None, kv_dtype="f32")
    mine.ktx.tokenizer = tokenizer()
    prompt, long = PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True)
    events = queue.SimpleQueue()

    def beside(name):
        """A request that runs while others are asked: what is still to come of it."""
        engine.submit(prompt, long, events.put, lora=name)
        events.get(timeout=120)

    def ended():
        return next(event for event in iter(events.get, None) if isinstance(event, Finished))

    with mine.ktx.engine(max_batch_size=4, kv_cache_tokens=4096) as engine:
        plain = ask(engine, [(prompt, ())])[0]
        assert engine.load_lora(folder / "one", "style") == "style"
        with pytest.raises(UsageError, match="already"):
            engine.load_lora(folder / "two", "style")
        one = ask(engine, [(prompt, "style"), (prompt, ())])[0]
        beside("style")
        engine.load_lora(folder / "two", "style", replace=True)
        two, cached = ask(engine, [(prompt, "style"), (prompt, ())])
        engine.unload_lora("style")
        for missing in (lambda: engine.unload_lora("style"), lambda: ask(engine, [(prompt, "style")])):
            with pytest.raises(UsageError, match="none is loaded|no LoRA adapter named"):
                missing()
        assert ended().ids[:6] == one[0]
        assert ask(engine, [(prompt, ())])[0] == plain
        engine.check_integrity()
        assert not mine.ktx.loras and not engine.unloading_adapters and not mine.ktx.adapters.loras
    assert plain[0] == one[1] == two[1] == answer(right, prompt)
    assert one[0] == answer(lambda ids: right(ids, "one"), prompt)
    assert two[0] == answer(lambda ids: right(ids, "two"), prompt) and cached[0] == 0
    with pytest.raises(Overloaded, match="closed"):
        engine.load_lora(folder / "one")


def test_a_factor_on_a_requests_adapter(model, folder):
    """What an adapter that was loaded with this scale computes, in steps with requests of other factors."""
    model.ktx.load_lora(folder / "one", "half", 0.5)
    pairs = [
        (AdapterUse("one", 0.5), "half"),
        ((AdapterUse("one", 0.5), "two"), ("half", "two")),
        (AdapterUse("half", 2.0), "one"),
    ]
    try:
        with model.ktx.engine(max_batch_size=6, kv_cache_tokens=4096) as engine:
            asked = [(prompt, lora) for prompt in PROMPTS[:3] for pair in pairs for lora in pair]
            found, cached = ask(engine, asked)
            base, none = ask(engine, [(PROMPTS[1], ()), (PROMPTS[1], AdapterUse("one", 0.0))])[0]
    finally:
        model.ktx.unload_lora("half")
    assert found[::2] == found[1::2] and base == none
    assert len({tuple(ids) for ids in found[:6]}) == 3 and cached == [0] * len(asked)


def test_generate(model, right):
    model.ktx.use_lora("one")
    ids = torch.tensor([PROMPTS[0]])
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = model.generate(input_ids=ids, generation_config=settings)[0, ids.shape[1] :]
    model.ktx.use_lora()
    assert found.tolist() == answer(lambda ids: right(ids, "one"), PROMPTS[0])


def blocks(model):
    found = [getattr(layer, name, None) for layer in model.model.layers for name in ("self_attn", "mlp")]
    return [valid_fast_path(module) is not None for module in found if getattr(module, "block", None) is not None]


def test_blocks_without_an_adapter_stay_one_call(family, folder):
    mine = load(folder, None, kv_dtype="f32")
    whole = blocks(mine)
    mine.ktx.load_lora(folder / "two")
    assert blocks(mine) == whole
    mine.ktx.use_lora("two")
    some = blocks(mine)
    assert sum(some) < sum(whole) and (some[0] or family in EXPERTS)  # of which it has all layers'
    mine.ktx.use_lora()
    assert blocks(mine) == whole
    mine.ktx.unload_lora("two")
    assert not mine.ktx.loras and not any("lora" in module.__dict__ for module in mine.modules())


def test_a_scale_and_a_name(folder, right):
    mine = load(folder, None, kv_dtype="f32", lora=f"style={folder / 'one'}=0.5")
    half = load(folder, None, kv_dtype="f32")
    path = folder / "half"
    shutil.copytree(folder / "one", path)
    config = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 8}))
    half.ktx.load_lora(path, "half"), half.ktx.use_lora("half")
    shutil.rmtree(path)
    assert list(mine.ktx.loras) == ["style"] and list(half.ktx.loras) == ["half"]
    with torch.no_grad():
        first, second = mine(input_ids=IDS).logits, half(input_ids=IDS).logits
    assert torch.equal(first, second) and relative(first, right(IDS, "one")) > 1e-3


@pytest.mark.parametrize(
    "text, name, scale",
    [
        ("a/b", "b", 1.0),
        ("a/b/", "b", 1.0),
        ("a/b=0.5", "b", 0.5),
        ("n=a/b", "n", 1.0),
        ("n=a/b=-2e-1", "n", -0.2),
        ("a/b/adapter_model.safetensors", "b", 1.0),
    ],
)
def test_what_an_adapter_is_called(text, name, scale):
    wish = AdapterSpec.parse(text)
    assert (wish.name, wish.scale) == (name, scale) and str(wish.path) == text.removeprefix("n=").split("=")[0].rstrip(
        "/"
    )


@pytest.mark.parametrize("text", ["a=nan", "=a", "n="])
def test_what_is_no_adapter_is_refused(text):
    with pytest.raises(UsageError, match="scale|NAME="):
        AdapterSpec.parse(text)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_that_were_adapted_one_by_one(name, tmp_path):
    """As PEFT wrote them where experts were modules of their own: some of the experts, some of their projections."""
    base = tiny(name, tie_word_embeddings=False).eval()
    base.save_pretrained(tmp_path)
    experts = base.model.layers[1].mlp.experts
    width, hidden = experts.down_proj.shape[2], experts.down_proj.shape[1]
    where, (gate, up, down) = {
        "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
        "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    }[name]
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    with torch.no_grad():
        for number, projection in ((0, gate), (0, up), (0, down), (2, up), (3, down)):
            rows, columns = (hidden, width) if projection == down else (width, hidden)
            a, b = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((4, columns), (rows, 4)))
            path = f"base_model.model.model.layers.1.{where}.experts.{number}.{projection}"
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            if projection == down:
                experts.down_proj[number] += 2 * b @ a
            else:
                half = slice(0, width) if projection == gate else slice(width, 2 * width)
                experts.gate_up_proj[number, half] += 2 * b @ a
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS_FILE)
    (adapter / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    mine = load(tmp_path, None, kv_dtype="f32", lora=adapter)
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
        assert relative(mine(input_ids=IDS).logits, expected) < NEAR
        mine.ktx.use_lora()
        assert relative(mine(input_ids=IDS).logits, expected) > 1e-3
    save_file({key.replace("experts.3", "experts.33"): value for key, value in tensors.items()}, adapter / WEIGHTS_FILE)
    with pytest.raises(BadFile, match="experts 0 to 33"):
        mine.ktx.load_lora(adapter, "other")


PATTERNS = [
    {"alpha_pattern": {"experts.down_proj": 40, "o_proj": 3}},
    {"rank_pattern": {"experts.down_proj": 2, "mlp.experts.gate_up_proj": 6}, "use_rslora": True},
    {"rank_pattern": {r".*\.1\..*gate_up_proj": 2}, "alpha_pattern": {"experts": 40}},  # the latter matches nothing
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of PEFT, which looks for patterns among modules alone
@pytest.mark.parametrize("patterns", PATTERNS, ids=["alpha", "rank", "layer"])
@pytest.mark.parametrize("name", EXPERTS)
def test_patterns_are_of_the_parameters_that_they_name(name, patterns, tmp_path):
    base = tiny(name, tie_word_embeddings=False)
    base.save_pretrained(tmp_path)
    write(name, tmp_path / "one", r=4, lora_alpha=8, **patterns)
    mine = load(tmp_path, None, kv_dtype="f32", lora=tmp_path / "one")
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        right = PeftModel.from_pretrained(base, tmp_path / "one").eval()(input_ids=IDS).logits
        assert relative(right, plain) > 1e-2
        assert relative(mine(input_ids=IDS).logits, right) < NEAR


# ---- one family suffices for what follows


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    made = tmp_path_factory.mktemp("plain")
    tiny("llama", tie_word_embeddings=False).save_pretrained(made)
    write("llama", made / "one", r=4, target_modules=["q_proj", "v_proj"])
    return made


@pytest.fixture
def changed(plain, tmp_path):
    """An adapter with another configuration, or other tensors."""

    def make(config=None, tensors=None):
        folder = tmp_path / "adapter"
        shutil.copytree(plain / "one", folder)
        if config:
            known = json.loads((folder / CONFIG_FILE).read_text())
            (folder / CONFIG_FILE).write_text(json.dumps(known | config))
        if tensors:
            save_file(tensors(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE)
        return folder

    return make


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "config, kind, words",
    [
        ({"peft_type": "IA3"}, UsageError, "peft_type IA3"),
        ({"use_dora": True}, UsageError, "use_dora"),
        ({"bias": "all"}, UsageError, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, UsageError, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, UsageError, "pissa"),
        ({"alora_invocation_tokens": [1, 2]}, UsageError, "alora_invocation_tokens"),
        ({"a_new_kind_of_adapter": 3}, UsageError, "a_new_kind_of_adapter"),
        ({"r": 0}, BadFile, "r is 0"),
        ({"r": 8}, BadFile, "r is 8"),
        ({"lora_alpha": "much"}, BadFile, "lora_alpha"),
        ({"lora_alpha": 1e300}, BadFile, "q_proj contain NaN or infinity, or do so at this scale"),
        ({"rank_pattern": ["q_proj"]}, BadFile, r"rank_pattern is \['q_proj'\], it must be an object"),
        ({"rank_pattern": {"q_proj": "four"}}, BadFile, "r is 'four'"),
        (
            {"alpha_pattern": {"(q_proj": 4}},
            BadFile,
            r"alpha_pattern has '\(q_proj', which is not a valid regular expression",
        ),
        ({"alpha_pattern": 4}, BadFile, "alpha_pattern is 4"),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused(plain, changed, config, kind, words):
    with pytest.raises(kind, match=words):
        load(plain, None, lora=changed(config))


@pytest.mark.parametrize(
    "change, kind, words",
    [
        (lambda t: {k: v for k, v in t.items() if k != FIRST}, BadFile, "has lora_B but no lora_A"),
        (lambda t: t | {FIRST: t[FIRST][:2].contiguous()}, BadFile, "ranks"),
        (
            lambda t: t | {FIRST: t[FIRST][:, :-1].contiguous()},
            BadFile,
            r"q_proj is \[256, 255\] in the adapter, but \[256, 256\] in the model",
        ),
        (lambda t: t | {FIRST: t[FIRST].to(torch.int8)}, BadFile, "int8"),
        (lambda t: t | {"something.else": torch.ones(2, 2)}, UsageError, "something.else"),
        (lambda t: t | {"model.norm.weight": torch.ones(256)}, UsageError, "full weight of model.norm"),
        (lambda t: t | {"lm_head.weight": torch.ones(322, 256)}, BadFile, r"lm_head of \[322, 256\]"),
        (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, BadFile, "no module model.layers.7"),
        (lambda t: {k.replace("q_proj", "rotary"): v for k, v in t.items()}, BadFile, "no module"),
        (lambda t: {k.replace("self_attn.q_proj", "input_layernorm"): v for k, v in t.items()}, UsageError, "RMSNorm"),
        (lambda t: {k.replace("lora_", "lora_embedding_"): v for k, v in t.items()}, BadFile, "a lookup of"),
        (lambda t: {}, BadFile, "no tensor"),
    ],
)
def test_tensors_that_mean_nothing_here_are_refused(plain, changed, change, kind, words):
    mine = load(plain, None)
    with torch.no_grad():
        before = mine(input_ids=IDS).logits
    path = changed(tensors=change)
    with pytest.raises(kind, match=words):
        mine.ktx.load_lora(path)
    assert not mine.ktx.loras
    with torch.no_grad():
        assert torch.equal(mine(input_ids=IDS).logits, before)
    with pytest.raises(kind, match=words):
        load(plain, None, lora=path)


def test_files_that_are_not_there_or_broken(plain, changed, tmp_path):
    with pytest.raises(BadFile, match="no such file or folder"):
        load(plain, None, lora=tmp_path / "nothing")
    folder = changed()
    (folder / WEIGHTS_FILE).write_bytes(b"no tensors")
    with pytest.raises(BadFile, match="is not a safetensors file"):
        load(plain, None, lora=folder)
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(BadFile, match="pickle"):
        load(plain, None, lora=folder)
    shutil.copy(plain / "one" / WEIGHTS_FILE, folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(BadFile, match="no adapter_config.json"):
        load(plain, None, lora=folder / WEIGHTS_FILE)


def test_forwards_beside_an_engine_are_computed_with_the_adapters_in_use(plain, tmp_path):
    """On another thread than the engine's, whose steps have others."""
    write("llama", tmp_path / "two", seed=1, r=3)
    mine = load(plain, None, kv_dtype="f32", lora=[plain / "one", tmp_path / "two"])
    mine.ktx.tokenizer = tokenizer()
    ids = IDS[:, : len(PROMPTS[2])]
    expected = {}
    for name in ("one", "two", ""):
        mine.ktx.use_lora(*filter(None, [name]))
        with torch.no_grad():
            expected[name] = mine(input_ids=IDS[:, :20]).logits, mine(input_ids=ids).logits
    wrong, done = [], threading.Event()

    def forwards():
        with torch.no_grad():
            for name in itertools.cycle(("one", "", "two")):
                mine.ktx.use_lora(*filter(None, [name]))
                for right, given in zip(expected[name], (IDS[:, :20], ids), strict=True):
                    if relative(mine(input_ids=given).logits, right) > NEAR:
                        wrong.append(name)
                if done.is_set():
                    return

    with mine.ktx.engine(max_batch_size=2, kv_cache_tokens=1024, prefix_cache=False) as engine:
        alone = [ask(engine, [(PROMPTS[2], name)], new=24)[0] for name in ("one", (), "two")]
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(forwards)
            for _ in range(3):
                beside = [ask(engine, [(PROMPTS[2], name)], new=24)[0] for name in ("one", (), "two")]
                assert beside == alone
            done.set()
            asked.result(timeout=60)
    assert not wrong


def test_names(plain):
    mine = load(plain, None)
    assert mine.ktx.load_lora(plain / "one") == "one"
    with pytest.raises(UsageError, match="already"):
        mine.ktx.load_lora(plain / "one")
    for wrong in (lambda: mine.ktx.use_lora("ones"), lambda: mine.ktx.unload_lora("ones")):
        with pytest.raises(UsageError, match=re.escape("no LoRA adapter named 'ones' (did you mean 'one'?)")):
            wrong()
    with pytest.raises(UsageError, match="two LoRA adapters"):
        load(plain, None, lora=[plain / "one", plain / "one"])
    mine.ktx.tokenizer = tokenizer()
    with mine.ktx.engine(kv_cache_tokens=512) as engine, pytest.raises(UsageError, match="no LoRA adapter named 'x'"):
        engine.submit([1], SamplingParams(), print, lora="x")


def test_a_copy_has_the_adapters(plain, tmp_path):
    import copy
    import pickle

    mine = load(plain, None, lora=plain / "one")
    with torch.no_grad():
        expected = mine(input_ids=IDS).logits
        for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert torch.equal(other(input_ids=IDS).logits, expected) and other.ktx.loras.keys() == {"one"}
            other.ktx.use_lora()
            assert not torch.equal(other(input_ids=IDS).logits, expected)
            assert torch.equal(mine(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", ["dequantize", "requires_grad_", "exchange"])
@torch.no_grad()
def test_an_adapter_of_a_module_that_is_gone_is_refused(plain, change, before):
    """What is there now may have it when it is loaded once more."""
    model = load(plain, None, kv_dtype="f32", lora=plain / "one")
    model.ktx.tokenizer = tokenizer()
    attention, first = model.model.layers[0].self_attn, IDS[:1, :9]
    right = model(input_ids=first).logits
    if not before:
        model.ktx.use_lora()
    if change == "requires_grad_":
        attention.v_proj.requires_grad_(True)
    else:
        attention.v_proj = (
            ktx.dequantize(attention.v_proj)
            if change == "dequantize"
            else nn.Linear(*attention.v_proj.weight.shape[::-1])
        )
    model.ktx.use_lora()
    model(input_ids=first)
    model.ktx.use_lora("one")
    with pytest.raises(UsageError, match=r"v_proj was replaced, or converted to floats.*'one'.*unload_lora"):
        model(input_ids=first)
    with pytest.raises(UsageError, match="v_proj was replaced"):
        model.ktx.engine()
    model.ktx.use_lora()
    with model.ktx.engine() as engine:
        finished = [
            event for _, event in engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2), lora=("one",))
        ][-1]
        assert finished.reason == "error" and "v_proj was replaced" in finished.error
    model.ktx.unload_lora("one")
    if change != "exchange":
        model.ktx.load_lora(plain / "one", "one")
        model.ktx.use_lora("one")
        assert relative(model(input_ids=first).logits, right) < NEAR


def test_modules_that_rules_leave_to_torch_take_adapters(plain):
    rules = plain / "rules.yaml"
    rules.write_text(
        "- match: {name: '\\.o_proj$', class: torch.nn.Linear}\n  replace: {class: ktx.ops.linear.Linear}\n"
    )
    mine = load(plain, None, rules=rules, lora=plain / "one", kv_dtype="f32")
    assert type(mine.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert isinstance(mine.model.layers[0].self_attn.o_proj, Linear)
    adapted = PeftModel.from_pretrained(tiny("llama", tie_word_embeddings=False).eval(), plain / "one").eval()
    with torch.no_grad():
        assert relative(mine(input_ids=IDS).logits, adapted(input_ids=IDS).logits) < NEAR


def test_gradients_of_inputs_go_through_adapters(plain):
    mine = load(plain, None, lora=plain / "one")
    adapted = PeftModel.from_pretrained(tiny("llama", tie_word_embeddings=False).eval(), plain / "one").eval()
    found = []
    for each in (mine, adapted):
        inputs = adapted.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=inputs).logits.square().sum().backward()
        found.append(inputs.grad)
    assert relative(*found) < 1e-3
