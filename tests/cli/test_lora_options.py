"""--lora of the commands: computed where that means something, refused by name elsewhere."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

import ktx
import ktx.demo
from ktx.__main__ import main
from ktx.errors import DoesNotFit
from ktx.kernels import cpu
from ktx.model.lora import adapter_bytes, match_modules, read_adapter
from ktx.weights.lora import AdapterSpec
from tests.families.test_families import load
from tests.model.test_lora import TARGETS, write
from tests.support.tiny_models import tiny

DEMO = ["--model", str(ktx.demo.path()), "--weights", str(ktx.demo.gguf())]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of the demo model, with random numbers."""
    model, _ = ktx.load(ktx.demo.path(), ktx.demo.gguf(), progress=False)
    torch.manual_seed(3)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["o_proj"],
        target_parameters=["mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    folder = tmp_path_factory.mktemp("adapters") / "style"
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_plan(adapter, capsys):
    assert main(["plan", *DEMO, "--lora", str(adapter), "--lora", f"half={adapter}=0.5"]) == 0
    told = capsys.readouterr().out
    rows = re.findall(r"^adapter (\w+) on cpu: ([\d.]+ \w+)$", told, re.M)
    assert [name for name, _ in rows] == ["style", "half"] and rows[0][1] == rows[1][1]
    assert main(["plan", *DEMO, "--lora", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"]["style"]["cpu"] > 10_000
    plan = ktx.plan(ktx.demo.path(), ktx.demo.gguf(), lora=adapter)
    assert not ktx.plan(ktx.demo.path(), ktx.demo.gguf()).adapters and len(plan.adapters) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_plan_tells_what_adapters_take(family, tmp_path, monkeypatch):
    assert family in TARGETS
    tiny(family, tie_word_embeddings=False).save_pretrained(tmp_path)
    write(family, tmp_path / "one", r=20)
    model = load(tmp_path, None, lora=tmp_path / "one")

    def held(value):
        if isinstance(value, cpu.Packed):
            return value.nbytes
        if isinstance(value, torch.Tensor):
            return value.untyped_storage().nbytes()
        values = (
            value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()
        )
        return sum(map(held, values))

    taken = sum(held(factors) for lora in model.ktx.adapters.loras.values() for factors in lora.factors.values())
    (said,) = [sum(by_device.values()) for by_device in model.ktx.plan.adapters.values()]
    assert (
        taken
        == said
        == sum(adapter_bytes(match_modules(model, read_adapter(AdapterSpec.parse(tmp_path / "one")))).values())
    )
    need = ktx.loader.resources.memory_needed(model.ktx.plan)
    monkeypatch.setattr("ktx.loader.resources.memory", lambda: (1 << 40, need - 1))
    with pytest.raises(DoesNotFit):
        load(tmp_path, None, lora=tmp_path / "one")
    load(tmp_path, None)


@pytest.mark.parametrize(
    "words, told",
    [
        (["plan", *DEMO, "--ram", "8G"], "--lora has no effect on a placement by budget"),
        (["verify", *DEMO], "--lora needs --perplexity FILE"),
        (["verify", "--perplexity", str(ktx.demo.heldout())], "--lora needs --model or --weights"),
        (["bench", *DEMO, "--peer", "llama.cpp"], "--lora: llama.cpp would compute the model without it"),
        (["bench", "--layer", "8,2,64,64"], "--lora has no effect with --layer"),
        (["bench", "serve", *DEMO], "unrecognized arguments: --lora"),
    ],
)
def test_where_adapters_mean_nothing(adapter, words, told, capsys):
    try:
        code = main([*words, "--lora", str(adapter)])
    except SystemExit as end:
        code = end.code
    assert code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["plan"], ["chat", "-p", "x"], ["bench"], ["verify", "--perplexity", str(ktx.demo.heldout())]]
)
def test_an_adapter_that_is_not_there(words, capsys):
    assert main([*words, *DEMO, "--lora", "/nothing/here"]) == 4
    assert "/nothing/here: no such file or folder" in capsys.readouterr().err


def test_perplexity_is_that_of_the_adapted_model(adapter, capsys):
    words = ["verify", *DEMO, "--perplexity", str(ktx.demo.heldout()), "--tokens", "200", "--window", "100", "--json"]
    found = []
    for more in ([], ["--lora", str(adapter)], ["--lora", f"{adapter}=0"]):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"])
    assert found[1] > 1.01 * found[0] and found[2] == pytest.approx(found[0], rel=1e-3)


def test_bench_computes_it(adapter, capsys):
    assert main(["bench", *DEMO, "-p", "16", "-n", "2", "-r", "1", "-t", "1", "--json", "--lora", str(adapter)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
