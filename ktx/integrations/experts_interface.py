"""Registers ktx with transformers and torch on `import ktx`, whichever of them is imported first.

This covers `experts_implementation="ktx"`, the quantization method "ktx", and torch's FLOP counter. `import ktx` must
import neither torch nor transformers, so names are registered when the modules with these tables are imported, and
their implementations are imported on first use.
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

from ktx.integrations.names import NAME


def experts_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The function that transformers calls instead of an experts module's forward; see ktx.ops.experts_interface."""
    implementation = importlib.import_module("ktx.ops.experts_interface")  # late: it is a layer above this module
    return implementation.forward(None, module, *args, **kwargs)


def _register_experts(module: Any) -> None:
    module.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _register_quantization(module: Any) -> None:
    """Registers the method "ktx" with transformers.quantizers.auto, by proxies that import the real classes when used.

    Also patches its merge_quantization_configs, which would refuse a KtxConfig for a checkpoint with another
    quantization_config: a KtxConfig given to from_pretrained takes precedence over that of the checkpoint.
    """

    class Config(module.QuantizationConfigMixin):  # type: ignore[misc]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return importlib.import_module("ktx.integrations.from_pretrained").KtxConfig.from_dict(
                config_dict, **kwargs
            )

    class Quantizer(module.HfQuantizer):  # type: ignore[misc]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return importlib.import_module("ktx.integrations.from_pretrained").KtxQuantizer(*args, **kwargs)

    module.register_quantization_config(NAME)(Config)
    module.register_quantizer(NAME)(Quantizer)
    original = module.AutoHfQuantizer.merge_quantization_configs

    @functools.wraps(original)
    def merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        from_args = quantization_config_from_args
        if isinstance(from_args, dict) and from_args.get("quant_method") == NAME:
            from_args = Config.from_dict(from_args)
        return (
            from_args if getattr(from_args, "quant_method", None) == NAME else original(quantization_config, from_args)
        )

    module.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge)


def _register_flops(module: Any) -> None:
    if "ktx.kernels.cpu" in sys.modules:  # otherwise that module registers them when it is imported
        importlib.import_module("ktx.kernels.flops").register()


# Module: a name that it defines, and the function to call then.
TABLES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "transformers.integrations.moe": ("use_experts_implementation", _register_experts),
    "transformers.quantizers.auto": ("get_hf_quantizer", _register_quantization),
    "torch.utils.flop_counter": ("register_flop_formula", _register_flops),
}
_pending: dict[str, Callable[[Any], None]] = {}


class _Finder:
    """Finds the pending modules, each once, and registers ktx after they are executed."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """Returns the spec of a module that ktx waits for, whose loader then registers ktx; None for any other module.

        Python's import system calls it; it removes itself after the last pending module.
        """
        if (register := _pending.pop(name, None)) is None:
            return None
        if not _pending:
            sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _call_after(spec, register)
        return spec


def _call_after(spec: ModuleSpec, register: Callable[[Any], None]) -> None:
    """Makes the loader of `spec` call `register` after executing the module; before, it lacks what `register` needs."""
    loader: Any = spec.loader
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        register(module)

    loader.exec_module = exec_module


def install() -> None:
    """Registers ktx with modules that are imported already, and with the others when they are imported.

    A module in sys.modules may be half executed; only one that has its `late_name` has the tables to register in.
    """
    for name, (late_name, register) in TABLES.items():
        module = sys.modules.get(name)
        if hasattr(module, late_name):
            register(module)
        else:
            _pending[name] = register
    if _pending:
        sys.meta_path.insert(0, _Finder)
