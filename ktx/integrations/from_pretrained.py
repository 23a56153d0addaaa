"""`AutoModelForCausalLM.from_pretrained(folder, quantization_config=KtxConfig(...))`: ktx.load behind transformers' interface for quantisers.

transformers builds a model on the meta device, shows it to the quantiser, reads a checkpoint into it and shows it again. Here its modules are taken
away before the checkpoint is read, which is an empty file by then, and what ktx.load makes takes the model's place afterwards. A quantiser is shown four of the
call's arguments; the others are local variables of the call, so that each is heeded or refused. Where a version of transformers has no such variable any more, that is an error.

Of a hub id ktx fetches the files, by the arguments that transformers takes for that, and transformers looks for its checkpoint in a cache that holds the empty one alone.
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
from ktx.injection.rules import Rule
from ktx.integrations.experts_interface import NAME
from ktx.loader import load
from ktx.loader.meta_model import hub_folder, read_config, read_tokenizer
from ktx.model.lora import Adapted
from ktx.model.self_test import SelfTest
from ktx.ops.experts import of_layers
from ktx.transformers_compat import config_dict, text_part, writer_of_text
from ktx.utils.versions import admitted
from ktx.weights.base import open_weights

if TYPE_CHECKING:

    class QuantizationConfigMixin: ...

    class HfQuantizer:
        def __init__(self, quantization_config: Any, **kwargs: Any): ...

else:
    from transformers.quantizers import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

EMPTY = "ktx.safetensors"  # what transformers reads in place of a checkpoint
HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "token",
    "tqdm_class",
)  # how a hub id's files come
DOWNLOADS = ("download_kwargs_with_commit", "download_kwargs")  # that a checkpoint is looked for by: in 5.17, in 5.23
NEEDED = (  # local variables of from_pretrained in every version that ktx was tested with
    *("cls", "pretrained_model_name_or_path", "subfolder", "dtype", "trust_remote_code", "generation_config"),
    *HUB,
)
PLACES = "KtxConfig(device=..., moe_device=..., devices=...) says where modules are"
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that leave the choice to accelerate
REFUSED: dict[
    str, tuple[tuple[Any, ...], str]
] = {  # arguments of from_pretrained: values that ask for nothing, and what to do instead
    "state_dict": ((None,), "weights come from files: KtxConfig(weights=...)"),
    "gguf_file": ((None,), "name the file by KtxConfig(weights=FILE)"),
    "variant": ((None,), "name the file by KtxConfig(weights=FILE)"),
    "use_safetensors": ((None, True), "ktx reads safetensors and GGUF"),
    "disable_mmap": ((None, False), "ktx maps its files"),
    "proxies": ((None,), "set HTTPS_PROXY"),
    "code_revision": ((None,), "code is of the revision of the weights"),
    "ignore_mismatched_sizes": ((False,), "ktx loads weights of the right sizes only"),
    "key_mapping": ((None,), "ktx knows the names of tensors by family (docs/models.md)"),
    "max_memory": ((None,), PLACES),
    "offload_folder": ((None,), PLACES),
    "offload_buffers": ((False,), PLACES),
    "device_mesh": ((None,), PLACES),
    "distributed_config": ((None,), PLACES),
    "tp_plan": ((None,), PLACES),
    "tp_size": ((None,), PLACES),
    "fusion_config": ((None,), "ktx's operators compute the model"),
    "use_kernels": ((False,), "ktx's operators compute the model"),
    "kernel_config": ((None,), "ktx's operators compute the model"),
    "allow_all_kernels": ((False,), "ktx's operators compute the model"),
}


@dataclass(repr=False)
class KtxConfig(QuantizationConfigMixin):
    """What `ktx.load` is to do when `from_pretrained` is given this as `quantization_config`; the arguments are those of ktx.load.

    The folder, `dtype`, `trust_remote_code` and a `config` are from_pretrained's own arguments. `weights` default to what is in the folder.
    """

    weights: str | Path | None = None
    rules: str | Path | Sequence[Rule] | None = None
    _: KW_ONLY
    kv_dtype: KVType = None
    threads: int | None = None
    weight_dtype: str | None = None
    moe_dtype: str | None = None
    moe_experts: int | None = None
    progress: Any = True
    cache_dir: str | Path | None = None
    mtp: bool = False
    defer_experts: int = 0
    device: str | Sequence[str] | None = None
    moe_device: str | None = None
    shared_device: str | None = None
    devices: Mapping[str, str | Sequence[str]] | None = None
    gpu_experts: int | None = None
    stream_experts: int | str | None = None
    self_test: SelfTest = True
    lora: Adapted | Sequence[Adapted] | None = None
    quant_method: str = field(default=NAME, init=False)

    def options(self) -> dict[str, Any]:
        """Arguments of ktx.load."""
        return {of.name: getattr(self, of.name) for of in dataclasses.fields(self) if of.init}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the dictionary that a `quantization_config` may be, too; also from that of a packed checkpoint, whose version is looked at where its files are read."""
        made = cls(**{name: value for name, value in config_dict.items() if name not in ("quant_method", "version")})
        unused: dict[str, Any] = made.update(**kwargs)  # type: ignore[attr-defined]
        return (made, unused) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; objects as their text."""
        return {"quant_method": NAME} | {name: _plain(value) for name, value in self.options().items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else str(value)


class KtxQuantizer(HfQuantizer):
    """Between transformers' from_pretrained and ktx.load; transformers makes one a call."""

    is_trainable = True
    config: Any = None  # the configuration that counts
    device: str | None = None  # by device_map
    downloads: Any = None  # how transformers looks for files of a hub id

    def __init__(self, quantization_config: KtxConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.asked = quantization_config
        self.call = _call()
        for name, (usual, instead) in REFUSED.items():
            given = self.call.get(name)
            if name in self.call and not any(given is value for value in usual):
                raise UsageError(f"from_pretrained: {name} does nothing with KtxConfig; {instead}")
        if self.call["pretrained_model_name_or_path"] is None:
            raise UsageError("from_pretrained: KtxConfig needs a folder or a hub id in the place of None")
        self.name = str(self.call["pretrained_model_name_or_path"])

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    def update_device_map(self, device_map: Any) -> None:
        """Whole models go to a device by it; transformers itself has nothing to place."""
        if device_map is None:
            return
        if self.asked.device is not None:
            raise UsageError("from_pretrained: device_map and KtxConfig(device=...) say the same; give one of them")
        if isinstance(device_map, str) and device_map in SPREAD:
            if gpus():
                raise UsageError(f"from_pretrained: device_map={device_map!r} is not known to ktx; {PLACES}")
            return
        if not isinstance(device_map, Mapping) or set(device_map) != {""}:
            raise UsageError(f"from_pretrained: device_map places modules one by one; {PLACES}")
        (device,) = device_map.values()
        self.device = f"cuda:{device}" if isinstance(device, int) else str(device)

    def update_attn_implementation(self, config: Any) -> Any:
        return self._begin(config)

    def update_tp_plan(self, config: Any) -> Any:  # transformers 5.17 has not the other one
        return self._begin(config)

    def _begin(self, config: Any) -> Any:
        """Keeps what was asked for in a configuration, and has transformers look for no checkpoint."""
        own = copy.deepcopy(config)
        del own.quantization_config
        self.attention, self.experts = own._attn_implementation, own._experts_implementation
        own._attn_implementation = own._experts_implementation = None
        own.name_or_path = self.name
        self.config = text_part(own)
        if getattr(self.config, "quantization_config", None) is not None:  # of the part
            del self.config.quantization_config
        self._check_class()
        self.place = tempfile.TemporaryDirectory(prefix="ktx-")
        self.empty = Path(self.place.name, EMPTY)
        self.folder = self._located()
        self._tie()
        save_file({}, self.empty)
        config.transformers_weights = EMPTY
        if getattr(config, "dtype", None) is None:
            config.dtype = torch.float32  # else it would be looked up in the checkpoint
        return config

    def _tie(self) -> None:
        """Of a model of text and pictures an AutoModel hands over the text's configuration, without what the whole says of the output layer."""
        if not (self.folder / "config.json").exists() or "text_config" not in config_dict(str(self.folder)):
            return
        whole = read_config(self.folder, bool(self.call["trust_remote_code"]))
        if type(whole) is type(self.config) and whole.tie_word_embeddings:
            self.config.tie_word_embeddings = True

    def _check_class(self) -> None:
        """UsageError for a class that is not the one that writes text by this configuration, before anything is fetched."""
        asked, wanted = self.call["cls"], writer_of_text(self.config)
        if self._by_its_code() or asked is wanted:
            return
        if wanted is None:
            raise UsageError(
                f"from_pretrained: transformers has no language model by itself for a {self.config.model_type}; KtxConfig loads language models"
            )
        raise UsageError(
            f"from_pretrained: KtxConfig loads a {wanted.__name__} of this configuration, no {asked.__name__};"
            " call AutoModelForCausalLM.from_pretrained"
        )

    def _by_its_code(self) -> bool:
        """Whether the class comes with the model."""
        known = getattr(self.config, "auto_map", None) or {}
        return bool(self.call["trust_remote_code"]) and "AutoModelForCausalLM" in known

    def _located(self) -> Path:
        """The folder of the model's files. Those of a hub id are fetched, or come from its cache; transformers then looks for a checkpoint in an own cache."""
        below = self.call["subfolder"] or ""
        if os.path.isdir(self.name):
            return Path(self.name, below)
        root = hub_folder(self.name, self.asked.weights is None, below, **{name: self.call[name] for name in HUB})
        from huggingface_hub.file_download import repo_folder_name

        downloads = next((self.call[name] for name in DOWNLOADS if name in self.call), None)
        if not isinstance(downloads, dict):
            raise _changed(DOWNLOADS)
        cache = Path(self.place.name, repo_folder_name(repo_id=self.name, repo_type="model"))
        self.empty = cache / "snapshots" / root.name / below / EMPTY
        revision = cache / "refs" / str(downloads["revision"] or "main")
        for path in (self.empty, revision):
            path.parent.mkdir(parents=True, exist_ok=True)
        revision.write_text(root.name)
        self.downloads, self.usual_downloads = downloads, dict(downloads)
        downloads |= {"cache_dir": self.place.name, "local_files_only": True, "force_download": False}
        if "commit_hash" in downloads:
            downloads["commit_hash"] = root.name
        if self._by_its_code():  # from the same revision
            self.config.name_or_path = str(root)
            known = self.config.auto_map
            self.config.auto_map = {name: _below(of, self.name) for name, of in known.items()}
        return root / below

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str], **kwargs: Any) -> None:
        """Leaves nothing that a checkpoint could be read for."""
        if self.downloads is not None:
            self.downloads |= self.usual_downloads
        checkpoint_files[:] = [str(self.empty)]
        for held in (model._modules, model._parameters, model._buffers):
            held.clear()
        model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """The model becomes what ktx.load makes."""
        self.place.cleanup()
        options = self.asked.options() | ({"device": self.device} if self.device else {})
        made, _ = load.load(
            self.folder,
            dtype=self._dtype(),
            trust_remote_code=bool(self.call.get("trust_remote_code")),
            config=self.config,
            tokenizer=False,
            **options,
        )
        made.config.name_or_path = self.name
        if type(made).__name__ != type(model).__name__:
            raise UsageError(
                f"from_pretrained: ktx loaded a {type(made).__name__}, not the {type(model).__name__} that was asked for; take ktx.load"
            )
        made.ktx.tokenizer = self._tokenizer(made)
        self._check_experts(made)
        given = {"generation_config": model.generation_config} if self.call.get("generation_config") else {}
        own = {name: model.__dict__[name] for name in ("generate",) if name in model.__dict__}  # of the folder's code
        model.__class__ = type(made)
        model.__dict__.clear()
        model.__dict__.update(made.__dict__ | own | given)
        model.__dict__["ktx"] = made.ktx.of(model)
        model.generation_config.disable_compile = True
        if self.attention is not None:
            model.set_attn_implementation(self.attention)
        if self.experts is not None and not of_layers(model):
            model.set_experts_implementation(self.experts)

    def _dtype(self) -> torch.dtype | None:
        """What the model computes in; "auto", which is transformers' default, is ktx's choice."""
        wish = self.call.get("dtype")
        if wish == "auto":
            return None
        dtype = getattr(torch, wish, None) if isinstance(wish, str) else wish
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"from_pretrained: dtype={wish!r} is no torch type; KtxConfig's models compute in one")
        return dtype

    def _tokenizer(self, made: Any) -> Any:
        """For the model's engine; None where there is none, which from_pretrained does not need."""
        try:
            source = open_weights(made.ktx.weights, self.config)
            return read_tokenizer(self.folder, source, bool(self.call.get("trust_remote_code")))
        except BadFile:
            return None

    def _check_experts(self, made: Any) -> None:
        if self.experts not in (None, NAME) and (found := of_layers(made)):
            raise UsageError(
                f"from_pretrained: experts_implementation={self.experts!r}, but {found[0][0]} is computed by ktx;"
                " leave it out, or keep transformers' experts by a rule (docs/rules.md)"
            )


def _call() -> dict[str, Any]:
    """What the from_pretrained under way was given: its local variables. UsageError outside of one, KtxError where it has others than ktx knows."""
    frame, found = inspect.currentframe(), dict[str, Any]()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained":
            known = frame.f_locals
            if not found and frame.f_globals.get("__name__") == "transformers.modeling_utils":
                found = dict(known)
            elif found and "code_revision" in known:  # of an AutoModel
                found["code_revision"] = known["code_revision"]
        frame = frame.f_back
    if not found:
        raise UsageError(
            "KtxConfig is an argument of from_pretrained: AutoModelForCausalLM.from_pretrained(DIR, quantization_config=...)"
        )
    if missing := [name for name in NEEDED if name not in found]:
        raise _changed(missing)
    return found


def _changed(missing: Sequence[str]) -> KtxError:
    import transformers

    return KtxError(
        f"from_pretrained of transformers {transformers.__version__} has no {', '.join(missing)}, which KtxConfig reads; take ktx.load,"
        f" or pip install '{admitted('transformers')}'"
    )


def _below(reference: Any, name: str) -> Any:
    """A reference to code in a model's own repository without its name; several of them too."""
    if isinstance(reference, (list, tuple)):
        return [_below(each, name) for each in reference]
    return reference.removeprefix(f"{name}--") if isinstance(reference, str) else reference
