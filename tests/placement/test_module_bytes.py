"""How many bytes does a module take on the CPU and on a GPU, and how many of them does a token read?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn

from ktx.injection.inject import Step
from ktx.injection.rule import Rule
from ktx.injection.rules import load_rules
from ktx.placement.memory_model import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    OUTPUT,
    ModuleMemory,
    WeightBytes,
    compute_footprint,
    cpu_packed_bytes,
    gpu_packed_bytes,
    group_of,
)
from ktx.quant.types import QTYPES
from ktx.weights.base import TensorSpec
from tests.placement.helpers import experts, footprint, part, planned

# Bytes of a weight; 32 weights of Q8_0 take 34 bytes, 32 of Q5_0 take 22.
F32, F16 = 4, 2


def q8_0(weights: int) -> int:
    return weights // 32 * 34


class Headers:
    """Headers of a file that has every tensor of a plan: as F32, as the type of `types` whose key ends its name, or in
    the parts (type, shape) that are listed there.
    """

    def __init__(self, plan, types: Mapping[str, str | list[tuple[str, tuple[int, ...]]]], absent: str = "-"):
        self.parts: dict[str, list[TensorSpec]] = {}
        self.shapes = {name: shape for step in plan for name, shape in step.shapes.items() if not name.endswith(absent)}
        for name, shape in self.shapes.items():
            kind = next((kind for end, kind in types.items() if name.endswith(end)), "F32")
            parts = [(kind, shape)] if isinstance(kind, str) else kind
            self.parts[name] = [self.entry(name, *one) for one in parts]

    def entry(self, name: str, kind: str, shape: tuple[int, ...]) -> TensorSpec:
        qtype = QTYPES[kind]
        return TensorSpec(name, shape, qtype, prod(shape) // qtype.block * qtype.nbytes, "file", 0)

    def specs(self, name: str) -> list[TensorSpec]:
        return self.parts.get(name, [])

    def spec(self, name: str) -> TensorSpec | None:
        parts = self.specs(name)
        return replace(parts[0], shape=self.shapes[name]) if parts else None


def modules(model, plan, absent: str = "-", **types) -> dict[str, ModuleMemory]:
    """The memory of a planned model's modules by path, for a file of the given types."""
    source = Headers(plan, types, absent)
    plan.fill(source)
    return {found.path: found for found in compute_footprint(model, plan, source).modules}


def memory(path, group, layer, cpu, cpu_read, gpu, gpu_read, weights, largest, columns, *more) -> ModuleMemory:
    return ModuleMemory(
        path, group, layer, WeightBytes(cpu, cpu_read), WeightBytes(gpu, gpu_read), weights, largest, columns, *more
    )


# ---- groups


@pytest.mark.parametrize(
    "path,group",
    [
        ("model.layers.3.mlp.experts", "routed experts"),
        ("model.layers.3.block_sparse_moe.experts.gate_proj", "routed experts"),
        ("model.layers.3.mlp.shared_experts.up_proj", "shared experts"),
        ("model.layers.3.mlp.shared_expert_gate", "shared experts"),
        ("model.embed_tokens", "embedding"),
        ("lm_head", "output"),
        ("model.layers.3.self_attn", "attention"),
        ("model.layers.3.linear_attn.norm", "attention"),
        ("model.layers.3.attention.wq", "attention"),
        ("model.layers.3.mlp.gate", "router"),
        ("model.layers.3.mlp.router", "router"),
        ("model.layers.3.mlp.gate_proj", "dense layers"),
        ("model.layers.3.feed_forward.w1", "dense layers"),
        ("model.layers.3.post_attention_layernorm", "norms and the rest"),
        ("model.norm", "norms and the rest"),
    ],
)
def test_a_path_names_the_group(path, group):
    assert group_of(path) == group


def test_groups_that_are_placed_by_name():
    assert (EXPERTS, EMBEDDING, OUTPUT, ATTENTION) == ("routed experts", "embedding", "output", "attention")


# ---- what follows from a module's bytes


def test_a_share_of_the_experts_takes_its_share_of_everything():
    whole = experts(1, 1003, 2005, count=8, top_k=2, num_weights=4001, activation_columns=7)
    whole = replace(whole, cpu=WeightBytes(1003, 503), gpu=WeightBytes(2005, 905))
    # three eighths, rounded down
    assert whole.subset(3) == replace(whole, cpu=WeightBytes(376, 188), gpu=WeightBytes(751, 339), num_weights=1500)
    assert whole.subset(8) == whole
    assert whole.subset(0) == replace(whole, cpu=WeightBytes(0, 0), gpu=WeightBytes(0, 0), num_weights=0)


def test_tokens_read_different_experts_until_all_are_read():
    some = experts(0, 8000, 16000, count=8, top_k=3)
    assert [some.read_bytes(tokens, gpu=False) for tokens in (1, 2, 3, 100)] == [3000, 6000, 8000, 8000]
    assert some.read_bytes(2, gpu=True) == 12000


def test_tokens_share_a_matrix_but_each_reads_its_row():
    dense, rows = part("attention", 0, 500, 700), part("embedding", None, 500, 700, is_row_lookup=True)
    assert dense.read_bytes(4, gpu=False) == 500 and dense.read_bytes(4, gpu=True) == 700
    assert rows.read_bytes(4, gpu=False) == 4 * 500 and rows.read_bytes(4, gpu=True) == 4 * 700


def test_layers_and_experts_of_a_model():
    found = footprint(part("attention", 0, 1), experts(2, 1, top_k=4), experts(1, 1, top_k=6), part("output", None, 1))
    assert (found.num_layers, found.top_k) == (3, 6)
    empty = footprint(part("output", None, 1))
    assert (empty.num_layers, empty.top_k) == (0, 0) == (footprint().num_layers, footprint().top_k)


# ---- packed matrices


def test_the_cpu_packs_rows_in_sixteens():
    sizes = {rows: cpu_packed_bytes([(QTYPES["F32"], (rows, 64))]) for rows in (1, 16, 17)}
    assert sizes == {1: 16 * 64 * F32, 16: 16 * 64 * F32, 17: 32 * 64 * F32}
    stacked = [(QTYPES["Q8_0"], (3, 17, 64)), (QTYPES["F16"], (2, 3, 16, 8))]
    assert cpu_packed_bytes(stacked) == 3 * q8_0(32 * 64) + 2 * 3 * 16 * 8 * F16


def test_a_gpu_packs_rows_as_they_are():
    assert gpu_packed_bytes([(QTYPES["F32"], (17, 64))]) == 17 * 64 * F32
    assert gpu_packed_bytes([(QTYPES["Q8_0"], (3, 17, 64)), (QTYPES["F16"], (5, 8))]) == q8_0(3 * 17 * 64) + 5 * 8 * F16


def test_fp8_has_a_scale_for_each_block_of_128_rows_and_columns():
    fp8 = QTYPES["F8_E4M3"]
    assert gpu_packed_bytes([(fp8, (128, 256))]) == 128 * 256 + 1 * 2 * F32
    assert gpu_packed_bytes([(fp8, (129, 257))]) == 129 * 257 + 2 * 3 * F32
    assert gpu_packed_bytes([(fp8, (5, 129, 128))]) == 5 * (129 * 128 + 2 * 1 * F32)


# ---- modules


def test_matrices_norms_and_the_embedding():
    found = modules(
        *planned("llama"), **{"q_proj.weight": "Q8_0", "embed_tokens.weight": "Q8_0", "lm_head.weight": "F16"}
    )
    size = q8_0(256 * 256)
    path = "model.layers.1.self_attn.q_proj"
    assert found[path] == memory(path, "attention", 1, size, size, size, size, 256 * 256, 256 * 256, 256)
    size, row = q8_0(320 * 256), q8_0(256)
    path = "model.embed_tokens"
    assert found[path] == memory(path, EMBEDDING, None, size, row, size, row, 320 * 256, 320 * 256, 0, 0, 0, True)
    size = 320 * 256 * F16
    assert found["lm_head"] == memory("lm_head", OUTPUT, None, size, size, size, size, 320 * 256, 320 * 256, 320)
    path, size = "model.norm", 256 * F32  # a GPU has the parameter in bf16, and a copy in f32 that it reads
    assert found[path] == memory(path, "norms and the rest", None, size, size, size + 256 * 2, size, 256, 0, 0)


def test_a_bias_is_f32_beside_its_matrix():
    found = modules(*planned("qwen2"), **{"k_proj.weight": "Q8_0", "k_proj.bias": "F16"})[
        "model.layers.0.self_attn.k_proj"
    ]
    size = q8_0(128 * 256) + 128 * F32
    assert found == memory(found.path, "attention", 0, size, size, size, size, 128 * 256 + 128, 128 * 256, 128)


def test_experts_with_biases():
    types = {"gate_proj": "Q8_0", "up_proj": "Q8_0", "down_proj": "F16", "router.weight": "Q8_0"}
    model, plan = planned("gpt_oss")
    step = next(step for step in plan if step.path == "model.layers.1.mlp.experts")
    step.shapes |= {f"{step.path}.{name}_proj_bias": (4, n) for name, n in (("gate", 96), ("up", 96), ("down", 256))}
    found = modules(model, plan, **types)
    weights, biases = 4 * 96 * 256, 4 * (96 + 96 + 256)
    size = q8_0(2 * weights) + weights * F16 + biases * F32
    path = "model.layers.1.mlp.experts"
    columns = 2 * (3 * 96 + 256)  # of two experts
    assert found[path] == memory(path, EXPERTS, 1, size, size, size, size, 3 * weights + biases, 0, columns, 4, 2)
    # The router is f32 whatever the file has. The CPU computes with a copy of 16 rows instead of 4.
    path, floats, copy = "model.layers.1.mlp.router", 4 * 256 + 4, 16 * 256 * F32
    gpu, read = floats * (2 + F32), floats * F32
    assert found[path] == memory(path, "router", 1, floats * F32 + copy, copy, gpu, read, floats, 0, 0)


def test_bits_that_packing_moves_are_known():
    types = {"layers.1.mlp.experts.up_proj": "Q5_0"}
    found = modules(*planned("gpt_oss"), **types)
    assert [path for path, one in found.items() if one.needs_repacking] == ["model.layers.1.mlp.experts"]


def test_a_matrix_outside_an_operator_is_f32():
    found = modules(*planned("qwen3_next"), **{"conv1d.weight": "F16"})
    path, size = "model.layers.0.linear_attn.conv1d", 256 * 1 * 4 * F32
    assert found[path] == memory(path, "attention", 0, size, size, size, size, 1024, 0, 0, 0, 0, False, True)


def test_matrices_of_an_operators_children_are_packed():
    model, plan = planned("llama")
    model.model.extra = nn.Module()
    model.model.extra.inner = nn.Linear(64, 32, bias=False, device="meta")
    model.model.extra.inner.register_buffer("table", torch.empty(32, 128, device="meta"))
    names = {"model.extra.inner.weight": (32, 64), "model.extra.inner.table": (32, 128)}
    plan.append(Step("model.extra", "Module", "Packs", None, "cpu", list(names), names))
    found = modules(model, plan, **{"inner.weight": "Q8_0", "inner.table": "Q8_0"})["model.extra"]
    size = q8_0(32 * 64) + q8_0(32 * 128)
    assert found == memory("model.extra", "norms and the rest", None, size, size, size, size, 6144, 32 * 128, 0)


def test_a_module_without_weights_has_no_memory():
    found = modules(*planned("llama"), absent="model.norm.weight")
    assert not found.keys() & {"model.norm", "model.rotary_emb", "model.layers.0", "model.layers.0.mlp"}
    assert "model.layers.0.mlp.up_proj" in found and "model.layers.1.input_layernorm" in found


# ---- types


def test_rows_of_different_types_stay_as_they_are_in_a_linear():
    kinds = {"k_proj.weight": [("Q8_0", (32, 256)), ("F16", (96, 256))]}
    found = modules(*planned("llama"), **kinds)["model.layers.0.self_attn.k_proj"]
    size = q8_0(32 * 256) + 96 * 256 * F16
    assert found == memory(found.path, "attention", 0, size, size, size, size, 128 * 256, 96 * 256, 128)


@pytest.mark.parametrize(
    "name,kinds",
    [
        ("model.embed_tokens", [("Q8_0", (32, 256)), ("F16", (288, 256))]),  # no Linear
        ("model.layers.0.self_attn.k_proj", [("Q8_0", (128, 128)), ("F16", (128, 128))]),  # columns
    ],
)
def test_other_parts_of_different_types_become_f32(name, kinds):
    found = modules(*planned("llama"), **{f"{name}.weight": kinds})[name]
    assert found.cpu.held_bytes == found.gpu.held_bytes == found.num_weights * F32


def test_parts_of_one_type_are_one_matrix_of_that_type():
    kinds = {"k_proj.weight": [("Q8_0", (64, 256))] * 2}
    found = modules(*planned("llama"), **kinds)["model.layers.0.self_attn.k_proj"]
    assert (found.cpu.held_bytes, found.max_matrix_weights) == (q8_0(128 * 256), 128 * 256)


def test_floats_that_are_quantized_on_loading_count_as_quantized():
    model, plan = planned("llama")
    for step in plan:
        step.quant_target = "int8" if step.path.endswith(("k_proj", "v_proj", "q_proj")) else None
    kinds = {"k_proj.weight": [("F32", (32, 256)), ("F16", (96, 256))], "q_proj.weight": "Q8_0", "o_proj.weight": "F16"}
    found = modules(model, plan, **kinds)
    sizes = {name: found[f"model.layers.0.self_attn.{name}_proj"].gpu.held_bytes for name in "qkvo"}
    int8 = 128 * 256 // 128 * 130  # blocks of 128 weights
    assert sizes == {"q": q8_0(256 * 256), "k": int8, "v": int8, "o": 256 * 256 * F16}


# ---- an output layer tied to the embedding


def tied(absent: str = "-", **types) -> dict[str, ModuleMemory]:
    model, plan = planned("qwen2")
    model.lm_head.tied_to = "model.embed_tokens.weight"
    return modules(model, plan, absent, **types)


def test_a_tied_output_layer_reads_the_embedding_and_is_a_copy_on_a_gpu():
    size = q8_0(320 * 256)
    found = tied(**{"embed_tokens.weight": "Q8_0"})["lm_head"]
    assert found == memory("lm_head", OUTPUT, None, 0, size, size, size, 320 * 256, 320 * 256, 320)


def test_an_output_layer_tied_to_nothing_has_no_memory():
    assert "lm_head" not in tied(absent="embed_tokens.weight")


# ---- MLA: 4 heads, nope 64, v 48, rank 64

NOPE = {"qk_nope_head_dim": 64}
K, V = 4 * 64 * 64, 4 * 48 * 64  # weights of W_UK and W_UV
JOINT = (4 * (64 + 48), 64)  # kv_b_proj, as most files have it


@pytest.mark.parametrize(
    "k,v,absorbed,values,expanded",
    [
        ("F32", "F32", K * F32, V * F32, K * F32),
        ("F16", "F16", K * F16, V * F16, K * F16),
        ("Q8_0", "Q8_0", q8_0(K), q8_0(V), q8_0(K)),
        ("F32", "Q8_0", K * F32, q8_0(V), K * F32),
        ("Q8_0", "F32", q8_0(K), V * F16, q8_0(K)),
        ("F8_E4M3", "F8_E4M3", K * F16, V * F16, K * F16),
        ([("Q8_0", JOINT)], [("Q8_0", JOINT)], K * F16, q8_0(V), q8_0(K)),  # W_UK has to be transposed
    ],
)
def test_mla_holds_w_uk_twice_on_the_cpu_and_reads_it_once(k, v, absorbed, values, expanded):
    types = {"k_b_proj.weight": k, "v_b_proj.weight": v}
    found = modules(*planned("deepseek_v3", **NOPE), **types)["model.layers.0.self_attn"]
    once, columns = absorbed + values, 4 * (2 * 64 + 48)
    held = once + expanded
    assert found == memory(found.path, "attention", 0, held, once, once, once, 2 * K + V, K, columns)


def test_mla_holds_w_uk_once_where_it_is_absorbed_in_prefill_too():
    rules = [Rule("self_attn$", replace="MLA", kwargs={"absorb_for_prefill": True}), *load_rules(None, "deepseek_v3")]
    types = {"k_b_proj.weight": "Q8_0", "v_b_proj.weight": "Q8_0"}
    found = modules(*planned("deepseek_v3", rules=rules, **NOPE), **types)["model.layers.0.self_attn"]
    size = q8_0(K) + q8_0(V)
    assert found == memory(found.path, "attention", 0, size, size, size, size, K + V, K, 4 * (2 * 64 + 48))


def test_w_uk_for_prefill_is_f16_where_the_rank_fills_no_blocks():
    types = {"k_b_proj.weight": "Q8_0", "v_b_proj.weight": "F16"}
    found = modules(*planned("deepseek_v3", kv_lora_rank=48), **types)["model.layers.0.self_attn"]
    weights = 4 * 48 * 32
    assert found.cpu.held_bytes - found.cpu.read == weights * F16


def test_mla_with_a_tensor_of_its_own_is_refused():
    model, plan = planned("deepseek_v3")
    step = next(step for step in plan if step.operator == "MLA")
    step.tensors.append(f"{step.path}.sinks")
    with pytest.raises(ValueError, match="zip"):
        modules(model, plan)


# ---- rules with a device


def test_what_a_rule_places_on_the_cpu_stays_there():
    rules = [Rule(r"layers\.1\.self_attn$", device="cpu"), *load_rules(None, "llama")]
    found = modules(*planned("llama", rules=rules, num_hidden_layers=2))
    stays = {path for path, one in found.items() if one.cpu_only}
    assert stays == {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"}


def test_a_rule_for_layer_1_is_none_for_layer_10():
    rules = [Rule(r"layers\.1$", device="cpu"), *load_rules(None, "llama")]
    found = modules(*planned("llama", rules=rules, num_hidden_layers=11))
    assert {one.layer for one in found.values() if one.cpu_only} == {1}
