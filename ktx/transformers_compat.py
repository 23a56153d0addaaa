"""What differs from one version of transformers to another, in one place: names of arguments, and every import that has moved before or may move again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

CACHE_NAMES = (  # what forwards call their cache
    "past_key_values",  # 5.17 to 5.23
    "cache_params",  # linear attention, 5.17 to 5.23
    "cache",  # all of them, from 5.24 on; before, continuous batching passes another object under this name
)


@functools.cache
def usual_cache_name() -> str:
    """What the installed version calls the cache in a model's forward and in its output."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    fields = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return next(name for name in CACHE_NAMES if name in fields)


@functools.cache
def cache_name(module: Any) -> str:
    """The parameter of a module class's forward that takes the cache; "" where it has none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "")


def cache_aliases(name: str) -> tuple[str, ...]:
    """Older names under which transformers itself accepts an argument called `name`."""
    return CACHE_NAMES[:-1] if name == CACHE_NAMES[-1] else ()


def cache_argument(module: Any, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of a module's forward. A wrapper that passes on whatever it gets is asked as the models of this version are."""
    kind: Any = type(module)
    return {cache_name(kind) or usual_cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where it has none."""
    return getattr(output, usual_cache_name(), None)


def writer_of_text(config: Any) -> Any:
    """The class that writes text by such a configuration; None where transformers has none."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def writes_text(config: Any) -> bool:
    """Whether transformers has a causal language model of such a configuration."""
    return writer_of_text(config) is not None


def checkpoint_renaming(config: Any) -> tuple[Callable[[str], str], list[Any]]:
    """A function from a checkpoint's key to the parameter path of today's modeling code, and converters for what is kept in other tensors, by transformers' own table."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    names = [getattr(writer_of_text(config), "__name__", ""), config.model_type]
    entries: list[Any] = next((found for name in names if (found := get_checkpoint_conversion_mapping(name))), [])
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]

    def rename(key: str) -> str:
        for entry in renamings:
            key = entry.rename_source_key(key)[0]
        return key

    return rename, [entry for entry in entries if isinstance(entry, WeightConverter)]


def converted(converter: Any, name: str, tensors: dict[str, list[Any]], config: Any) -> Any:
    """The parameter `name` that a converter makes of a checkpoint's tensors, given by pattern."""
    made: Any = tensors
    about = {"source_patterns": converter.source_patterns, "target_patterns": converter.target_patterns}
    for operation in converter.operations:
        made = operation.convert(made, full_layer_name=name, model=None, config=config, missing_keys=None, **about)
    values = next(iter(made.values()))
    return values[0] if isinstance(values, list) else values


def text_part(config: Any) -> Any:
    """The configuration of the language model in one of text and pictures, where transformers has that model by itself; any other as it is.

    The output layer is tied where either says so: the whole model goes by its top, which is where `save_pretrained` writes it. A matrix of its own in the file counts all the same.
    """
    part = getattr(config, "sub_configs", {}).get("text_config")
    if part is None or getattr(writer_of_text(config), "config_class", None) != part:
        return config
    text = config.get_text_config()
    text.tie_word_embeddings = any(getattr(of, "tie_word_embeddings", None) for of in (config, text))
    return text


def dtype_plan(model: Any, dtype: Any) -> dict[str, Any]:
    """Parameters that the model keeps in another type than `dtype` (routers' correction biases in f32): name pattern -> dtype."""
    return dict(model._get_dtype_plan(dtype))


def config_dict(source: str) -> dict[str, Any]:
    """The raw config.json of a folder or hub id."""
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(source)[0]


def keeps_own_cache(model: Any) -> bool:
    """Whether a model takes no cache but of a kind that only itself makes (MiniMax-Text-01)."""
    return not model._supports_default_dynamic_cache()


@functools.cache
def _collector() -> Any:
    """Where transformers keeps what the forward under way collects from its modules; each thread has its own."""
    from transformers.utils.output_capturing import _active_collector

    return _active_collector


def collects(what: str) -> bool:
    """Whether the forward under way collects outputs of a kind ("attentions") from its modules, by an argument or by its configuration."""
    import torch

    if torch.compiler.is_compiling():
        from transformers.utils.output_capturing import _active_collector as collector

        wanted = collector.get() if collector.compiling else None  # torch.compile knows no context variables
    else:
        wanted = _collector().get()
    return wanted is not None and what in wanted


def records() -> bool:
    """Whether the forward under way collects outputs of any kind from its modules."""
    return bool(_collector().get())


def is_recorder(hook: Any) -> bool:
    """Whether a hook is one that transformers leaves on modules after the first forward that collected outputs: it does nothing in others."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def attention_name(config: Any) -> str:
    """The implementation of attention that a configuration names. Asked at each token: transformers' own property takes thirty times as long as what is behind it."""
    try:
        found: str = object.__getattribute__(config, "_attn_implementation_internal")
    except AttributeError:
        found = config._attn_implementation
    return found


def attention_function(name: str) -> Callable[..., Any]:
    """The attention function that transformers knows by a name. KeyError for one that it does not know."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    found: Callable[..., Any] = functions.get_interface(name, None)
    return found


def written_form(model: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function from a model's own parameters to a checkpoint's, as `save_pretrained` writes them: other names, stacked experts apart. It takes some of them too."""
    from types import SimpleNamespace

    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    changes: Any = getattr(model, "_weight_conversions", None)
    if changes is None:
        changes = get_model_conversion_mapping(model, add_legacy=False)
        changes = [change for change in changes if type(change).__name__ != "PrefixChange"]  # as transformers does
    if not changes:
        return dict
    stand_in: Any = SimpleNamespace(_weight_conversions=changes, config=model.config)
    return lambda state: revert_weight_conversion(stand_in, state)
