"""Where modules are: the map of a rule file, the options that say the same, and what both do to a plan."""

from __future__ import annotations

import re
import warnings

import pytest

import ktx
import ktx.demo
from ktx.errors import BadFile, UsageError
from ktx.injection.device_map import PlacementOptions, format_ranges, merge_options, parse_entry, split_layers
from ktx.injection.rules import load_rules, parse_rules, rule_folder
from tests.support.tiny_models import FAMILIES, tiny

PLACEMENTS = {"gpu-cpu": {"cpu", "cuda:0"}, "gpu-only": {"cuda:0"}, "multi-gpu": {"cuda:0", "cuda:1"}}
PLACEMENTS["multi-gpu-cpu"] = {"cpu", "cuda:0", "cuda:1"}
DEMO = ktx.demo.path(), ktx.demo.gguf()
MAP = """
rules: deepseek-v3
devices:
  all: cuda:0
  layers 1-2: cuda:1
  experts: cpu
  '\\.self_attn$': cuda
"""


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("KTX_GPU", "fake:2")


@pytest.fixture
def none(monkeypatch):
    """A machine without a GPU."""
    monkeypatch.delenv("KTX_GPU", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def devices(plan) -> dict[str, str]:
    return {step.path: step.device for step in plan}


def written(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return file


def test_words_and_ranges_find_their_modules():
    def found(key, path):
        return bool(parse_entry(key, "cpu").pattern.search(path))

    assert found("all", "") and not found("all", "model")
    assert found("experts", "model.layers.3.mlp.experts") and not found("experts", "model.layers.3.mlp.shared_experts")
    assert found("shared_experts", "a.mlp.shared_experts") and found("shared_experts", "a.mlp.shared_expert_gate")
    assert found("layers 0-2,7", "model.layers.7") and not found("layers 0-2,7", "model.layers.7.mlp")
    assert not found("layers 1", "model.layers.11") and not found("layers 0-2,7", "model.layers.3")
    assert found("experts 3", "model.layers.3.mlp.experts") and not found("experts 3", "model.layers.4.mlp.experts")
    assert not found("experts 3", "model.layers.3.mlp.shared_experts")
    assert found(r"q_.*proj$", "model.layers.0.self_attn.q_a_proj") and not found(r"^q_", "model.layers.0.q_proj")
    assert format_ranges([7, 0, 2, 1]) == "0-2,7"


@pytest.mark.parametrize(
    "text,line,words",
    [
        ("devices: {all: gpu}", 1, ["'gpu' is not a device", "cuda:N"]),
        ("devices:\n  all: cpu\n  layers 9-3: cuda", 3, ["'layers 9-3'", "not a range of layers"]),
        ("devices:\n  layers a: cuda", 2, ["not a range of layers"]),
        ("devices:\n  '(': cpu", 2, ["not a regular expression"]),
        ("devices:\n  all: cpu\n  all: cuda", 3, ["appears twice"]),
        ("devices:\n  experts: cuda:0,cuda:1", 2, ["only `all` is split"]),
        ("devices:\n  all: [cuda:0, cpu]", 2, ["different GPUs"]),
        ("devices:\n  all: cuda:0,cuda:0", 2, ["different GPUs"]),
        ("devices:\n  all: {a: b}", 2, ["a device must be text"]),
        ("devices:\n  '': cpu", 2, ["needs a key"]),
        ("devices: [cuda]", 1, ["devices must be a mapping", "a list"]),
        ("device: {all: cpu}", 1, ["'device'", "did you mean 'devices'?"]),
        ("rules:\n- mach: {name: a}", 2, ["'mach'", "did you mean 'match'?"]),
        ("rules: {a: b}", 1, ["rules, a list or the name of a file, must be text"]),
    ],
)
def test_errors_of_a_map_name_file_and_line(text, line, words):
    with pytest.raises(UsageError) as error:
        parse_rules(text, "my.yaml")
    assert str(error.value).startswith(f"my.yaml:{line}:")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_file_may_name_the_rules_it_places(tmp_path):
    file = written(tmp_path, MAP)
    rules = load_rules(file)
    assert rules == load_rules("deepseek-v3") and [entry.key for entry in rules.entries][:2] == ["all", "layers 1-2"]
    assert rules.entries[0].where == f"{file}:4"
    (tmp_path / "other.yaml").write_text("- match: {class: torch.nn.Linear}\n  replace: {class: Linear}\n")
    assert len(load_rules(written(tmp_path, "rules: other.yaml\ndevices: {all: cpu}\n"))) == 1
    assert len(load_rules(written(tmp_path, "rules:\n- match: {name: a}\ndevices: {all: cpu}\n"))) == 1
    assert load_rules(written(tmp_path, "devices: {all: cpu}\n"), "mixtral") == load_rules("mixtral")


def test_rules_that_are_not_there_are_named_with_their_line(tmp_path):
    with pytest.raises(BadFile, match=r"mine.yaml:2: deepsek-v3: no such rule file.*did you mean 'deepseek-v3'"):
        load_rules(written(tmp_path, "devices: {all: cpu}\nrules: deepsek-v3\n"))
    with pytest.raises(UsageError, match=r"gpu-cpu.yaml:\d+: rules are a list"):  # a map of a map
        load_rules(written(tmp_path, "rules: gpu-cpu\n"))
    with pytest.raises(UsageError, match=r"mine.yaml:1: rules are a list"):
        load_rules(written(tmp_path, "rules: mine.yaml\n"))


def test_the_map_places_what_no_rule_does(two, tmp_path):
    found = devices(ktx.plan(*DEMO, rules=written(tmp_path, MAP)))
    assert found["model.embed_tokens"] == found["lm_head"] == found["model.layers.0.self_attn"] == "cuda:0"
    assert found["model.layers.1.mlp.shared_experts.gate_proj"] == found["model.layers.2.self_attn"] == "cuda:1"
    assert found["model.layers.1.mlp.experts"] == "cpu" and found["model.layers.1.mlp.gate"] == "cuda:1"


def test_a_rule_of_its_own_wins_over_the_map(two, tmp_path):
    shipped = (rule_folder() / "mla-moe.yaml").read_text()
    rules = "".join(f"  {line}\n" for line in shipped.splitlines())
    first = "  - {match: {name: 'shared_experts$'}, replace: {class: MLP}, device: 'cuda:1'}\n"
    file = written(tmp_path, "rules:\n" + first + rules + "devices: {all: cuda:0, shared_experts: cpu}\n")
    found = devices(ktx.plan(*DEMO, rules=file))
    assert found["model.layers.1.mlp.shared_experts.up_proj"] == "cuda:1" and found["lm_head"] == "cuda:0"


def test_what_matches_nothing_is_told(two, tmp_path):
    file = written(tmp_path, "devices:\n  all: cpu\n  layers 70: cuda:1\n")
    with pytest.warns(UserWarning, match=re.escape(f"{file}:3: 'layers 70' matched no module")):
        ktx.plan(*DEMO, rules=file)
    with pytest.warns(UserWarning, match="devices, nothing: 'nothing' matched no module"):
        ktx.plan(*DEMO, devices={"nothing": "cpu"})


def test_a_device_of_a_file_that_does_not_exist_is_an_error(two, tmp_path):
    file = written(tmp_path, "devices:\n  all: cpu\n  output: cuda:2\n")
    with pytest.raises(UsageError, match=re.escape(f"{file}:3: cuda:2: this machine has 2 GPUs")):
        ktx.plan(*DEMO, rules=file)


def test_without_a_gpu_a_file_stays_on_the_cpu_and_an_option_is_an_error(none):
    with pytest.warns(UserWarning) as told:
        assert set(devices(ktx.plan(*DEMO, rules="multi-gpu")).values()) == {"cpu"}
    assert {str(w.message).partition(": ")[2] for w in told} >= {
        "cuda:0: this machine has no GPU that torch can use; the module stays on the CPU"
    }
    for option in ({"device": "cuda"}, {"moe_device": "cuda:0"}, {"devices": {"output": "cuda"}}):
        with pytest.raises(UsageError, match="this machine has no GPU that torch can use"):
            ktx.plan(*DEMO, **option)


def test_one_word_puts_everything_but_the_routed_experts_on_a_gpu(two):
    found = devices(ktx.plan(*DEMO, device="cuda"))
    assert {path for path, device in found.items() if device == "cpu"} == {
        f"model.layers.{i}.mlp.experts" for i in (1, 2)
    }
    assert set(found.values()) == {"cpu", "cuda:0"}
    assert set(devices(ktx.plan(*DEMO, device="cuda:1", moe_device="cuda")).values()) == {"cuda:1"}
    assert set(devices(ktx.plan(*DEMO, device="cpu")).values()) == {"cpu"}


def test_experts_and_shared_experts_go_where_they_are_sent(two):
    found = devices(ktx.plan(*DEMO, device="cuda", moe_device="numa", shared_expert_device="cpu"))
    assert found["model.layers.1.mlp.shared_experts.up_proj"] == found["model.layers.1.mlp.experts"] == "cpu"
    assert found["model.layers.1.mlp.gate"] == "cuda:0"
    found = devices(ktx.plan(*DEMO, moe_device="cuda:1"))
    assert {path for path, device in found.items() if device != "cpu"} == {
        f"model.layers.{i}.mlp.experts" for i in (1, 2)
    }
    with pytest.raises(UsageError, match="moe_device: 'disk' is not a device"):
        ktx.plan(*DEMO, moe_device="disk")


def test_an_option_counts_more_than_the_file(two, tmp_path):
    file = written(tmp_path, MAP)
    assert set(devices(ktx.plan(*DEMO, rules=file, device="cpu")).values()) == {"cpu"}
    found = devices(ktx.plan(*DEMO, rules=file, moe_device="cuda:1"))
    assert found["model.layers.1.mlp.experts"] == "cuda:1" and found["lm_head"] == "cuda:0"
    first = merge_options((), PlacementOptions("cuda", devices={"experts": "cuda:1"}))[0]
    assert (first.key, first.device, first.explicit) == ("experts", "cuda:1", True)


def test_layers_are_shared_out_by_bytes(two):
    plan = ktx.plan(*DEMO, device=["cuda:0", "cuda:1"], moe_device="cuda")
    found, total = devices(plan), plan.totals()
    of = [found[f"model.layers.{i}.self_attn"] for i in range(3)]
    assert of == sorted(of) and set(of) == {"cuda:0", "cuda:1"} == set(found.values())
    assert found["model.embed_tokens"] == "cuda:0" and found["lm_head"] == found["model.norm"] == "cuda:1"
    layer = sum(step.nbytes for step in plan if step.path.startswith("model.layers.1."))
    assert abs(total["cuda:0"] - total["cuda:1"]) < layer
    found = devices(ktx.plan(*DEMO, device="cuda:0,cuda:1"))
    assert {found[f"model.layers.{i}.mlp.experts"] for i in (1, 2)} == {"cpu"}


def test_a_split_names_every_layer_once():
    first, second, *rest = split_layers([parse_entry("all", "cuda:0,cuda:1,cuda:2")], [0, 0, 1, 2, 2])
    assert (first.key, first.device, second.key, second.device) == ("layers 2", "cuda:1", "layers 3-4", "cuda:2")
    assert rest[-1].key == "all" and rest[-1].device == "cuda:0"
    assert {entry.device for entry in rest[:-1]} == {"cuda:2"} and all(entry.implied for entry in rest[:-1])


@pytest.mark.parametrize(
    "family",
    [
        name
        for name in FAMILIES
        if "moe" in name or name in ("deepseek_v2", "deepseek_v3", "qwen3_next", "mixtral", "gpt_oss", "minimax_m2")
    ],
)
def test_shipped_placements_plan_every_family(two, tmp_path, family):
    tiny(family).save_pretrained(tmp_path)
    for name, expected in PLACEMENTS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = devices(ktx.plan(tmp_path, rules=name))
        recurrent = {device for path, device in found.items() if ".linear_attn" in path}
        assert recurrent <= {"cpu"} and set(found.values()) == expected | recurrent, name
        experts = {device for path, device in found.items() if path.endswith(".experts")}
        assert experts and (experts == {"cpu"}) == name.endswith("-cpu"), name
        assert (found["model.embed_tokens"] == "cpu") == name.endswith("-cpu")
