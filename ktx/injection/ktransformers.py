"""Rule files of KTransformers v0.3: their class names and options, and what each means here."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktx.injection.rules import Rule

PREFIX = "ktransformers."
# Our operator -> last part of replace.class in their files, old spellings included; None: the transformers module does it.
MEANINGS: dict[str | None, str] = {
    "Linear": (
        "KTransformersLinear KTransformerLinear KLinearCPUInfer KLinearMarlin KLinearTorch VLinearMarlin "
        "KLinearFP8 KLinearQ8 KLinearIPEXLLM "
    ),
    "Experts": (
        "KTransformersExperts KTransformersExpertsV2 KTransformersMLPExpert KExpertsCPU KExpertsMarlin "
        "KExpertsTorch KGlm4Experts KQwen3NextExperts KSFTExperts KTransformersExpertsSFT "
    ),
    "MLA": "KDeepseekV2Attention KDeepseekV3Attention flashinfer_attn deepseek_torch_attn",
    "Attention": "KLlamaAttention KQwen2MoeAttention KQwen3MoeAttention KGlm4MoeAttention KQwen3NextAttention",
    "RMSNorm": (
        "RMSNorm KQwen2MoeRMSNorm KQwen3MoeRMSNorm KGlm4MoeRMSNorm KQwen3NextRMSNorm KDeepseekRMSNormIPEXLLM "
        "DeepseekV3RMSNorm DeepseekV3RMSNormTorch "
    ),
    "Router": "KMoEGate KMoEGateQwen2Moe KMoEGateDeepSeekV3 KMoEGateIPEXLLM",
    "MLP": "kDeepseekV3MLP KDeepseekV3MLP KQwen2MoeMLP KGlm4MoeMLP",
    None: (
        "KDeepseekV2MoE KDeepseekV3MoE "
        "KDeepseekV3MoEV2 KQwen2MoeSparseMoeBlock KQwen2MoeSparseMoeBlockV2 KQwen3MoeSparseMoeBlock "
        "KQwen3MoeSparseMoeBlockV2 KMistralSparseMoEBlock MisrtalSparseMoEBlockInjected KGlm4MoeMoE "
        "KSmallthinkerMoeBlock KQwen3NextSparseMoeBlockV2 RotaryEmbedding RotaryEmbeddingV2 RotaryEmbeddingV3 "
        "RotaryEmbeddingV4 YarnRotaryEmbedding YarnRotaryEmbeddingV2 YarnRotaryEmbeddingV3 YarnRotaryEmbeddingV4 "
        "DynamicNTKScalingRotaryEmbedding KQwen3MoeRotaryEmbedding KSmallthinkerRotaryEmbedding "
        "KGlm4MoeRotaryEmbedding KQwen3NextRMSNormGated KQwen3NextGatedDeltaNet "
        "KDeepseekV2Model KQwen2MoeModel KLlamaModel KQwen3MoeModel "
    ),
}
OPERATORS: dict[str, str | None] = {name: operator for operator, names in MEANINGS.items() for name in names.split()}
CLASSES = {  # last part of match.class -> the transformers class of today
    "DeepseekV2MoE": "DeepseekV2Moe",
    "DeepseekV3MoE": "DeepseekV3MoE",
    "DeepseekV2YarnRotaryEmbedding": "DeepseekV2RotaryEmbedding",
    "DeepseekV3YarnRotaryEmbedding": "DeepseekV3RotaryEmbedding",
    "MoEGate": "DeepseekV3TopkRouter",
}
MOVED = {"block_sparse_moe": "mlp"}  # modules that have another name in transformers 5
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
    from ktx.errors import UsageError, did_you_mean

    name = (rule.replace or "").rpartition(".")[2]
    if name and name not in OPERATORS:
        raise UsageError(f"{rule.where}: KTransformers' {name} is not known here{did_you_mean(name, OPERATORS)}")
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
    return replace(rule, name=_moved(rule.name), cls=cls, replace=operator, kwargs=kwargs, device=device)


def _moved(pattern: re.Pattern[str] | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    text = pattern.pattern
    for old, new in MOVED.items():
        text = text.replace(old, new)
    return re.compile(text)
