"""Isolates the differences between transformers versions: argument names, and imports that have moved or may move."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

CACHE_NAMES = (  # names of the cache parameter of forward
    "past_key_values",  # 5.17 to 5.23
    "cache_params",  # linear attention, 5.17 to 5.23
    "cache",  # all models, from 5.24 on; in earlier versions continuous batching passes another object by this name
)


@functools.cache
def default_cache_name() -> str:
    """The installed version's name of the cache in a model's forward and in its output."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    fields = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return next(name for name in CACHE_NAMES if name in fields)


@functools.cache
def cache_name(module: Any) -> str:
    """The name of the cache parameter of a module class's forward; "" when it has none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "")


def cache_aliases(name: str) -> tuple[str, ...]:
    """Older names under which transformers itself accepts an argument called `name`."""
    return CACHE_NAMES[:-1] if name == CACHE_NAMES[-1] else ()


def cache_argument(module: Any, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument for a module's forward.

    A wrapper whose forward has no cache parameter gets the installed version's name.
    """
    kind: Any = type(module)
    return {cache_name(kind) or default_cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None when it has none."""
    return getattr(output, default_cache_name(), None)


def causal_lm_class(config: Any) -> Any:
    """The causal language model class for a configuration; None when transformers has none."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def has_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal language model for a configuration."""
    return causal_lm_class(config) is not None


def checkpoint_renaming(config: Any) -> tuple[Callable[[str], str], list[Any]]:
    """Returns the mapping from a checkpoint's names to the model's parameters, from transformers' own table.

    Older checkpoints have the names of modeling code that has changed since.

    Returns:
        A function that maps a checkpoint key to the parameter path in the current modeling code, and the converters for
        parameters that checkpoints store in other tensors.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    names = [getattr(causal_lm_class(config), "__name__", ""), config.model_type]
    entries: list[Any] = next((found for name in names if (found := get_checkpoint_conversion_mapping(name))), [])
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]

    def rename(key: str) -> str:
        for entry in renamings:
            key = entry.rename_source_key(key)[0]
        return key

    return rename, [entry for entry in entries if isinstance(entry, WeightConverter)]


def apply_converter(converter: Any, name: str, tensors: dict[str, list[Any]], config: Any) -> Any:
    """Returns the values of parameter `name`, which a converter of transformers computes from checkpoint tensors.

    `tensors` are these by the converter's source patterns (see `checkpoint_renaming`).
    """
    result: Any = tensors
    patterns = {"source_patterns": converter.source_patterns, "target_patterns": converter.target_patterns}
    for operation in converter.operations:
        result = operation.convert(
            result, full_layer_name=name, model=None, config=config, missing_keys=None, **patterns
        )
    values = next(iter(result.values()))
    return values[0] if isinstance(values, list) else values


def text_config(config: Any) -> Any:
    """The language model's configuration within a multimodal one, because ktx loads the language model alone.

    Any other configuration is returned unchanged, also if the language model has no class of its own in transformers.
    The output layer is tied when either configuration ties it: the complete model follows the top-level option, which
    is where `save_pretrained` writes it. An output matrix in the checkpoint is used in any case.
    """
    text_class = getattr(config, "sub_configs", {}).get("text_config")
    if text_class is None or getattr(causal_lm_class(config), "config_class", None) != text_class:
        return config
    text = config.get_text_config()
    text.tie_word_embeddings = any(getattr(c, "tie_word_embeddings", None) for c in (config, text))
    return text


def dtype_plan(model: Any, dtype: Any) -> dict[str, Any]:
    """The dtypes of parameters that the model does not store in `dtype`, by name pattern.

    Routers' correction biases are f32.
    """
    return dict(model._get_dtype_plan(dtype))


def config_dict(source: str) -> dict[str, Any]:
    """The content of config.json of a folder or hub id."""
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(source)[0]


def keeps_own_cache(model: Any) -> bool:
    """Whether a model accepts only a cache class of its own (MiniMax-Text-01)."""
    return not model._supports_default_dynamic_cache()


@functools.cache
def _collector() -> Any:
    """The context variable in which transformers collects module outputs during a forward; per thread."""
    from transformers.utils.output_capturing import _active_collector

    return _active_collector


def collects_output(what: str) -> bool:
    """Whether the current forward collects module outputs of kind `what` ("attentions"), which kernels do not return.

    An argument or the configuration requests them.
    """
    import torch

    if torch.compiler.is_compiling():
        from transformers.utils.output_capturing import _active_collector as collector

        collected = collector.get() if collector.compiling else None  # torch.compile has no context variables
    else:
        collected = _collector().get()
    return collected is not None and what in collected


def collects_any_output() -> bool:
    """Whether the current forward collects module outputs of any kind."""
    return bool(_collector().get())


def is_output_hook(hook: Any) -> bool:
    """Whether a hook is transformers' output collector, which stays on modules after the first forward that collects.

    It does nothing in forwards that do not collect outputs.
    """
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def attention_name(config: Any) -> str:
    """The attention implementation of a configuration.

    It is read at each token, so this reads the attribute behind transformers' property, which takes thirty times as
    long.
    """
    try:
        found: str = object.__getattribute__(config, "_attn_implementation_internal")
    except AttributeError:
        found = config._attn_implementation
    return found


def attention_function(name: str) -> Callable[..., Any]:
    """transformers' attention function of a name. Raises KeyError for an unknown name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    found: Callable[..., Any] = functions.get_interface(name, None)
    return found


def to_checkpoint_form(model: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns a function that converts a state dict, or a part of it, to the form that `save_pretrained` writes.

    Names change, and stacked experts are split. With it ktx saves checkpoints of the same form as transformers does.
    """
    from types import SimpleNamespace

    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    changes: Any = getattr(model, "_weight_conversions", None)
    if changes is None:
        changes = get_model_conversion_mapping(model, add_legacy=False)
        changes = [change for change in changes if type(change).__name__ != "PrefixChange"]  # as transformers does
    if not changes:
        return dict
    model_stub: Any = SimpleNamespace(_weight_conversions=changes, config=model.config)
    return lambda state: revert_weight_conversion(model_stub, state)
