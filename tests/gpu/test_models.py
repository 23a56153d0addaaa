"""Whole models on GPUs, pretended where there is none: they compute what the CPU does."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers.cache_utils import DynamicCache

from ktx.cache.kv import KVCache
from ktx.errors import UsageError
from ktx.kernels.gpu.attention_backend import kernels_for
from ktx.ops.gpu import attention as gpu_attention
from ktx.ops.gpu import mla as gpu_mla
from ktx.ops.gpu.mla import MLA
from tests.families.test_families import mixed, relative
from tests.gpu.helpers import Twins

IDS = torch.randint(3, 320, (1, 130), generator=torch.Generator().manual_seed(3))
pytestmark = pytest.mark.filterwarnings("ignore:.*matched no module")
FAMILIES = ["deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_moe", "llama"]
BOUND = 3e-5


def logits(model, ids, **more):
    with torch.inference_mode():
        return model(input_ids=ids, **more).logits.cpu()


def in_pieces(model, ids, ends, cache=None):
    cache = KVCache(model.config, "f32") if cache is None else cache
    begins = [0, *ends[:-1]]
    parts = [logits(model, ids[:, a:b], past_key_values=cache) for a, b in zip(begins, ends, strict=True)]
    return torch.cat(parts, 1)


@pytest.fixture(scope="module", params=FAMILIES)
def twins(request, tmp_path_factory):
    return Twins(tmp_path_factory.mktemp(request.param), request.param)


def test_a_prompt_in_chunks_and_single_tokens_on_a_gpu_is_what_the_cpu_says(twins):
    ids = IDS[:, :6]
    found = in_pieces(twins.on(), ids, [3, 4, 6])
    assert (found - logits(twins.cpu, ids)).abs().max() < BOUND


def test_with_experts_on_the_cpu_layers_on_two_gpus_and_both_ends_on_the_cpu(twins):
    if twins.family == "llama":
        pytest.skip("has no experts")
    placed = twins.on(layers={1: "cuda:1"}, Experts="cpu", Embedding="cpu", head="cpu")
    devices = {step.path: step.device for step in placed.ktx.plan}
    assert devices["model.layers.1.self_attn.o_proj"] == "cuda:1" and devices["lm_head"] == "cpu"
    assert devices["model.layers.1.mlp.experts"] == devices["model.embed_tokens"] == "cpu"
    found = in_pieces(placed, IDS[:, :10], [8, 9, 10])
    assert (found - logits(twins.cpu, IDS[:, :10])).abs().max() < BOUND


def test_generate_answers_the_same(twins):
    placed = twins.on(Experts="cpu")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        expected = twins.cpu.generate(IDS[:, :6], **options)
        assert torch.equal(placed.generate(IDS[:, :6], **options).cpu(), expected)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """MLA and the usual attention with dense layers alone: their caches are what counts."""
    few = {"deepseek_v3": {"first_k_dense_replace": 2}, "llama": {}}
    return {name: Twins(tmp_path_factory.mktemp(name), name, **config) for name, config in few.items()}


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_left_padded_and_plain_batches(dense, family):
    placed, cpu = dense[family].on(), dense[family].cpu
    ids = torch.cat([IDS[:, :7], IDS[:, 20:27]])
    both = in_pieces(placed, ids, [5, 6, 7])
    assert (both - logits(cpu, ids)).abs().max() < BOUND
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits(placed, ids, attention_mask=mask, position_ids=positions)
    assert (padded[1, -1] - logits(cpu, ids[1:, 3:])[0, -1]).abs().max() < BOUND
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": mask, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        assert torch.equal(placed.generate(ids, **options), cpu.generate(ids, **options))


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_stock_caches_and_none(dense, family):
    placed, whole = dense[family].on(), logits(dense[family].cpu, IDS[:, :9])
    assert (logits(placed, IDS[:, :9], use_cache=False) - whole).abs().max() < BOUND
    cache = DynamicCache(config=placed.config)
    assert (in_pieces(placed, IDS[:, :9], [6, 8, 9], cache) - whole).abs().max() < BOUND


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_keys_in_eight_bits(dense, family):
    placed, cpu = dense[family].on(layers={1: "cpu"}), dense[family].cpu
    cache, whole = KVCache(placed.config, "fp8"), logits(cpu, IDS[:, :9])
    assert 1e-4 < relative(in_pieces(placed, IDS[:, :9], [6, 8, 9], cache), whole) < 0.1  # four bits of each number
    kinds = [{buffer.dtype for buffer in layer.buffers} for layer in cache.layers]
    assert kinds[0] == {torch.float8_e4m3fn}
    assert (torch.uint8 in kinds[1]) == (family == "deepseek_v3")  # Q8_0 on the CPU; heads of 16 columns are no blocks
    cache.batch_repeat_interleave(2)
    twice = logits(placed, IDS[:, 9:11].expand(2, -1), past_key_values=cache)
    assert relative(twice[1:], logits(cpu, IDS[:, :11])[:, 9:]) < 0.1


def test_numbers_beyond_eight_bits_are_the_largest(dense):
    cache = KVCache(dense["llama"].cpu.config, "fp8")
    cache.layers[0].store_floats()
    keys, values = cache.update(torch.full((1, 1, 1, 32), 1e4), torch.full((1, 1, 1, 32), -1e4), 0)
    assert keys.float().unique().tolist() == [448] and values.float().unique().tolist() == [-448]


@pytest.mark.parametrize("ends", [[66, 67], [2, 130]], ids=str)
def test_whole_pages_of_a_prompt_are_expanded(tmp_path, ends, monkeypatch):
    twins = Twins(tmp_path, "deepseek_v3", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    monkeypatch.setattr("ktx.ops.mla.EXPAND_BYTES", 1)  # a head at a time
    seen = []
    real = MLA._attend_expanded
    monkeypatch.setattr(MLA, "_attend_expanded", lambda self, *args: seen.append(args[3]) or real(self, *args))
    ids = IDS[:, : ends[-1]]
    assert (in_pieces(twins.on(), ids, ends) - logits(twins.cpu, ids)).abs().max() < BOUND
    assert seen == [0]


OTHERS = {
    "deepseek_v2": {"n_routed_experts": 8, "moe_intermediate_size": 32, "kv_lora_rank": 32, "n_shared_experts": 2},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32},
    "mixtral": {"sliding_window": 4},
    "minimax_m2": {},
    "ernie4_5_moe": {"moe_num_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "phi3": {"sliding_window": 4, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("family,config", OTHERS.items(), ids=list(OTHERS))
def test_the_other_families_with_experts_on_the_cpu(tmp_path, family, config):
    twins = Twins(tmp_path, family, num_hidden_layers=2, **config)
    found = in_pieces(twins.on(Experts="cpu"), IDS[:, :6], [5, 6])
    assert (found - logits(twins.cpu, IDS[:, :6])).abs().max() < BOUND


@pytest.mark.parametrize("quant", ["Q8_0", mixed], ids=["Q8_0", "Q4_K and Q6_K"])
def test_quantised_weights_are_multiplied_as_the_file_has_them(tmp_path, quant):
    few = {"hidden_size": 256, "num_hidden_layers": 1, "moe_intermediate_size": 256, "intermediate_size": 256}
    twins = Twins(tmp_path, "qwen3_moe", quant, **few, num_experts=2, num_experts_per_tok=1, head_dim=64, vocab_size=64)
    ids = IDS[:, :2] % 64
    assert relative(logits(twins.on(), ids), logits(twins.reference, ids)) < 1e-5


def test_a_gpu_computes_in_bf16_unless_told_otherwise(dense):
    twins = dense["llama"]
    placed = twins.load(twins.rules(), dtype=None, kv_dtype=None)
    assert placed.dtype is torch.bfloat16 and twins.load(None, dtype=None).dtype is torch.float32
    assert relative(logits(placed, IDS[:, :5]).float(), logits(twins.cpu, IDS[:, :5])) < 2e-2


@pytest.mark.parametrize("family,operator", [("deepseek_v3", "MLA"), ("llama", "Attention")])
def test_a_rule_says_whose_kernels_attend(dense, family, operator, monkeypatch):
    """Installed or not: FlashInfer's names are Triton's here, and its name is asked for."""
    twins, asked = dense[family], []

    def chosen(shape, backend="triton", *args, **kwargs):
        asked.append((backend, shape.latent))
        return replace(kernels_for(shape), name=backend)

    def rules(backend):
        return [replace(r, kwargs={"backend": backend} if r.replace == operator else {}) for r in twins.rules()]

    with pytest.raises(UsageError, match="'flash' is not an attention backend; available: triton flashinfer auto"):
        twins.load(rules("flash"))
    if importlib.util.find_spec("flashinfer") is None:
        with pytest.raises(UsageError, match="FlashInfer: the package flashinfer-python is not installed"):
            twins.load(rules("flashinfer"))
    for module in (gpu_attention, gpu_mla):
        monkeypatch.setattr(module, "kernels_for", chosen)
    model, ids = twins.load(rules("flashinfer")), IDS[:, :4]
    assert asked == [("flashinfer", operator == "MLA")] * 2
    asked.clear()
    assert (logits(model, ids) - logits(twins.cpu, ids)).abs().max() < BOUND
    assert set(asked) == {("flashinfer", operator == "MLA")}
