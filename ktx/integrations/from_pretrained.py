"""ktx.load as a transformers quantizer: `from_pretrained(folder, quantization_config=KtxConfig(...))`.

transformers builds a model on the meta device, passes it to the quantizer, loads a checkpoint into it and passes it to
the quantizer again. Here the modules are removed before the checkpoint, an empty file, is loaded, and afterwards the
model that ktx.load returns takes the model's place. A quantizer receives only four of the call's arguments; the others
are read from the call's local variables, so that each argument is either used or refused. If a version of transformers
has no such variable, that is an error.

For a hub id ktx fetches the files with the arguments that transformers accepts for that, and transformers looks for its
checkpoint in a cache that contains only the empty one.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ktx.cache.kv import KVType
from ktx.devices import gpus
from ktx.errors import BadFile, KtxError, UsageError
from ktx.injection.rule import Rule
from ktx.integrations.names import NAME
from ktx.loader import load
from ktx.loader.build import OLD_ARGUMENTS
from ktx.loader.meta_model import hub_folder, read_config, read_tokenizer
from ktx.model.lora import AdapterArgument
from ktx.model.self_test import SelfTest
from ktx.ops.experts import experts_by_path
from ktx.transformers_compat import causal_lm_class, config_dict, text_config
from ktx.utils.deprecation import deprecated_arguments, deprecated_members
from ktx.utils.versions import requirement
from ktx.weights.open import open_weights

if TYPE_CHECKING:

    class QuantizationConfigMixin:
        """transformers' class, as far as this module uses it."""

    class HfQuantizer:
        """transformers' class, as far as this module uses it."""

        def __init__(self, quantization_config: Any, **kwargs: Any): ...

else:
    from transformers.quantizers import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

EMPTY_CHECKPOINT = "ktx.safetensors"  # what transformers loads instead of a checkpoint
# Arguments for fetching a hub id's files.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "tqdm_class")
# Local variables with the arguments for finding a checkpoint: in 5.17, in 5.23.
DOWNLOAD_LOCALS = ("download_kwargs_with_commit", "download_kwargs")
REQUIRED_LOCALS = (  # local variables of from_pretrained in every tested version
    *("cls", "pretrained_model_name_or_path", "subfolder", "dtype", "trust_remote_code", "generation_config"),
    *HUB_ARGUMENTS,
)
PLACEMENT_HINT = "use KtxConfig(device=..., moe_device=..., devices=...) for placement"
# Device maps for which accelerate chooses the devices.
AUTO_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Unsupported arguments of from_pretrained: values that have no effect, and the alternative.
UNSUPPORTED_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "state_dict": ((None,), "weights are loaded from files: use KtxConfig(weights=...)"),
    "gguf_file": ((None,), "use KtxConfig(weights=FILE)"),
    "variant": ((None,), "use KtxConfig(weights=FILE)"),
    "use_safetensors": ((None, True), "ktx reads safetensors and GGUF"),
    "disable_mmap": ((None, False), "ktx maps its files"),
    "proxies": ((None,), "set HTTPS_PROXY"),
    "code_revision": ((None,), "code is loaded from the revision of the weights"),
    "ignore_mismatched_sizes": ((False,), "ktx loads only weights of matching sizes"),
    "key_mapping": ((None,), "ktx maps tensor names by model family (docs/models.md)"),
    "max_memory": ((None,), PLACEMENT_HINT),
    "offload_folder": ((None,), PLACEMENT_HINT),
    "offload_buffers": ((False,), PLACEMENT_HINT),
    "device_mesh": ((None,), PLACEMENT_HINT),
    "distributed_config": ((None,), PLACEMENT_HINT),
    "tp_plan": ((None,), PLACEMENT_HINT),
    "tp_size": ((None,), PLACEMENT_HINT),
    "fusion_config": ((None,), "ktx's operators compute the model"),
    "use_kernels": ((False,), "ktx's operators compute the model"),
    "kernel_config": ((None,), "ktx's operators compute the model"),
    "allow_all_kernels": ((False,), "ktx's operators compute the model"),
}


@deprecated_members(**OLD_ARGUMENTS)
@deprecated_arguments(**OLD_ARGUMENTS)
@dataclass(repr=False)
class KtxConfig(QuantizationConfigMixin):
    """Options of `ktx.load` for `from_pretrained`, passed as `quantization_config`.

    The arguments are those of ktx.load, except the folder, `dtype`, `trust_remote_code` and `config`, which are
    arguments of from_pretrained itself. Default of `weights`: those in the folder.
    """

    weights: str | Path | None = None
    rules: str | Path | Sequence[Rule] | None = None
    _: KW_ONLY
    kv_dtype: KVType = None
    threads: int | None = None
    quantize: str | None = None
    quantize_experts: str | None = None
    num_experts_per_tok: int | None = None
    progress: Any = True
    packed_cache_dir: str | Path | None = None
    mtp: bool = False
    defer_experts: int = 0
    device: str | Sequence[str] | None = None
    moe_device: str | None = None
    shared_expert_device: str | None = None
    devices: Mapping[str, str | Sequence[str]] | None = None
    gpu_experts: int | None = None
    stream_experts_min_tokens: int | str | None = None
    self_test: SelfTest = True
    lora: AdapterArgument | Sequence[AdapterArgument] | None = None
    quant_method: str = field(default=NAME, init=False)

    def options(self) -> dict[str, Any]:
        """Returns the arguments for ktx.load."""
        return {option.name: getattr(self, option.name) for option in dataclasses.fields(self) if option.init}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Builds a KtxConfig from a dictionary, of a `quantization_config` argument or of a packed checkpoint.

        The version of a packed checkpoint is checked when its files are read.
        """
        config = cls(**{name: value for name, value in config_dict.items() if name not in ("quant_method", "version")})
        unused: dict[str, Any] = config.update(**kwargs)  # type: ignore[attr-defined]
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary for JSON, with other objects as text."""
        return {"quant_method": NAME} | {name: _plain(value) for name, value in self.options().items()}


def _plain(value: Any) -> Any:
    """Returns a value for JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


class KtxQuantizer(HfQuantizer):
    """Connects transformers' from_pretrained with ktx.load; transformers creates one per call."""

    is_trainable = True
    config: Any = None  # the configuration in effect
    device: str | None = None  # set by device_map
    downloads: Any = None  # transformers' arguments for finding files of a hub id

    def __init__(self, quantization_config: KtxConfig, **kwargs: Any):
        """Reads the call's arguments, and refuses those that would have no effect.

        Raises UsageError for such an argument, or if the call names no model.
        """
        super().__init__(quantization_config, **kwargs)
        self.ktx_config = quantization_config
        self.call = _find_call()
        for name, (ignored_values, alternative) in UNSUPPORTED_ARGUMENTS.items():
            argument = self.call.get(name)
            if name in self.call and not any(argument is value for value in ignored_values):
                raise UsageError(f"from_pretrained: {name} has no effect with KtxConfig; {alternative}")
        if self.call["pretrained_model_name_or_path"] is None:
            raise UsageError("from_pretrained: KtxConfig needs a folder or a hub id, not None")
        self.name = str(self.call["pretrained_model_name_or_path"])

    def is_serializable(self, **kwargs: Any) -> bool:
        """Returns True: `save_pretrained` of a loaded model writes packed weights or floats."""
        return True

    def update_device_map(self, device_map: Any) -> None:
        """Reads the device of a full model from `device_map`; transformers itself places nothing.

        Raises UsageError for maps that place modules one by one, or `auto` if there are GPUs.
        """
        if device_map is None:
            return
        if self.ktx_config.device is not None:
            raise UsageError(
                "from_pretrained: device_map and KtxConfig(device=...) both set the device; use one of them"
            )
        if isinstance(device_map, str) and device_map in AUTO_DEVICE_MAPS:
            if gpus():
                raise UsageError(
                    f"from_pretrained: device_map={device_map!r} is not supported by ktx; {PLACEMENT_HINT}"
                )
            return
        if not isinstance(device_map, Mapping) or set(device_map) != {""}:
            raise UsageError(f"from_pretrained: device_map places modules one by one; {PLACEMENT_HINT}")
        (device,) = device_map.values()
        self.device = f"cuda:{device}" if isinstance(device, int) else str(device)

    def update_attn_implementation(self, config: Any) -> Any:
        """Stores the configuration; transformers calls this method before it looks for a checkpoint."""
        return self._prepare(config)

    def update_tp_plan(self, config: Any) -> Any:  # transformers 5.17 has only this one
        """As `update_attn_implementation`, in versions of transformers without that method."""
        return self._prepare(config)

    def _prepare(self, config: Any) -> Any:
        """Stores the requested configuration for ktx.load, and lets transformers find only an empty checkpoint.

        The attention and experts implementations are taken out of it, and set again on the loaded model.
        """
        requested = copy.deepcopy(config)
        del requested.quantization_config
        self.attention, self.experts = requested._attn_implementation, requested._experts_implementation
        requested._attn_implementation = requested._experts_implementation = None
        requested.name_or_path = self.name
        self.config = text_config(requested)
        if getattr(self.config, "quantization_config", None) is not None:  # the text part's
            del self.config.quantization_config
        self._check_class()
        self.temp_dir = tempfile.TemporaryDirectory(prefix="ktx-")
        self.empty_checkpoint = Path(self.temp_dir.name, EMPTY_CHECKPOINT)
        self.folder = self._fetch()
        self._set_tied_embeddings()
        save_file({}, self.empty_checkpoint)
        config.transformers_weights = EMPTY_CHECKPOINT
        if getattr(config, "dtype", None) is None:
            config.dtype = torch.float32  # otherwise transformers reads it from the checkpoint
        return config

    def _set_tied_embeddings(self) -> None:
        """Sets tie_word_embeddings of a multimodal model, which AutoModel drops from the text model's configuration."""
        if not (self.folder / "config.json").exists() or "text_config" not in config_dict(str(self.folder)):
            return
        full_config = read_config(self.folder, bool(self.call["trust_remote_code"]))
        if type(full_config) is type(self.config) and full_config.tie_word_embeddings:
            self.config.tie_word_embeddings = True

    def _check_class(self) -> None:
        """Raises UsageError for a class that is not the configuration's causal LM class, before any download."""
        requested, expected = self.call["cls"], causal_lm_class(self.config)
        if self._uses_remote_code() or requested is expected:
            return
        if expected is None:
            raise UsageError(
                f"from_pretrained: transformers has no built-in language model for model_type {self.config.model_type};"
                " KtxConfig loads language models"
            )
        raise UsageError(
            f"from_pretrained: KtxConfig loads a {expected.__name__} for this configuration,"
            f" not a {requested.__name__}; call AutoModelForCausalLM.from_pretrained"
        )

    def _uses_remote_code(self) -> bool:
        """Whether the model's class is from the model's own code."""
        auto_map = getattr(self.config, "auto_map", None) or {}
        return bool(self.call["trust_remote_code"]) and "AutoModelForCausalLM" in auto_map

    def _fetch(self) -> Path:
        """Returns the folder of the model's files; files of a hub id are fetched or read from its cache.

        Then transformers must not download the checkpoint again: its download arguments are changed until the model is
        built, to search offline in a temporary cache that has the same revision with nothing but the empty checkpoint.
        """
        subfolder = self.call["subfolder"] or ""
        if os.path.isdir(self.name):
            return Path(self.name, subfolder)
        root = hub_folder(
            self.name, self.ktx_config.weights is None, subfolder, **{name: self.call[name] for name in HUB_ARGUMENTS}
        )
        downloads = next((self.call[name] for name in DOWNLOAD_LOCALS if name in self.call), None)
        if not isinstance(downloads, dict):
            raise _incompatible_error(DOWNLOAD_LOCALS)
        cache = Path(self.temp_dir.name, root.parents[1].name)  # root: models--OWNER--NAME/snapshots/COMMIT
        self.empty_checkpoint = cache / "snapshots" / root.name / subfolder / EMPTY_CHECKPOINT
        revision = cache / "refs" / str(downloads["revision"] or "main")
        for path in (self.empty_checkpoint, revision):
            path.parent.mkdir(parents=True, exist_ok=True)
        revision.write_text(root.name)
        self.downloads, self.saved_downloads = downloads, dict(downloads)
        downloads |= {"cache_dir": self.temp_dir.name, "local_files_only": True, "force_download": False}
        if "commit_hash" in downloads:
            downloads["commit_hash"] = root.name
        if self._uses_remote_code():  # load the code from the same revision
            self.config.name_or_path = str(root)
            auto_map = self.config.auto_map
            self.config.auto_map = {name: _below(reference, self.name) for name, reference in auto_map.items()}
        return root / subfolder

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str], **kwargs: Any) -> None:
        """Restores transformers' download arguments, and removes everything that a checkpoint could be loaded into."""
        if self.downloads is not None:
            self.downloads |= self.saved_downloads
        checkpoint_files[:] = [str(self.empty_checkpoint)]
        for container in (model._modules, model._parameters, model._buffers):
            container.clear()
        model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Loads the model with ktx.load and moves its state into transformers' model object.

        from_pretrained returns that object, so it takes the loaded model's class and attributes.
        """
        self.temp_dir.cleanup()
        options = self.ktx_config.options() | ({"device": self.device} if self.device else {})
        loaded, _ = load.load(
            self.folder,
            dtype=self._choose_dtype(),
            trust_remote_code=bool(self.call.get("trust_remote_code")),
            config=self.config,
            tokenizer=False,
            **options,
        )
        loaded.config.name_or_path = self.name
        if type(loaded).__name__ != type(model).__name__:
            raise UsageError(
                f"from_pretrained: ktx loaded a {type(loaded).__name__}, not the requested {type(model).__name__};"
                " use ktx.load"
            )
        loaded.ktx.tokenizer = self._read_tokenizer(loaded)
        self._check_experts(loaded)
        generation = {"generation_config": model.generation_config} if self.call.get("generation_config") else {}
        # Set by the folder's code.
        own_methods = {name: model.__dict__[name] for name in ("generate",) if name in model.__dict__}
        model.__class__ = type(loaded)
        model.__dict__.clear()
        model.__dict__.update(loaded.__dict__ | own_methods | generation)
        model.__dict__["ktx"] = loaded.ktx.for_copy(model)
        model.generation_config.disable_compile = True  # as in ktx.loader.meta_model, also for the caller's own
        if self.attention is not None:
            model.set_attn_implementation(self.attention)
        if self.experts is not None and not experts_by_path(model):
            model.set_experts_implementation(self.experts)

    def _choose_dtype(self) -> torch.dtype | None:
        """Returns the compute type; None, ktx's choice, for "auto", which is transformers' default."""
        requested = self.call.get("dtype")
        if requested == "auto":
            return None
        dtype = getattr(torch, requested, None) if isinstance(requested, str) else requested
        if not isinstance(dtype, torch.dtype):
            raise UsageError(
                f"from_pretrained: dtype={requested!r} is not a torch dtype; pass the dtype that the model computes in"
            )
        return dtype

    def _read_tokenizer(self, loaded: Any) -> Any:
        """Returns the tokenizer for the model's engine, or None if there is none; from_pretrained needs none."""
        try:
            source = open_weights(loaded.ktx.weights, self.config)
            return read_tokenizer(self.folder, source, bool(self.call.get("trust_remote_code")))
        except BadFile:
            return None

    def _check_experts(self, loaded: Any) -> None:
        """Raises UsageError for an experts_implementation that ktx's experts would ignore."""
        if self.experts not in (None, NAME) and (expert_modules := experts_by_path(loaded)):
            raise UsageError(
                f"from_pretrained: experts_implementation={self.experts!r},"
                f" but {expert_modules[0][0]} is computed by ktx;"
                " leave it out, or keep transformers' experts with a rule (docs/rules.md)"
            )


def _find_call() -> dict[str, Any]:
    """Returns the local variables, and thereby the arguments, of the current call of from_pretrained.

    They are read from the stack, because transformers passes only a few of the arguments to a quantizer.

    Raises:
        UsageError: no call of from_pretrained is on the stack.
        KtxError: a variable that ktx reads does not exist in this version of transformers.
    """
    frame, call_locals = inspect.currentframe(), dict[str, Any]()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained":
            frame_locals = frame.f_locals
            if not call_locals and frame.f_globals.get("__name__") == "transformers.modeling_utils":
                call_locals = dict(frame_locals)
            elif call_locals and "code_revision" in frame_locals:  # from AutoModel's from_pretrained
                call_locals["code_revision"] = frame_locals["code_revision"]
        frame = frame.f_back
    if not call_locals:
        raise UsageError(
            "KtxConfig is an argument of from_pretrained:"
            " AutoModelForCausalLM.from_pretrained(DIR, quantization_config=...)"
        )
    if missing := [name for name in REQUIRED_LOCALS if name not in call_locals]:
        raise _incompatible_error(missing)
    return call_locals


def _incompatible_error(missing: Sequence[str]) -> KtxError:
    """Returns the error for variables that this version of transformers does not have."""
    import transformers

    return KtxError(
        f"from_pretrained of transformers {transformers.__version__} has no {', '.join(missing)},"
        f" which KtxConfig reads; use ktx.load, or pip install '{requirement('transformers')}'"
    )


def _below(reference: Any, name: str) -> Any:
    """Removes the repository's name from a reference to code in the model's own repository, or from several."""
    if isinstance(reference, (list, tuple)):
        return [_below(item, name) for item in reference]
    return reference.removeprefix(f"{name}--") if isinstance(reference, str) else reference
