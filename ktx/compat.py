"""Every import from transformers that has moved before or may move again, in one place. Tested on 5.17 and 5.23."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def checkpoint_renaming(model_type: str) -> Callable[[str], str]:
    """A function from a checkpoint's key to the parameter path of today's modeling code, by transformers' own table."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    entries = [
        entry for entry in get_checkpoint_conversion_mapping(model_type) or [] if isinstance(entry, WeightRenaming)
    ]

    def rename(key: str) -> str:
        for entry in entries:
            key = entry.rename_source_key(key)[0]
        return key

    return rename


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
