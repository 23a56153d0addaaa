"""A share of a layer's experts on its GPU, the others in the CPU's memory, both at work at once."""

from __future__ import annotations

import warnings
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

import ktx
import ktx.demo
from ktx.__main__ import main
from ktx.engine.stats import EngineStats
from ktx.errors import SelfTestFailed, UsageError
from ktx.injection.rules import Rule, load_rules
from ktx.kernels.check import multiplies_in_bf16
from ktx.loader.meta_model import read_config
from ktx.model import self_test
from ktx.placement.memory_model import gpu_packed_bytes
from ktx.quant.types import expand_scale
from tests.families.test_families import load, mixed, relative
from tests.gpu.helpers import Twins
from tests.support.tiny_models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*matched no module")
IDS = torch.randint(3, 320, (1, 6), generator=torch.Generator().manual_seed(3))
BOUND = 3e-5
BLOCK = {r"\.mlp$": "cuda:0", "experts": "cpu"}  # the rest of the model on the CPU: the interpreter is slow
SMALL = {"hidden_size": 256, "num_hidden_layers": 1, "moe_intermediate_size": 256}
SMALL |= {"num_experts": 3, "num_experts_per_tok": 2}
DEMO = ["--model", str(ktx.demo.path()), "--weights", str(ktx.demo.gguf())]


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_moe", "gpt_oss"])
def twins(request, tmp_path_factory):
    return Twins(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    return Twins(tmp_path_factory.mktemp("v3"), "deepseek_v3")


def experts_of(model):
    return model.model.layers[1].mlp.experts


def test_both_sides_together_make_what_the_cpu_makes(twins):
    for count in (1, 3):
        model = twins.load(twins.rules(Experts="cpu"), gpu_experts=count)
        experts = experts_of(model)
        assert (experts.on_gpu.first_expert, experts.on_gpu.num_experts) == (0, count)
        assert (experts.first_expert, experts.num_experts) == (count, experts.total_experts - count)
        assert (logits(model) - logits(twins.cpu)).abs().max() < BOUND


def test_the_self_test_sees_both_sides(v3, monkeypatch):
    """It refuses none where one side was not chosen, counts nothing, and sees a layer that drops its cache."""
    model = v3.load(v3.rules(Experts="cpu"), gpu_experts=1, self_test=True)
    assert not experts_of(model).total_counts().any()
    monkeypatch.setattr(self_test, "MAX_PAIRS", 1)  # the interpreter is slow
    layer = model.model.layers[1]
    whole = layer.forward
    layer.forward = lambda hidden, **words: whole(
        hidden, **words | dict.fromkeys({"past_key_values", "cache"} & set(words))
    )
    with pytest.raises(SelfTestFailed, match="through the cache"):
        self_test.check(model)
    assert not experts_of(model).total_counts().any()


def test_either_side_may_be_empty(twins):
    total = experts_of(twins.cpu).total_experts
    none, all_of_them = (twins.load(twins.rules(Experts="cpu"), gpu_experts=count) for count in (0, total))
    assert experts_of(none).on_gpu is None and experts_of(all_of_them).weights == {}
    for model in (none, all_of_them):
        assert (logits(model) - logits(twins.cpu)).abs().max() < BOUND


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "BF16", mixed], ids=["Q8_0", "Q4_0", "BF16", "mixed"])
def test_stacked_experts_of_a_gguf_file(tmp_path, quant):
    twins = Twins(tmp_path, "qwen3_moe", quant, **SMALL)
    model = twins.load(None, devices=BLOCK, gpu_experts=1)
    assert relative(logits(model, IDS[:, :2]), logits(twins.cpu, IDS[:, :2])) < 2e-2
    assert bytes_are_held_once(model, twins.cpu)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_tensor_for_each_expert_of_safetensors(tmp_path, kind):
    original = tiny("qwen3_moe", **SMALL, num_attention_heads=2)
    original.config.save_pretrained(tmp_path)
    save_file(apart(original.state_dict(), kind), tmp_path / "model.safetensors")
    on_cpu = load(tmp_path, None, dtype=torch.float32)
    model = load(tmp_path, None, dtype=torch.float32, devices=BLOCK, gpu_experts=2)
    assert relative(logits(model, IDS[:, :2]), logits(on_cpu, IDS[:, :2])) < (2e-2 if multiplies_in_bf16() else 1e-4)
    assert bytes_are_held_once(model, on_cpu)


def apart(state, kind):
    """A state dict with a tensor for each expert and projection, in bf16 or in fp8 with scales of blocks."""
    found = {}
    for name, tensor in state.items():
        if ".experts." not in name:
            found[name] = tensor.bfloat16().contiguous()
            continue
        base, _, which = name.rpartition(".")
        for i, matrix in enumerate(tensor):
            rows = matrix.chunk(2) if which == "gate_up_proj" else [matrix]
            names = ["gate_proj", "up_proj"] if which == "gate_up_proj" else ["down_proj"]
            for projection, values in zip(names, rows, strict=True):
                full = f"{base}.{i}.{projection}.weight"
                if kind == "bf16":
                    found[full] = values.bfloat16().contiguous()
                    continue
                scale = torch.rand(-(-values.shape[0] // 128), -(-values.shape[1] // 128)) * 0.01 + 0.005
                found[full] = (values / expand_scale(scale, *values.shape)).to(torch.float8_e4m3fn)
                found[f"{full}_scale_inv"] = scale
    return found


def bytes_are_held_once(model, on_cpu) -> bool:
    """Whether each side holds its experts and no others, and the plan says so."""
    experts, alone = model.model.layers[0].mlp.experts, on_cpu.model.layers[0].mlp.experts
    count, total = experts.on_gpu.num_experts, experts.total_experts
    steps = {step.path: step for step in model.ktx.plan}
    here, there = (steps[f"model.layers.0.mlp.experts{part}"] for part in ("", ".on_gpu"))
    shapes = [(w.qtype, (count, w.n, w.k)) for w in alone.weights.values()]
    return (
        experts.weight_bytes()[0] * total == alone.weight_bytes()[0] * (total - count)
        and experts.on_gpu.weight_bytes()[0] == gpu_packed_bytes(shapes)
        and (here.fraction, there.fraction, there.device) == (1 - there.fraction, Fraction(count, total), "cuda:0")
        and here.memory_bytes + there.memory_bytes
        == {step.path: step for step in on_cpu.ktx.plan}[here.path].memory_bytes
    )


def test_floats_become_what_is_asked_for_on_both_sides(tmp_path):
    original = tiny("qwen3_moe", **SMALL, num_attention_heads=2)
    original.config.save_pretrained(tmp_path)
    save_file(apart(original.state_dict(), "bf16"), tmp_path / "model.safetensors")
    model = load(tmp_path, None, dtype=torch.float32, devices=BLOCK, gpu_experts=2, quantize_experts="int4")
    experts = model.model.layers[0].mlp.experts
    assert {w.qtype.name for part in (experts, experts.on_gpu) for w in part.weights.values()} == {"INT4_128"}


def test_experts_can_be_put_off_too(tmp_path):
    twins = Twins(tmp_path, "deepseek_v3", num_hidden_layers=3)
    on_cpu = twins.load(None, defer_experts=1)
    model = twins.load(twins.rules(Experts="cpu"), defer_experts=1, gpu_experts=3)
    assert (logits(model) - logits(on_cpu)).abs().max() < BOUND
    assert (logits(on_cpu) - logits(twins.cpu)).abs().max() > 1e-3  # another function, or nothing was put off


def test_choices_of_both_sides_are_counted(v3):
    placed = v3.load(v3.rules(Experts="cpu"), gpu_experts=3)
    whole = v3.on()
    counted = [EngineStats(model) for model in (v3.cpu, placed, whole)]
    for model in (v3.cpu, placed, whole):
        logits(model)
        logits(model, IDS[:, :1])
    wanted, share, device = (activity.snapshot() for activity in counted)
    assert share.layers == device.layers == wanted.layers and sum(wanted.layers[1]) == 14
    assert sum(wanted.layers[1][:3]) and share.expert_bytes < wanted.expert_bytes and device.expert_bytes == 0
    assert placed.ktx.activity()["model.layers.1.mlp.experts"].activations == wanted.layers[1]


def test_a_rule_says_it_for_its_layers_and_stands_before_the_option(tmp_path):
    twins = Twins(tmp_path, "deepseek_v3", num_hidden_layers=3)
    one = Rule(r"\.2\.mlp\.experts$", replace="Experts", device="cpu", kwargs={"gpu_experts": 5}, recursive=False)
    model = twins.load([one, *twins.rules(Experts="cpu")], gpu_experts=2)
    assert [model.model.layers[i].mlp.experts.on_gpu.num_experts for i in (1, 2)] == [2, 5]
    rows = {step.path: (step.device, step.fraction) for step in model.ktx.plan if "experts" in step.path}
    assert (
        rows["model.layers.2.mlp.experts.on_gpu"] == ("cuda:0", 5 / 8)
        and rows["model.layers.2.mlp.experts"][0] == "cpu"
    )


def test_packed_weights_on_disk_are_those_of_their_share(v3, tmp_path):
    for count in (3, 5, 3, 5):
        model = v3.load(v3.rules(Experts="cpu"), gpu_experts=count, packed_cache_dir=tmp_path)
        assert experts_of(model).num_experts == 8 - count == experts_of(model).weights["up_proj"].matrices
        assert (logits(model) - logits(v3.cpu)).abs().max() < BOUND
    assert len(list(tmp_path.iterdir())) == 2


def test_a_number_that_cannot_be_meant_is_an_error(v3, capsys):
    for given, said in ((-1, "0 or more; found -1"), ("8", "found '8'"), (True, "found True")):
        with pytest.raises(UsageError, match=f"gpu_experts: must be a number of experts per layer, .*{said}"):
            v3.load(v3.rules(Experts="cpu"), gpu_experts=given)
    with pytest.raises(UsageError, match=r"gpu_experts=9: model\.layers\.1\.mlp\.experts has 8 experts, .* 0 to 8"):
        v3.load(v3.rules(Experts="cpu"), gpu_experts=9)
    for given, said in ((9, "gpu_experts=9: .* has 8 experts"), (-1, "gpu_experts=-1: "), ("x", "of type int, .*'x'")):
        rule = Rule(r"\.experts$", replace="Experts", device="cpu", kwargs={"gpu_experts": given})
        with pytest.raises(UsageError, match=f"^rule: .*{said}"):
            v3.load([rule, *v3.rules()])
    for word, said in (("-2", "must be at least 0"), ("many", "must be a number, found 'many'")):
        with pytest.raises(SystemExit):
            main(["plan", *DEMO, "--gpu_experts", word])
        assert said in capsys.readouterr().err


def test_where_nothing_can_be_shared_it_is_told_once(v3, monkeypatch):
    for more in ({}, {"device": "cuda", "moe_device": "cuda"}):
        with pytest.warns(
            UserWarning, match="gpu_experts: 2 experts per layer on a GPU: no layer has its experts"
        ) as told:
            model = v3.load(None, gpu_experts=2, **more)
        assert len(told) == 1 and experts_of(model).on_gpu is None
    monkeypatch.delenv("KTX_GPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.warns(UserWarning, match="this machine has no GPU that torch can use; no experts are placed on one"):
        model = v3.load(None, gpu_experts=2)
    assert torch.equal(logits(model), logits(v3.cpu))


def test_the_command_plans_it(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["plan", *DEMO, "--device", "cuda", "--gpu-experts", "2"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "experts.on_gpu" in line)
    assert "cuda:0" in row and "Experts" in row


def test_a_file_says_it_for_all_layers_or_some(tmp_path):
    file = tmp_path / "mine.yaml"
    for text, wanted in (("4", {1: 4, 2: 4}), ("{layers 2: 3}", {2: 3}), ("{layers 2: 3, all: 1}", {1: 1, 2: 3})):
        file.write_text(f"rules: deepseek-v3\ndevices: {{all: cuda:0, experts: cpu}}\ngpu_experts: {text}\n")
        plan = ktx.plan(*DEMO[1::2], rules=file)
        total = {step.path: step.fraction for step in plan if step.path.endswith("experts.on_gpu")}
        of = experts_in_demo()
        assert {int(path.split(".")[2]): share * of for path, share in total.items()} == wanted
    assert [step.fraction for step in ktx.plan(*DEMO[1::2], rules=file, gpu_experts=0) if "on_gpu" in step.path] == []
    for text, said in (("many", "must be a number"), ("{layers 2: x}", "must be a number"), ("[1]", "a number, or")):
        file.write_text(f"rules: deepseek-v3\ngpu_experts: {text}\n")
        with pytest.raises(UsageError, match=rf"mine\.yaml:2: gpu_experts.*{said}"):
            load_rules(file)


def experts_in_demo() -> int:
    return int(read_config(ktx.demo.path()).n_routed_experts)
