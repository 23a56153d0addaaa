"""A modeling file that names or computes something otherwise is refused when the plan is made, never answered with
nonsense.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types

import pytest
import torch
from transformers import AutoConfig

from ktx.errors import UsageError
from ktx.injection.inject import InjectOptions, inject
from ktx.injection.rules import load_rules
from ktx.ops import contract
from ktx.transformers_compat import default_cache_name
from ktx.utils import versions
from tests.support.tiny_models import COMMON, FAMILIES

CACHE = default_cache_name()


def rewritten(family, changes):
    """A model on the meta device of a family's modeling file with other text in it."""
    real = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    text = inspect.getsource(real)
    for pattern, replacement in changes:
        assert re.search(pattern, text), f"{pattern} is not in {family}'s modeling file"
        text = re.sub(pattern, replacement, text)
    module = types.ModuleType(f"transformers.models.{family}.modeling_rewritten")
    module.__package__, module.__file__ = real.__package__, real.__file__
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, module.__name__, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES.get(family, {})))
    name = next(n for n in vars(module) if n.endswith("ForCausalLM"))
    with torch.device("meta"):
        return getattr(module, name)(config).eval()


def planned(family, changes=()):
    model = rewritten(family, changes)
    rules = load_rules(family.replace("_", "-"))
    return inject(model, rules, model.config, InjectOptions(dtype=torch.float32, warn_unmatched=False))


@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_next", "mixtral"]
)
def test_a_copy_as_it_is_passes(family):
    assert planned(family)


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        # the arguments of a forward
        pytest.param("llama", [(rf"\b{CACHE}\b", "kv_store")], "argument 'kv_store'", id="cache-everywhere"),
        pytest.param("deepseek_v3", [(rf"\b{CACHE}\b", "kv_store")], "argument 'kv_store'", id="cache-mla"),
        pytest.param("qwen3_next", [(r"\bcache_params\b|\bcache\b", "kv_store")], "cache in its forward", id="cache-recurrent"),  # noqa: E501
        pytest.param("llama", [(r"\bposition_embeddings\b", "rotary_tables")], "rotary_tables", id="tables"),
        pytest.param("llama", [(r"\battention_mask\b", "visible")], "argument 'visible'", id="mask"),
        pytest.param(
            "qwen3_moe",
            [(r"(class Qwen3MoeTopKRouter(?:.|\n)*?def forward\(self, hidden_states)", r"\1, temperature=1.0")],
            "argument 'temperature'",
            id="router-argument",
        ),
        pytest.param(
            "llama",
            [(r"(class LlamaMLP(?:.|\n)*?def forward\(self, x)", r"\1, lora_index=None")],
            "argument 'lora_index'",
            id="mlp-argument",
        ),
        pytest.param(
            "qwen3_moe",
            [(r"(top_k_index: [^,]*),(\s*)(top_k_weights: [^,]*),", r"\3,\2\1,")],
            "experts contract.*top_k_weights, top_k_index",
            id="experts-order",
        ),
        # attributes that are read
        pytest.param("llama", [(r"\bself\.scaling\b", "self.softmax_scale")], "no 'scaling'", id="scaling"),
        pytest.param("deepseek_v3", [(r"\bself\.scaling\b", "self.softmax_scale")], "no 'scaling'", id="mla-scaling"),
        pytest.param("llama", [(r"\bself\.layer_idx\b", "self.layer_index")], "layer_idx", id="layer-idx"),
        pytest.param("llama", [(r"\bself_attn\b", "attention")], "self_attn", id="child"),
        pytest.param("qwen3_moe", [(r"\bself\.norm_topk_prob\b", "self.renormalise")], "norm_topk_prob", id="renorm"),
        pytest.param("qwen3_moe", [(r"\bself\.top_k\b", "self.chosen")], "top_k", id="top-k"),
        pytest.param("deepseek_v3", [(r"\be_score_correction_bias\b", "score_bias")], "choice of experts", id="bias"),
        pytest.param("deepseek_v3", [(r"\bself\.shared_experts\b", "self.always")], "a child 'always'", id="shared"),
        pytest.param("gpt_oss", [(r"\bself\.sinks\b", "self.sink_logits")], "sinks", id="sinks"),
        pytest.param("llama", [(r"\bvariance_epsilon\b", "small")], "epsilon", id="epsilon"),
        pytest.param("qwen3_moe", [(r"\bself\.down_proj\b", "self.down")], "down_proj", id="experts-parameter"),
        # what is computed between them
        pytest.param(
            "llama",
            [(r"query_states = self\.q_proj\(hidden_states\)", "query_states = 2 * self.q_proj(hidden_states)")],
            "computes queries in another way",
            id="queries",
        ),
        pytest.param(
            "llama",
            [(r"hidden_states = residual \+ hidden_states", "hidden_states = residual + 0.5 * hidden_states")],
            "computes a layer in another way",
            id="residual",
        ),
        pytest.param(
            "llama", [(r"torch\.cat\(\(-x2, x1\), dim=-1\)", "torch.cat((x2, -x1), dim=-1)")], "in another way", id="rope"  # noqa: E501
        ),
        pytest.param(
            "llama",
            [(r"ALL_ATTENTION_FUNCTIONS\.get_interface\(\s*self\.config\._attn_implementation, eager_attention_forward\s*\)",  # noqa: E501
              "eager_attention_forward")],
            "attention registry|does not compute",
            id="registry",
        ),
        pytest.param(
            "llama", [(rf"{CACHE}\.update\(key_states, value_states", f"{CACHE}.update(value_states, key_states")],
            "keys|values", id="cache-update",
        ),
        pytest.param("llama", [(rf"({CACHE}\.update\(key_states, value_states, )self\.layer_idx", r"\g<1>0 * self.layer_idx - 1")],  # noqa: E501
                     "cache.update", id="cache-index"),
        pytest.param("deepseek_v3", [(r"\* self\.routed_scaling_factor\b", "* 2 * self.routed_scaling_factor")],
                     "weights of experts", id="router-scale"),
        pytest.param(
            "qwen3_moe",
            [(r"return router_logits, router_scores, router_indices", "return router_logits, router_indices, router_scores")],  # noqa: E501
            "logits, weights, ids",
            id="router-return",
        ),
        pytest.param(
            "deepseek_v3",
            [(r"self\.shared_experts\(residuals\)", "0.5 * self.shared_experts(residuals)")],
            "sum of its experts",
            id="shared-weight",
        ),
    ],
)  # fmt: skip
def test_whatever_is_otherwise_is_refused_with_the_versions_and_a_remedy(family, changes, what):
    with pytest.raises(UsageError, match=what) as error:
        planned(family, changes)
    message = str(error.value)
    if "takes an attention" not in message and "needs a weight" not in message:
        assert "model.layers." in message or "model.norm" in message


def test_the_error_names_class_versions_and_what_to_do():
    with pytest.raises(UsageError) as error:
        planned("llama", [(rf"\b{CACHE}\b", "kv_store")])
    for part in (
        "LlamaDecoderLayer",
        "'kv_store'",
        versions.installed_version("transformers"),
        versions.tested_range("transformers"),
        "pip install",
    ):
        assert part in str(error.value)
    assert "recursive: false" in str(error.value)  # or a rule that keeps the module


@pytest.mark.parametrize("name", ["q_offset", "kv_offset", "mask_function", "attention_mask"])
def test_a_mask_function_that_is_asked_by_other_names_is_refused(name, monkeypatch):
    from transformers import AttentionMaskInterface

    from ktx.ops.attention import interval_mask

    def renamed(*args, **kwargs):
        kwargs["something_else"] = kwargs.pop(name)
        return interval_mask(*args, **kwargs)

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "renamed", renamed)
    with pytest.raises(UsageError, match="masks in another way"):
        contract.check_masks.__wrapped__("renamed")
