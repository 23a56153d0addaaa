"""Rule files of KTransformers v0.3: their class names and options, and what each means here."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktx.rules import Rule

PREFIX = "ktransformers."
OPERATORS: dict[
    str, str | None
] = {  # last part of replace.class -> our operator; None: the transformers module does it
    "KTransformersLinear": "Linear",
    "KLinearCPUInfer": "Linear",
    "KLinearMarlin": "Linear",
    "KLinearTorch": "Linear",
    "VLinearMarlin": "Linear",
    "KLinearFP8": "Linear",
    "KLinearQ8": "Linear",
    "KTransformersExperts": "Experts",
    "KTransformersExpertsV2": "Experts",
    "KExpertsCPU": "Experts",
    "KExpertsMarlin": "Experts",
    "KExpertsTorch": "Experts",
    "KDeepseekV2Attention": "MLA",
    "KDeepseekV3Attention": "MLA",
    "flashinfer_attn": "MLA",
    "deepseek_torch_attn": "MLA",
    "KLlamaAttention": "Attention",
    "KQwen2MoeAttention": "Attention",
    "KQwen3MoeAttention": "Attention",
    "KGlm4MoeAttention": "Attention",
    "KMoEGate": None,
    "KMoEGateQwen2Moe": None,
    "KDeepseekV2MoE": None,
    "KDeepseekV3MoE": None,
    "KDeepseekV3MoEV2": None,
    "KQwen2MoeSparseMoeBlock": None,
    "KQwen3MoeSparseMoeBlock": None,
    "KQwen2MoeSparseMoeBlockV2": None,
    "KQwen3MoeSparseMoeBlockV2": None,
    "KMistralSparseMoEBlock": None,
    "KGlm4MoeMoE": None,
    "KSmallthinkerMoeBlock": None,
    "KQwen3NextSparseMoeBlockV2": None,
    "RotaryEmbedding": None,
    "RotaryEmbeddingV2": None,
    "RotaryEmbeddingV3": None,
    "RotaryEmbeddingV4": None,
    "YarnRotaryEmbedding": None,
    "YarnRotaryEmbeddingV2": None,
    "YarnRotaryEmbeddingV3": None,
    "YarnRotaryEmbeddingV4": None,
    "DynamicNTKScalingRotaryEmbedding": None,
    "KQwen3MoeRotaryEmbedding": None,
    "KSmallthinkerRotaryEmbedding": None,
    "KGlm4MoeRotaryEmbedding": None,
    "RMSNorm": "RMSNorm",
    "KQwen2MoeRMSNorm": "RMSNorm",
    "KQwen3MoeRMSNorm": "RMSNorm",
    "KGlm4MoeRMSNorm": "RMSNorm",
    "KDeepseekRMSNormIPEXLLM": "RMSNorm",
    "DeepseekV3RMSNorm": "RMSNorm",
    "kDeepseekV3MLP": None,
    "KDeepseekV3MLP": None,
    "KQwen2MoeMLP": None,
    "KDeepseekV2Model": None,
    "KQwen2MoeModel": None,
    "KLlamaModel": None,
    "KQwen3MoeModel": None,
}
CLASSES = {  # last part of match.class -> the transformers class of today
    "DeepseekV2MoE": "DeepseekV2Moe",
    "DeepseekV3MoE": "DeepseekV3MoE",
    "DeepseekV2YarnRotaryEmbedding": "DeepseekV2RotaryEmbedding",
    "DeepseekV3YarnRotaryEmbedding": "DeepseekV3RotaryEmbedding",
    "MoEGate": "DeepseekV3TopkRouter",
}
KEPT = {"absorb_for_prefill"}
DEVICES = ("generate_device", "prefill_device")
NO_MEANING = {
    "prefill_device": "weights have one place; operators choose by the number of tokens they see",
    "prefill_op": "operators choose by the number of tokens they see",
    "generate_op": "the weight type in the file chooses the kernel",
    "out_device": "results go back to where the input came from",
    "backend": "the kernel follows the weight type and the CPU",
    "per_layer_prefill_intput_threshold": "prompts are taken in chunks (--chunk_size)",
    "transfer_map": "placement is said with `device:`",
    "chunck_size": "use --chunk_size",
    "stride": "the kernels tile by themselves",
    "group_max_len": "the kernels take any number of tokens",
    "num_bits": "weights stay in the file's type",
    "group_size": "weights stay in the file's type",
    "act_order": "weights stay in the file's type",
    "is_k_full": "weights stay in the file's type",
    "block_size": "the block size is the file's",
    "dump_enable": "there is no dump",
    "dump_dir": "there is no dump",
}


def translate(rule: Rule) -> Rule:
    """The rule as ktx means it; a rule that is not of KTransformers comes back as it is."""
    cls = rule.cls
    if cls and cls.startswith((PREFIX, "~")):
        cls = CLASSES.get(cls.rpartition(".")[2], cls.rpartition(".")[2])
    if rule.replace is None and rule.kwargs or (rule.replace or "").startswith(PREFIX):
        return _translated(rule, cls)
    return replace(rule, cls=cls) if cls != rule.cls else rule


def _translated(rule: Rule, cls: str | None) -> Rule:
    from ktx.errors import UsageError, nearest

    name = (rule.replace or "").rpartition(".")[2]
    if name and name not in OPERATORS:
        raise UsageError(f"{rule.where}: KTransformers' {name} is not known here{nearest(name, OPERATORS)}")
    operator = OPERATORS.get(name)
    kwargs: dict[str, Any] = {}
    for key, value in rule.kwargs.items():
        if key in KEPT and operator == "MLA":
            kwargs[key] = value
        elif key not in DEVICES[:1] and key not in KEPT:
            why = NO_MEANING.get(key, "this operator has no such option")
            warnings.warn(f"{rule.where}: {key} has no meaning here: {why}", stacklevel=4)
    device = rule.device or rule.kwargs.get("generate_device")
    if device == "cuda":
        device = "cuda:0"
    return replace(rule, cls=cls, replace=operator, kwargs=kwargs, device=device)
