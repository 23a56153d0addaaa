"""What transformers knows of ktx from `import ktx` on, whichever of the two is imported first: `experts_implementation="ktx"`, and the quantisation method "ktx"; and torch's counter of operations.

`import ktx` may cost neither torch nor transformers, so names are registered when the modules with these tables are imported, and what stands behind
them is imported when it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "ktx"


def computed(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers calls in the place of an experts module's forward; see ktx.ops.experts_interface."""
    above = importlib.import_module("ktx.ops.experts_interface")  # it stands above this module
    return above.forward(None, module, *args, **kwargs)


def _experts(table: Any) -> None:
    table.ALL_EXPERTS_FUNCTIONS.register(NAME, computed)


def _quantisation(table: Any) -> None:
    """Stand-ins for KtxConfig and KtxQuantizer of ktx.integrations.from_pretrained; and of two configurations the one that is given counts where it is a KtxConfig."""

    class Config(table.QuantizationConfigMixin):  # type: ignore[misc]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return importlib.import_module("ktx.integrations.from_pretrained").KtxConfig.from_dict(
                config_dict, **kwargs
            )

    class Quantizer(table.HfQuantizer):  # type: ignore[misc]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return importlib.import_module("ktx.integrations.from_pretrained").KtxQuantizer(*args, **kwargs)

    table.register_quantization_config(NAME)(Config)
    table.register_quantizer(NAME)(Quantizer)
    usual = table.AutoHfQuantizer.merge_quantization_configs

    @functools.wraps(usual)
    def merged(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if isinstance(given, dict) and given.get("quant_method") == NAME:
            given = Config.from_dict(given)
        return given if getattr(given, "quant_method", None) == NAME else usual(quantization_config, given)

    table.AutoHfQuantizer.merge_quantization_configs = staticmethod(merged)


def _operations(table: Any) -> None:
    if "ktx.kernels.cpu" in sys.modules:  # else these do it when they are loaded
        importlib.import_module("ktx.kernels.flops").register()


TABLES: dict[str, tuple[str, Callable[[Any], None]]] = {  # modules of others: what they define, what is done then
    "transformers.integrations.moe": ("use_experts_implementation", _experts),
    "transformers.quantizers.auto": ("get_hf_quantizer", _quantisation),
    "torch.utils.flop_counter": ("register_flop_formula", _operations),
}
_waiting: dict[str, Callable[[Any], None]] = {}


class _Finder:
    """Finds these modules as others do, each once, and has their tables filled after they are imported."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if (fill := _waiting.pop(name, None)) is None:
            return None
        if not _waiting:
            sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _then(spec, fill)
        return spec


def _then(spec: ModuleSpec, fill: Callable[[Any], None]) -> None:
    loader: Any = spec.loader
    usual = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        usual(module)
        fill(module)

    loader.exec_module = exec_module


def install() -> None:
    """Fills the tables that are there, and sees to it that the others will be."""
    for name, (defined, fill) in TABLES.items():
        table = sys.modules.get(name)
        if hasattr(table, defined):
            fill(table)
        else:
            _waiting[name] = fill
    if _waiting:
        sys.meta_path.insert(0, _Finder)
