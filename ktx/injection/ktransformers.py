"""Translates KTransformers v0.3 rule files: their class names and options to those of ktx."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

from ktx.injection.rule import Rule

PREFIX = "ktransformers."
# ktx operator -> last part of replace.class in their files, with old spellings; None: the transformers module stays.
CLASSES_BY_OPERATOR: dict[str | None, str] = {
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
OPERATORS: dict[str, str | None] = {
    name: operator for operator, names in CLASSES_BY_OPERATOR.items() for name in names.split()
}
CLASSES = {  # last part of match.class -> current transformers class
    "DeepseekV2MoE": "DeepseekV2Moe",
    "DeepseekV3MoE": "DeepseekV3MoE",
    "DeepseekV2YarnRotaryEmbedding": "DeepseekV2RotaryEmbedding",
    "DeepseekV3YarnRotaryEmbedding": "DeepseekV3RotaryEmbedding",
    "MoEGate": "DeepseekV3TopkRouter",
}
RENAMED_MODULES = {"block_sparse_moe": "mlp"}  # modules that transformers 5 renamed
SUPPORTED_OPTIONS = {"absorb_for_prefill"}
IGNORED_OPTIONS = {
    "prefill_device": "weights are on one device; operators choose the kernel by the number of tokens",
    "prefill_op": "operators choose the kernel by the number of tokens",
    "generate_op": "the weight type in the file determines the kernel",
    "out_device": "results are returned to the input's device",
    "backend": "the kernel follows the weight type and the CPU",
    "per_layer_prefill_intput_threshold": "prompts are prefilled in chunks (--chunk_size)",
    "transfer_map": "use `device:` for placement",
    "chunck_size": "use --chunk_size",
    "stride": "the kernels choose their tiles",
    "group_max_len": "the kernels accept any number of tokens",
    "num_bits": "weights stay in the file's type",
    "group_size": "weights stay in the file's type",
    "act_order": "weights stay in the file's type",
    "is_k_full": "weights stay in the file's type",
    "block_size": "the block size is the file's",
    "dump_enable": "ktx has no dump",
    "dump_dir": "ktx has no dump",
}


def translate(rule: Rule) -> Rule:
    """Translates a KTransformers rule to ktx; returns any other rule unchanged."""
    cls = rule.cls
    if cls and cls.startswith((PREFIX, "~")):
        cls = CLASSES.get(cls.rpartition(".")[2], cls.rpartition(".")[2])
    if (rule.replace is None and rule.kwargs) or (rule.replace or "").startswith(PREFIX):
        return _translate_class(rule, cls)
    return replace(rule, cls=cls) if cls != rule.cls else rule


def _translate_class(rule: Rule, cls: str | None) -> Rule:
    """Translates a rule whose replacement is a KTransformers class.

    `generate_device` becomes the device. `absorb_for_prefill` stays an option of MLA and is dropped elsewhere. All
    other options have no effect in ktx: they are warned of and dropped. Raises UsageError for an unknown class.
    """
    from ktx.errors import UsageError, did_you_mean

    name = (rule.replace or "").rpartition(".")[2]
    if name and name not in OPERATORS:
        raise UsageError(
            f"{rule.where}: KTransformers' class {name} is not known to ktx{did_you_mean(name, OPERATORS)}"
        )
    operator = OPERATORS.get(name)
    kwargs: dict[str, Any] = {}
    for key, value in rule.kwargs.items():
        if key in SUPPORTED_OPTIONS and operator == "MLA":
            kwargs[key] = value
        elif key not in SUPPORTED_OPTIONS and key != "generate_device":
            reason = IGNORED_OPTIONS.get(key, "this operator has no such option")
            warnings.warn(f"{rule.where}: {key} has no effect in ktx: {reason}", stacklevel=4)
    device = rule.device or rule.kwargs.get("generate_device")
    if device == "cuda":
        device = "cuda:0"
    return replace(rule, name=_rename_modules(rule.name), cls=cls, replace=operator, kwargs=kwargs, device=device)


def _rename_modules(pattern: re.Pattern[str] | None) -> re.Pattern[str] | None:
    """Replaces module names in a pattern that transformers 5 renamed."""
    if pattern is None:
        return None
    text = pattern.pattern
    for old, new in RENAMED_MODULES.items():
        text = text.replace(old, new)
    return re.compile(text)
