"""The self-test at the end of loading: a broken model is refused by what it computes, a right one never, and nothing is
left behind.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

import ktx
from ktx.cache.kv import KVCache
from ktx.engine import runner, runner_selection
from ktx.engine.runner import ModelRunner, SequentialRunner
from ktx.engine.sampler import SamplingParams
from ktx.errors import SelfTestFailed, UsageError
from ktx.model import self_test as selftest
from ktx.ops.base import Operator
from ktx.ops.experts import experts_by_path
from ktx.ops.linear import Linear
from ktx.transformers_compat import default_cache_name
from tests.families.test_families import FAMILIES, load, mixed
from tests.support import preloaded_process
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_chat_model import tokenizer, write_model
from tests.support.tiny_models import MOE, tiny

CACHE = ("past_key_values", "cache")  # what versions of transformers call it


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def folder(request, tmp_path_factory):
    quant = (
        "F32" if request.param == "qwen3_next" else "Q8_0"
    )  # roundings to eight bits move it as far as a wrong position
    return write_model(tmp_path_factory.mktemp("selftest") / request.param, request.param, quant)


@pytest.fixture
def model(folder):
    return load(folder, folder / "model.gguf", self_test=False)


def last(model):
    """A layer that attends."""
    return model.model.layers[-1]


def without_cache(words):
    return {name: None if name in CACHE else value for name, value in words.items()}


def forgetful(layer):
    whole = layer.forward
    layer.forward = lambda hidden, **words: whole(hidden, **without_cache(words))


def drops_the_cache(model):
    for layer in model.model.layers:
        forgetful(layer)


def drops_the_cache_in_one_layer(model):
    forgetful(last(model))


def writes_but_does_not_read(model):
    layer = last(model)
    whole = layer.forward

    def forward(hidden, **words):
        whole(hidden, **words)
        return whole(hidden, **without_cache(words))

    layer.forward = forward


def counts_positions_from_zero(model):
    rotary = model.model.rotary_emb
    whole = rotary.forward
    rotary.forward = lambda x, position_ids, *more, **words: whole(x, position_ids - position_ids.min(), *more, **words)


def is_one_position_ahead(model):
    rotary = model.model.rotary_emb
    whole = rotary.forward
    rotary.forward = lambda x, position_ids, *more, **words: whole(
        x, position_ids + (position_ids.min() > 0), *more, **words
    )


def linear_of(model, name):
    return next(m for path, m in model.named_modules() if path.endswith(name) and isinstance(m, Linear))


def zeroed_projection(model):
    for part in linear_of(model, "layers.1.mlp.down_proj" if not experts_by_path(model) else "o_proj").parts:
        part.data.zero_()


def zeroed_layer(model):
    for module in last(model).modules():
        for part in getattr(module, "parts", ()):
            part.data.zero_()
        for weights in getattr(module, "weights", {}).values():
            weights.data.zero_()


def made_anew(model):
    """The last layer and its norm take their weights again."""
    for module in (last(model).input_layernorm, last(model)):
        if isinstance(module, Operator):
            module.ready()


def zeroed_norm(model):
    norm = last(model).input_layernorm
    norm.weight.data.fill_(-1.0 if getattr(norm, "plus_one", False) else 0.0)
    made_anew(model)


def nan_in_a_norm(model):
    last(model).input_layernorm.weight.data[3] = torch.nan
    made_anew(model)


def nan_in_the_output(model):
    model.lm_head.parts[0].data[:64] = 0xFF  # scales of Q8_0 among them, or numbers


def infinite_embedding(model):
    whole = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: whole(ids) + torch.inf


def constant_logits(model):
    for part in model.lm_head.parts:
        part.data.zero_()


def same_logits_for_all(model):
    whole = model.model.norm.forward
    model.model.norm.forward = lambda hidden: whole(torch.ones_like(hidden))


BROKEN = {
    drops_the_cache: "through the cache differs by [0-9.]+% .*transformers [0-9.]+",
    drops_the_cache_in_one_layer: r"through the cache differs by [0-9.]+% .* from model.layers.\d+",
    writes_but_does_not_read: "through the cache differs by [0-9.]+%",
    counts_positions_from_zero: "through the cache differs by [0-9.]+%",
    is_one_position_ahead: "through the cache differs by [0-9.]+%",
    zeroed_projection: r"model.layers.\d.* returns the same output for different tokens",
    zeroed_layer: r"model.layers.\d.* returns the same output for different tokens",
    zeroed_norm: r"model.layers.\d.* returns the same output for different tokens",
    nan_in_a_norm: r"not finite, from model.layers.\d.* on",
    nan_in_the_output: "not finite, from lm_head on",
    infinite_embedding: "not finite, from model.embed_tokens on",
    constant_logits: "all logits of a token are equal",
    same_logits_for_all: "logits of different tokens are equal",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_broken_model_is_refused(model, breaks):
    selftest.check(model)
    breaks(model)
    with pytest.raises(SelfTestFailed, match=BROKEN[breaks]) as refused:
        selftest.check(model)
    assert refused.value.exit_code == 4 and "\n" not in str(refused.value)
    for word in ("ktx verify", "--no-self-test", "self_test=False", f"torch {torch.__version__}"):
        assert word in str(refused.value)


def seeded(folder, family, quant, seed, monkeypatch):
    """A tiny model with other random weights than the family's usual ones."""
    seeding = torch.manual_seed
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda usual: seeding(seed))
        original = tiny(family)
    original.config.save_pretrained(folder)
    write_gguf(folder / "model.gguf", original, quant)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_model_is_not_refused(family, tmp_path, monkeypatch):
    for seed, quant in ((11, "F32"), (12, "Q8_0"), (13, mixed)):
        seeded(tmp_path, family, quant, seed, monkeypatch)
        for kv_dtype in ("f16", "q8_0"):
            model = load(tmp_path, tmp_path / "model.gguf", kv_dtype=kv_dtype)  # with its self-test
            assert type(runner_selection.select_runner(model, 2)) is ModelRunner  # and that of pages


def test_nothing_is_left_behind(folder):
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    model = load(folder, folder / "model.gguf")
    selftest.check(model)
    assert torch.equal(torch.rand(3), drawn)
    assert not any(any(experts.total_counts()) for _, experts in experts_by_path(model))
    assert not any(
        module._forward_hooks for module in model.modules() if "RotaryEmbedding" not in type(module).__name__
    )


def test_counts_from_before_stay(tmp_path):
    folder = write_model(tmp_path, "qwen3_moe")
    model = load(folder, folder / "model.gguf")
    with torch.inference_mode():
        model(torch.tensor([[5, 6, 7]]))
    before = {path: experts.total_counts().clone() for path, experts in experts_by_path(model)}
    selftest.check(model)
    assert before and all(torch.equal(experts.total_counts(), before[path]) for path, experts in experts_by_path(model))


def test_two_forwards_of_two_tokens_and_one(folder, monkeypatch):
    model, seen = load(folder, folder / "model.gguf", self_test=False), []
    model.register_forward_pre_hook(lambda _, args, words: seen.append(words["input_ids"].shape[1]), with_kwargs=True)
    selftest.check(model)
    assert seen == ([2, 1] if KVCache(model.config).can_crop else [2, 1, 1])


def test_one_pair_of_tokens_may_differ():
    def attempts(*shown):
        asked = []

        def attempt(number):
            asked.append(number)
            return selftest.Fault(f"fault {number}", shown[number] == 2) if shown[number] else None

        return selftest.judge(attempt), len(asked)

    assert attempts(0, 1, 1, 1, 1) == ("", 1)
    assert attempts(1, 0, 1, 0, 0) == ("", 5)
    assert attempts(1, 0, 1, 0, 1) == ("fault 0", 5)
    assert attempts(1, 1, 1, 1, 1) == ("fault 0", 5)
    assert attempts(1, 2, 0, 0, 0) == ("fault 1", 2)


@pytest.mark.parametrize(
    "fars,noises,refused",
    [
        ([0.02] * 5, [0.0] * 5, True),
        ([0.02] * 5, [0.01, 0.02, 1e-6, 0.03, 0.02], False),  # many layers, each of which turns roundings
        ([0.02] * 5, [1e-6, 0.02, 1e-6, 1e-6, 0.02], True),
        ([0.9] * 5, [0.5] * 5, True),  # whatever a rounding does
    ],
)
def test_a_difference_counts_beside_what_rounding_does(fars, noises, refused):
    shown = [selftest.Fault("far", distance=far, noise=noise) for far, noise in zip(fars, noises, strict=True)]
    assert selftest.judge(lambda number: shown[number]) == ("far" if refused else "")


def test_an_error_of_a_known_family_is_a_fault_and_of_another_its_own_affair(tmp_path, caplog):
    def refuses(model):
        whole = model.model.forward

        def forward(*args, **words):
            if isinstance(words.get(default_cache_name()), KVCache):
                raise TypeError("what is a KVCache?")
            return whole(*args, **words)

        model.model.forward = forward

    folder = write_model(tmp_path / "llama")
    model = load(folder, folder / "model.gguf")
    refuses(model)
    with pytest.raises(SelfTestFailed, match="raises TypeError: what is a KVCache?"):
        selftest.check(model)
    tiny("smollm3").save_pretrained(tmp_path / "smollm3")
    model = load(tmp_path / "smollm3", None)
    refuses(model)
    selftest.check(model)
    assert "this smollm3 does not accept a KVCache (what is a KVCache?)" in caplog.text
    drops_the_cache(model)
    with pytest.raises(SelfTestFailed, match="through the cache"):
        selftest.check(model)


def test_an_engine_proves_its_pages(folder, monkeypatch):
    model = load(folder, folder / "model.gguf")
    if not isinstance(runner_selection.select_runner(model, 2), ModelRunner):
        pytest.fail("pages are not read at all")
    span = runner.SequenceSpan
    monkeypatch.setattr(runner, "SequenceSpan", lambda past, **rest: span(past=0, **rest))  # where nothing was before
    if model.config.model_type != "qwen3_next":  # its states go by the owner, its one attending layer by the past
        with pytest.raises(SelfTestFailed, match="through the cache"):
            runner_selection.select_runner(model, 2)
    monkeypatch.setattr(runner, "SequenceSpan", lambda owner, past, **rest: span(owner=owner + past, past=past, **rest))
    if model.config.model_type == "qwen3_next":
        with pytest.raises(SelfTestFailed, match="continues after 1 tokens"):
            runner_selection.select_runner(model, 2)
    model.ktx.self_test = False
    assert type(runner_selection.select_runner(model, 2)) is ModelRunner


@pytest.mark.parametrize("family", ["qwen3_moe", "smollm3"])
def test_an_engine_makes_the_test_that_loading_left_to_it(family, tmp_path, monkeypatch):
    known = family in FAMILIES
    if known:
        write_model(tmp_path, family)
    else:
        tiny(family).save_pretrained(tmp_path)
    asked = []
    for place in (selftest, runner_selection):
        monkeypatch.setattr(place, "check", lambda model, forward=None: asked.append(type(forward).__name__))
    pages = ["PagedForward"] * known
    for self_test, wanted in ((True, ["NoneType", *pages]), ("engine", pages or ["NoneType"]), (False, [])):
        asked.clear()
        runner_selection.select_runner(
            load(tmp_path, tmp_path / "model.gguf" if known else None, self_test=self_test), 2
        )
        assert asked == wanted


@pytest.mark.parametrize("wish", ["no", "Engine", 2, None])
def test_what_is_no_wish_for_a_self_test_is_refused(folder, wish):
    with pytest.raises(UsageError, match="self_test=.*must be True, False or 'engine'"):
        load(folder, folder / "model.gguf", self_test=wish)


EXAONE = MOE | {
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}


@pytest.mark.parametrize("kv_dtype", ["f16", "q8_0", "f32"])
def test_exaone_moe_is_served(tmp_path, kv_dtype):
    tiny("exaone_moe", **EXAONE).save_pretrained(tmp_path)
    model = load(tmp_path, None, kv_dtype=kv_dtype, quantize="int8")
    model.ktx.tokenizer = tokenizer()
    with model.ktx.engine(kv_cache_tokens=1024) as engine:
        assert type(engine.runner) is not SequentialRunner
        events = [
            event for _, event in engine.generate([[5, 9, 200]], SamplingParams(max_new_tokens=3, ignore_eos=True))
        ]
    assert len(events[-1].ids) == 3


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """A chat model on disk whose output layer is zero."""
    folder = tmp_path_factory.mktemp("silent")
    original = tiny("llama")
    with torch.no_grad():
        original.lm_head.weight.zero_()
    original.config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    write_gguf(folder / "model.gguf", original, "F32")
    return folder


def test_layers_of_zeros_in_the_file_are_no_fault(tmp_path, caplog):
    """A model made by hand may say by its output layer alone what follows what."""
    model = tiny("llama")
    for name, p in model.named_parameters():
        if "layers" in name and "norm" not in name:
            p.data.zero_()
    model.save_pretrained(tmp_path)
    load(tmp_path, tmp_path)
    assert "is all zeros in the file" in caplog.text


def run(*words):
    return preloaded_process.run("ktx", *words, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(
    "words",
    [
        ["chat", "-p", "Hello", "--max_new_tokens", "2"],
        ["bench", "-p", "8", "-n", "2", "-r", "1"],
        ["verify", "--tokens", "4"],
        ["serve", "--port", "0"],
    ],
    ids=lambda words: words[0],
)
def test_commands_end_with_status_4(silent, words):
    model = ["--model", str(silent), "--weights", str(silent / "model.gguf")]
    done = run(*words, *model)
    assert done.returncode == 4, done.stderr
    said = [line for line in done.stderr.splitlines() if "self-test" in line]
    assert said and re.search("all logits of a token are equal.*run `ktx verify`", said[-1])
    if words[0] in ("chat", "verify"):
        done = run(*words, *model, "--no-self-test")
        assert done.returncode == 0, done.stderr


def test_a_wrong_file_loads_when_it_is_asked_for(silent):
    with pytest.raises(SelfTestFailed):
        ktx.load(silent, silent / "model.gguf", progress=False)
    model, _ = ktx.load(silent, silent / "model.gguf", progress=False, self_test=False)
    assert model.ktx.self_test is False
    with model.ktx.engine() as engine:
        assert type(engine.runner) is ModelRunner
