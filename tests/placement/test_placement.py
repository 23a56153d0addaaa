"""A model placed by budget: bytes as they will lie there, what fits, what would, and the file that says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import ktx
import ktx.demo
from ktx.__main__ import main
from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.paged import PagedCache
from ktx.cli.arguments import size, tokens
from ktx.cli.plan import write_rule_file as write_file
from ktx.errors import DoesNotFit, UsageError
from ktx.injection.rules import load_rules, rule_folder
from ktx.kernels.gpu import soa_layout
from ktx.kernels.gpu.repack_bits import PEAK_TEMPORARY_BYTES
from ktx.kernels.gpu.repack_from_cpu import STREAM_CHUNK_BYTES
from ktx.loader.build import measure_footprint
from ktx.placement import workspace
from ktx.placement.memory_model import Footprint, ModuleMemory, WeightBytes, cpu_packed_bytes, gpu_packed_bytes
from ktx.placement.solver import CPU, KV, Budget, Placement, Speeds, balance_layers, solve
from ktx.placement.suggest import fit, suggestions
from ktx.quant.random_blocks import random_rows
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor
from tests.families.test_families import load
from tests.support.random_model import script, write
from tests.support.tiny_models import FAMILIES, tiny

GB = 10**9
FAST = Speeds(200.0, 1000.0, link_gb_s=25.0, cpu_gops=2000.0)
DEMO = ["--model", str(ktx.demo.path()), "--weights", str(ktx.demo.gguf())]


@pytest.fixture(scope="module")
def v3(tmp_path_factory) -> Footprint:
    """DeepSeek-V3, Q4_K_M."""
    folder = tmp_path_factory.mktemp("v3")
    return measure_footprint(folder, script("plan_v3").write(folder))[0]


@pytest.fixture(scope="module")
def demo() -> Footprint:
    return measure_footprint(ktx.demo.path(), ktx.demo.gguf())[0]


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("KTX_GPU", "fake:2")


def held(model) -> int:
    """Bytes of all tensors that a loaded model's modules have, each memory once."""
    found: dict[int, int] = {}

    def look(value, depth=0):
        value = getattr(value, "data", value) if hasattr(value, "qtype") else value
        if isinstance(value, torch.Tensor) and not value.is_meta:
            found[value.data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple | dict) and depth < 4:
            for item in value.values() if isinstance(value, dict) else value:
                look(item, depth + 1)

    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "counts"):
                look(value)
    return sum(found.values())


# ---- bytes


@pytest.mark.parametrize("name", [name for name in QTYPES if name in soa_layout.FIELDS])
def test_planes_are_as_large_as_is_planned(name):
    qtype, n, k = QTYPES[name], 160, 512
    rows = random_rows(qtype, n, k)
    matrices = QuantizedTensor(rows.expand(3, n, -1), qtype, (3, n, k))
    assert gpu_packed_bytes([(qtype, (3, n, k))]) == soa_layout.pack(matrices, device="cpu").nbytes
    assert gpu_packed_bytes([(qtype, (n, k))]) * 3 == gpu_packed_bytes([(qtype, (3, n, k))])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpu_holds_what_is_planned_and_caches_too(tmp_path, family):
    tiny(family).save_pretrained(tmp_path)
    found, model = measure_footprint(tmp_path)[0], load(tmp_path, None)
    assert sum(part.cpu.held_bytes for part in found.modules) == pytest.approx(held(model), rel=0.001)
    cache = PagedCache(model.config, 10, torch.float16)
    batch = BatchMetadata([SequenceSpan(0, 0, 3, [0], 3)])
    with torch.inference_mode(), cache.forward(batch):
        model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache, position_ids=batch.position_ids)
    pools = [layer for layer in found.kv_layers if not layer.state_bytes]
    assert sum(layer.nbytes(10 * 64, 1, torch.float16, False) for layer in pools) == cache.nbytes()
    states = {layer.layer: layer.state_bytes for layer in found.kv_layers if layer.state_bytes}
    layers = cache.state(0).layers if states else []
    assert all(size == held_states(layers[i]) for i, size in states.items())


def held_states(layer) -> int:
    """Bytes of a recurrent layer's convolution and matrices."""
    return sum(state.nbytes for states in (layer.conv_states, layer.recurrent_states) for state in states.values())


@pytest.mark.slow
@pytest.mark.parametrize("preset,quant", [("v2lite", "Q4_K_M"), ("v3", "Q8_0"), ("qwen3-30b", "Q4_K_M")])
def test_a_file_takes_what_is_planned(tmp_path, preset, quant):
    file = write(tmp_path, preset, "--quant", quant)
    found, model = measure_footprint(tmp_path, file)[0], load(tmp_path, file)
    assert sum(part.cpu.held_bytes for part in found.modules) == pytest.approx(held(model), rel=0.001)
    assert sum(part.read_bytes(1, False) for part in found.modules) == pytest.approx(
        model.ktx.bytes_per_token, rel=0.02
    )


def test_weights_that_are_made_on_loading_count_as_made():
    options = {"quantize": "int8", "quantize_experts": "int4"}
    found = measure_footprint(ktx.demo.path(), ktx.demo.safetensors(), **options)[0]
    model = load(ktx.demo.path(), ktx.demo.safetensors(), **options)
    assert sum(part.cpu.held_bytes for part in found.modules) == pytest.approx(held(model), rel=0.001)


@pytest.mark.parametrize("kind", ["f16", "f32", "q8_0", "fp8"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_caches_of_every_kind_count_whole_pages(tmp_path, family, kind):
    tiny(family).save_pretrained(tmp_path)
    found, model = measure_footprint(tmp_path)[0], load(tmp_path, None, kv_dtype=kind)
    cache = PagedCache(model.config, 2 * 3, kind)
    batch = BatchMetadata([SequenceSpan(0, 0, 2, [0], 2)])
    with torch.inference_mode(), cache.forward(batch):
        model(input_ids=torch.tensor([[3, 4]]), past_key_values=cache, position_ids=batch.position_ids)
    assert sum(layer.nbytes(130, 2, cache.dtype, False) for layer in found.kv_layers) == cache.nbytes()


# ---- choices


@pytest.mark.slow
@pytest.mark.parametrize("context,most", [(8 << 10, 14), (128 << 10, 24)])
def test_deepseek_v3_beside_the_experts_fits_a_small_gpu(v3, context, most):
    made = fit(v3, Budget((most * GB,), 420 * GB, context))
    assert made.total_bytes("cuda:0") <= most * GB and made.device_map() == {
        "all": "cuda:0",
        "embedding": "cpu",
        "experts": "cpu",
    }
    assert made.bytes[KV]["cuda:0"] == 61 * (512 + 64) * 2 * context
    assert made.bytes["routed experts"][CPU] > 380 * GB


def test_experts_fill_what_is_left_and_no_more(v3):
    budget = Budget((48 * GB,), 420 * GB, 32 << 10)
    made = fit(v3, budget)
    sizes = {part.layer: part.gpu.held_bytes for part in v3.modules if part.num_experts}
    assert len(made.experts) >= 4 and made.total_bytes("cuda:0") <= 48 * GB
    left = [size for layer, size in sizes.items() if layer not in made.experts]
    assert made.total_bytes("cuda:0") + min(left) > 48 * GB
    assert max(sizes[layer] for layer in made.experts) <= min(left)  # as many layers as can be
    less = fit(v3, replace(budget, vram=(24 * GB,)))
    assert less.experts < made.experts and less.read_bytes_per_token(CPU) > made.read_bytes_per_token(CPU)


def test_what_is_left_takes_a_share_of_one_more_layer(v3):
    made = fit(v3, Budget((48 * GB,), 420 * GB, 32 << 10))
    ((layer, count),) = made.num_gpu_experts.items()
    assert layer not in made.experts and 0 < count < 256
    assert made.exceeded() == {} and "cuda:0" in replace(made, num_gpu_experts={layer: count + 1}).exceeded()
    path = f"model.layers.{layer}.mlp.experts"
    assert (made.devices[path], made.devices[f"{path}.on_gpu"]) == (CPU, "cuda:0")
    without = replace(made, num_gpu_experts={})
    moved = without.bytes["routed experts"][CPU] - made.bytes["routed experts"][CPU]
    assert moved == pytest.approx(made.bytes["routed experts"]["cuda:0"] - without.bytes["routed experts"]["cuda:0"])
    one = next(part for part in v3.modules if part.path == path)
    assert moved == pytest.approx(one.cpu.held_bytes * count / 256, abs=256)
    assert without.read_bytes_per_token(CPU) - made.read_bytes_per_token(CPU) == pytest.approx(
        one.read_bytes(1, False) * count / 256, abs=256
    )


def test_room_to_bring_experts_for_prompts_is_counted_and_given_up_first(v3):
    roomy = fit(v3, Budget((24 * GB,), 420 * GB, 32 << 10))
    assert (
        roomy.streams_experts
        and roomy.workspace_bytes("cuda:0") - replace(roomy, streams_experts=False).workspace_bytes("cuda:0")
        == 2 * STREAM_CHUNK_BYTES
    )
    need = roomy.total_bytes("cuda:0") - roomy.bytes["routed experts"]["cuda:0"] - STREAM_CHUNK_BYTES
    tight = fit(v3, Budget((need,), 420 * GB, 32 << 10))
    assert not tight.streams_experts and tight.min_streamed_tokens(FAST) == 0 < roomy.min_streamed_tokens(FAST)


def test_room_to_put_bits_back_is_counted_where_packing_moved_them(v3):
    part = next(part for part in v3.modules if part.num_experts)
    assert not part.needs_repacking
    assert (
        workspace.streaming_bytes([replace(part, needs_repacking=True)])
        == workspace.streaming_bytes([part]) + PEAK_TEMPORARY_BYTES
    )


def test_prompts_are_brought_to_a_gpu_from_where_copying_is_faster(v3):
    made = fit(v3, Budget((24 * GB,), 420 * GB))
    layer = max(
        (part for part in v3.modules if part.num_experts), key=lambda part: part.cpu.held_bytes / part.num_weights
    )
    alone = 2 * layer.num_weights * 8 / 256 / (FAST.cpu_gops * 1e9)  # seconds of a token on the CPU
    assert made.min_streamed_tokens(FAST) == pytest.approx(layer.cpu.held_bytes / (FAST.link_gb_s * 1e9) / alone, abs=1)
    assert made.min_streamed_tokens(replace(FAST, cpu_gops=FAST.cpu_gops * 2)) == pytest.approx(
        2 * made.min_streamed_tokens(FAST), abs=2
    )
    assert (
        made.min_streamed_tokens(replace(FAST, cpu_gops=1e-3)) == 64
        and made.min_streamed_tokens(replace(FAST, cpu_gops=0.0)) == 0
    )


def test_several_gpus_take_layers_in_turn(v3):
    made = fit(v3, Budget((24 * GB, 48 * GB), 420 * GB, 32 << 10))
    first = made.layers.count("cuda:0")
    assert made.layers == ["cuda:0"] * first + ["cuda:1"] * (61 - first) and 10 < first < 30
    assert made.devices["lm_head"] == "cuda:1" == made.devices["model.norm"]
    assert all(made.total_bytes(name) <= made.budget.bytes_of(name) for name in made.device_names)
    assert {made.devices[f"model.layers.{i}.mlp.experts"] for i in made.experts} == {"cuda:0", "cuda:1"}


def test_a_model_that_fits_whole_leaves_nothing_on_the_cpu(v3, demo):
    assert set(fit(demo, Budget((8 * GB,), GB)).devices.values()) == {"cuda:0"}
    made = fit(v3, Budget((80 * GB,) * 6, 8 * GB))
    assert CPU not in made.devices.values() and made.transfers_per_token() == 5
    assert max(map(made.total_bytes, made.budget.gpus)) <= 80 * GB


def test_without_a_gpu_everything_is_on_the_cpu(v3):
    made = fit(v3, Budget((), 430 * GB, 8 << 10))
    assert (
        made.device_map() == {"all": "cpu"}
        and made.transfers_per_token() == 0
        and made.read_bytes_per_token(CPU) > 20 * GB
    )


def test_what_does_not_fit_says_what_would(v3):
    budget = Budget((12 * GB,), 420 * GB, 64 << 10)
    with pytest.raises(
        DoesNotFit, match=r"cuda:0 needs 1\d\.\d GB \(attention .*\), 12.0 GB are given, \d\.\d GB are missing"
    ) as error:
        fit(v3, budget)
    said = str(error.value)
    found = list(suggestions(solve(v3, budget)))
    assert all(change in said for change in found) and [change.split()[0] for change in found[:2]] == [
        "--vram",
        "--ctx",
    ]
    vram, context = size(found[0].split()[1]), tokens(found[1].split()[1])
    assert (
        not solve(v3, replace(budget, vram=(vram,))).exceeded()
        and solve(v3, replace(budget, vram=(vram - GB // 5,))).exceeded()
    )
    assert not solve(v3, replace(budget, context=context)).exceeded()
    assert solve(v3, replace(budget, context=context + 64)).exceeded()


@pytest.mark.slow
def test_too_little_memory_names_memory_a_gpu_or_a_quant(v3):
    budget = Budget((24 * GB,), 300 * GB, 8 << 10)
    ram, vram, quant = suggestions(solve(v3, budget))
    assert not solve(v3, replace(budget, ram=size(ram.split()[1]))).exceeded()
    assert not solve(v3, replace(budget, vram=(size(vram.split()[1]),))).exceeded()
    assert "bits per weight on cpu (these have 4.8)" in quant
    both = list(suggestions(solve(v3, Budget((10 * GB,), 300 * GB, 8 << 10))))
    assert both[0].startswith("--vram 1") and "--ram 4" in both[0]


def test_q8_0_and_one_sequence_are_offered_where_they_help(demo):
    need = solve(demo, Budget((), 1 << 40, 1 << 20, 4)).total_bytes(CPU)
    found = list(suggestions(solve(demo, Budget((), need - (1 << 28), 1 << 20, 4))))
    assert "--batch 1" in found and "--kv-dtype q8_0" in found


def test_weights_are_balanced_by_room():
    assert balance_layers([1] * 6, [1, 1]) == [0, 0, 0, 1, 1, 1]
    assert balance_layers([1] * 6, [1, 2]) == [0, 0, 1, 1, 1, 1]
    assert balance_layers([5, 1, 1, 1], [1, 1]) == [0, 1, 1, 1]
    assert balance_layers([3], [1, 1]) == [0] and balance_layers([0, 0], [1, 1]) == [0, 0]


def part(path, group, layer, held, **more):
    return ModuleMemory(path, group, layer, WeightBytes(held, held), WeightBytes(held, held), held, held, 1, **more)


def test_a_token_is_as_slow_as_its_bytes():
    parts = [
        part("model.layers.0.self_attn", "attention", 0, 2 * GB),
        part("model.layers.0.mlp.experts", "routed experts", 0, 80 * GB, num_experts=8, top_k=2),
    ]
    made = Placement(Footprint(parts, [], 1000, 1000), Budget((4 * GB,), 99 * GB), ["cuda:0"])
    assert (
        made.read_bytes_per_token(CPU) == 20 * GB
        and made.read_bytes_per_token("cuda:0") == 2 * GB
        and made.transfers_per_token() == 3
    )
    seconds = made.seconds_per_token(Speeds(100.0, 1000.0))
    assert seconds[CPU] == pytest.approx(0.2) and seconds["cuda:0"] == pytest.approx(0.002)
    assert 3 * 15e-6 <= seconds["crossings"] < 1e-3
    several = replace(made, budget=replace(made.budget, batch=3))
    assert several.read_bytes_per_token(CPU) == 60 * GB and several.read_bytes_per_token("cuda:0") == 2 * GB


# ---- the command


@pytest.mark.slow
@pytest.mark.parametrize("vram", ["1.5G", "0.6G,0.6G"])
def test_the_file_that_is_written_plans_to_the_same_placement(two, tmp_path, capsys, demo, vram):
    file = tmp_path / "placed.yaml"
    assert main(["plan", *DEMO, "--vram", vram, "--ram", "2G", "--ctx", "2K", "--write", str(file)]) == 0
    out = capsys.readouterr().out
    assert "keys and values" in out and "at most" in out and "(assumed)" in out
    assert len(file.read_text().splitlines()) < 40 and "rules: mla-moe" in file.read_text()
    made = fit(demo, Budget(tuple(size(part) for part in vram.split(",")), 2 * GB, 2048))
    assert {step.path: step.device for step in ktx.plan(*DEMO[1::2], rules=file) if step.tensors} == made.devices


@pytest.mark.slow
def test_a_part_of_the_experts_is_written_and_read(two, tmp_path, v3, capsys):
    made = fit(v3, Budget((48 * GB, 24 * GB), 420 * GB))
    write_file(tmp_path / "v3.yaml", made, str(rule_folder() / "mla-moe.yaml"))
    folder = tmp_path / "v3"
    plan = ktx.plan(folder, script("plan_v3").write(folder), rules=tmp_path / "v3.yaml")
    assert {step.path: step.device for step in plan if step.tensors} == made.devices
    assert len((tmp_path / "v3.yaml").read_text().splitlines()) < 40
    shares = {step.path: step.fraction for step in plan if step.path.endswith(".on_gpu")}
    assert (
        shares
        == {f"model.layers.{i}.mlp.experts.on_gpu": count / 256 for i, count in made.num_gpu_experts.items()}
        != {}
    )


def test_a_placement_without_room_for_prompts_experts_says_so_in_its_file(tmp_path, v3):
    file = tmp_path / "v3.yaml"
    for stream, word in ((True, None), (False, "off")):
        made = replace(solve(v3, Budget((48 * GB,), 420 * GB)), streams_experts=stream)
        write_file(file, made, str(rule_folder() / "mla-moe.yaml"))
        assert load_rules(file).stream_experts_min_tokens == word


@pytest.mark.slow
def test_rules_of_ones_own_are_named_by_their_path(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text((rule_folder() / "mla-moe.yaml").read_text())
    file = tmp_path / "sub" / "placed.yaml"
    file.parent.mkdir()
    assert main(["plan", *DEMO, "--rules", str(mine), "--ram", "2G", "--write", str(file)]) == 0
    assert load_rules(file) == load_rules(mine) and load_rules(file).entries[0].device == "cpu"


def test_json_holds_the_table_and_the_numbers(capsys):
    words = [
        "--vram",
        "1G",
        "--ram",
        "2GiB",
        "--cpu-bandwidth",
        "50",
        "--gpu-bandwidth",
        "500",
        "--batch",
        "2",
        "--json",
    ]
    assert main(["plan", *DEMO, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget"] == {"cpu": 2 << 30, "cuda:0": GB} and found["batch"] == 2
    for device, total in found["sum"].items():
        assert total == sum(of.get(device, 0) for of in found["bytes"].values())
    assert found["tokens a second"] == pytest.approx(2 / sum(found["seconds"].values()))
    assert main(["plan", *DEMO, "--json"]) == 0
    assert {row["device"] for row in json.loads(capsys.readouterr().out)["modules"]} == {"cpu"}


@pytest.mark.parametrize(
    "words,status,said",
    [
        (["--vram", "1G", "--ram", "1M"], 3, "cpu needs"),
        (["--vram", "1G", "--device", "cuda"], 2, "--device places modules"),
        (["--write", "x.yaml"], 2, "give --vram, --ram or both"),
        (["--vram", "1G", "--write", "/nowhere/x.yaml"], 2, "--write /nowhere/x.yaml: cannot be written"),
    ],
)
def test_what_cannot_be_planned_says_why(capsys, words, status, said):
    assert main(["plan", *DEMO, *words]) == status
    assert said in capsys.readouterr().err


def test_rules_with_devices_cannot_be_placed_by_budget(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("- match: {class: torch.nn.Linear}\n  replace: {class: Linear}\n  device: cuda\n")
    with pytest.raises(UsageError, match="mine.yaml:1: this rule places a module on a GPU itself"):
        measure_footprint(*DEMO[1::2], rules=file)


def test_sizes_are_read_as_people_write_them():
    assert [size(text) for text in ("24G", "22.5GiB", "1tb", "512", "3 MB")] == [
        24 * GB,
        int(22.5 * (1 << 30)),
        10**12,
        512,
        3_000_000,
    ]
    assert (tokens("32K"), tokens("8192")) == (32768, 8192)
    for text in ("G", "-1G", "24X", "0G", ""):
        with pytest.raises(Exception, match="must be a size in bytes such as 24G"):
            size(text)


def test_packed_bytes_are_the_kernels_own():
    assert cpu_packed_bytes([(QTYPES["Q4_K"], (2, 48, 512))]) == 2 * 48 * QTYPES["Q4_K"].row_bytes(512)
