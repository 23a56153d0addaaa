"""Every import from transformers that has moved before or may move again, in one place. Tested on 5.17 and 5.23."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _causal_class(config: Any) -> Any:
    """The class that writes text by such a configuration; None where transformers has none."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def writes_text(config: Any) -> bool:
    """Whether transformers has a causal language model of such a configuration."""
    return _causal_class(config) is not None


def checkpoint_renaming(config: Any) -> tuple[Callable[[str], str], list[Any]]:
    """A function from a checkpoint's key to the parameter path of today's modeling code, and converters for what is kept in other tensors, by transformers' own table."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    names = [getattr(_causal_class(config), "__name__", ""), config.model_type]
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
    if part is None or getattr(_causal_class(config), "config_class", None) != part:
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
