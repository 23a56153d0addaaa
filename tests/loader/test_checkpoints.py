"""Families from safetensors, as transformers writes them: those without a GGUF test, most of them by generic rules."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from ktx.engine.request import Finished
from ktx.engine.runner import ModelRunner, SequentialRunner
from ktx.engine.sampler import SamplingParams
from ktx.errors import UsageError
from ktx.injection.rules import Rule, load_rules
from ktx.transformers_compat import cache_argument
from tests.families.test_families import IDS, load, logits, relative
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import LINEAR, MLA, MOE, tiny

SPARSE = {"num_local_experts": 8, "n_routed_experts": 8, "index_topk": 16, "index_head_dim": 32, "index_n_heads": 4}
KDA = {"linear_head_dim": 32, "linear_num_heads": 4, "num_local_experts": 8, "q_lora_rank": None}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_chunk_size": 16}
FOUR = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
NEMOTRON = {
    "layers_block_type": ["mamba", "moe", "attention"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "ssm_state_size": 16,
    "n_groups": 1,
    "chunk_size": 16,
}
OTHERS = {  # family: what its configuration says, and which runner serves it
    "dots1": (MOE | {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}, ModelRunner),
    "olmoe": ({"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 96, "clip_qkv": 0.5}, ModelRunner),
    "glm4_moe_lite": (MLA | {"n_routed_experts": 8, "num_local_experts": 8}, ModelRunner),
    "qwen3_5_moe_text": (MOE | LINEAR | FOUR | {"shared_expert_intermediate_size": 128}, ModelRunner),
    "qwen3_5_text": (LINEAR | FOUR | {"head_dim": 64}, ModelRunner),
    "granitemoe": ({"num_local_experts": 8, "num_experts_per_tok": 3, "embedding_multiplier": 2.0}, ModelRunner),
    "hunyuan_v1_moe": ({"num_local_experts": 8, "num_experts": 8, "moe_topk": 3, "head_dim": 64}, ModelRunner),
    "deepseek_v32": (MLA | SPARSE, SequentialRunner),  # a sparse indexer
    "lfm2_moe": (MOE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}, SequentialRunner),
    "jamba": (
        {
            "num_experts": 4,
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        SequentialRunner,  # its layers with a state take a prompt in one piece
    ),
    "kimi_linear": (
        MLA | KDA | FOUR | {"n_group": 1, "topk_group": 1},
        SequentialRunner,
    ),  # convolutions in three tensors
    "falcon_h1": (
        MAMBA | {"mamba_d_ssm": 512, "mamba_n_groups": 1},
        SequentialRunner,
    ),  # buffers that the model computes
    "nemotron_h": (NEMOTRON, SequentialRunner),  # experts without a gate
    "minimax": (MOE | {"num_local_experts": 4, "block_size": 16}, SequentialRunner),  # a cache of its own
}


@pytest.fixture(scope="module", params=OTHERS)
def pair(request, tmp_path_factory):
    """Family, transformers' model, ktx's on the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = tiny(request.param, **OTHERS[request.param][0])
    reference.save_pretrained(folder)
    reference.generation_config.eos_token_id = None
    return request.param, reference, load(folder, None, kv_dtype="f32")


def test_experts_that_no_kernel_computes_are_kept_by_a_rule(tmp_path):
    reference = tiny("llama4_text", num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=320)
    reference.save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match="Llama4TextExperts does not follow the experts contract.*a rule before this one"
    ):
        load(tmp_path, None)
    kept = Rule(r"\.experts$", recursive=False)
    model = load(tmp_path, None, rules=[kept, *load_rules("generic")])
    assert relative(logits(model), logits(reference)) < 1e-4


def test_logits(pair):
    _, reference, model = pair
    assert relative(logits(model), logits(reference)) < 1e-4


def test_generate_goes_on_as_transformers_does(pair):
    _, reference, model = pair
    ids = IDS[:, :12].repeat(2, 1)
    ids[1, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": (ids != 0).long(), "pad_token_id": 0}
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, eos_token_id=None, **options), reference.generate(ids, **options))


def computed(model, mask):
    """A prompt through a static cache, in two pieces, and a token."""
    cache, found = StaticCache(config=model.config, max_cache_len=64), []
    for first, last in ((0, 12), (12, 17), (17, 18)):
        seen = {"attention_mask": torch.ones(1, last, dtype=torch.long)} if mask else {}
        found.append(model(IDS[:, first:last], **cache_argument(model, cache), **seen).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
def test_a_static_cache_holds_what_a_dynamic_one_does(pair, mask):
    """Of a prompt in an empty one transformers leaves the mask out for SDPA: its other keys are not written yet."""
    family, reference, model = pair
    if family == "minimax":
        pytest.skip("takes no cache but its own")
    with torch.inference_mode():
        try:
            right = computed(reference, mask)
        except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            pytest.skip(f"transformers: {type(error).__name__}")
        assert relative(computed(model, mask), right) < 1e-4


def test_the_engine_answers_as_generate_does(pair):
    family, _, model = pair
    prompts = [IDS[0, :12].tolist(), IDS[0, 5:70].tolist(), IDS[0, 30:60].tolist()]
    if family == "deepseek_v32":
        prompts = [prompt[:8] for prompt in prompts]  # indices of equal scores depend on how a prompt is cut
    model.ktx.tokenizer = tokenizer()
    with model.ktx.engine(kv_cache_tokens=1024, chunk_size=32) as engine:
        assert type(engine.runner) is OTHERS[family][1]
        if not getattr(engine.runner, "in_chunks", True):
            with pytest.raises(UsageError, match=f"a {model.config.model_type} computes prompts in one forward"):
                engine.submit(prompts[0], SamplingParams(echo=True), print)
        events = list(engine.generate(prompts, SamplingParams(max_new_tokens=6, ignore_eos=True)))
    answers = {i: event.ids for i, event in events if isinstance(event, Finished)}
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            whole = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert answers[i] == whole[0, len(prompt) :].tolist()
