"""The class of a loaded model, which extends its transformers class for packed weights.

It changes copying, pickling, counting parameters and saving.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.loader.load_weights import ProgressSink
from ktx.model import training_notes
from ktx.model.checkpoint_folder import CheckpointFolder
from ktx.model.saving import save
from ktx.model.saving_packed import save_packed
from ktx.ops import class_patches
from ktx.ops.base import Operator, unpack
from ktx.ops.embed import Embedding
from ktx.ops.fusion.layer_group import group_layers
from ktx.ops.linear import Linear
from ktx.ops.weight_traffic import module_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ktx.cache.kv import KVType
    from ktx.injection.inject import Plan
    from ktx.model.lora import Adapters
    from ktx.model.notes import Note
    from ktx.model.pickling import WeightFiles
    from ktx.model.self_test import SelfTest
    from ktx.ops.mtp import MTP
else:
    PreTrainedModel = object

BERT_EMBEDDING = "embeddings.word_embeddings"
_LOADED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class ModelInfo(Protocol):
    """What an engine and a copy read of `model.ktx`, see ktx.loader.load.LoadInfo."""

    plan: Plan
    weights: str
    nbytes: int
    kv_dtype: KVType
    tokenizer: PreTrainedTokenizerBase | None
    identity: Any
    self_test: SelfTest
    notes: list[Note]
    files: WeightFiles | None
    adapters: Adapters

    def for_copy(self, model: nn.Module) -> ModelInfo:
        """Returns a copy that refers to `model`."""


class LoadedModel(PreTrainedModel):
    """Mixin in front of a transformers class; the combined class has the name and module of that class.

    `ktx` describes how the model was loaded; `mtp` exists only if the MTP layer was loaded.
    """

    if TYPE_CHECKING:  # transformers evaluates the annotations of a subclass, where these names do not exist
        ktx: ModelInfo  # type: ignore[assignment]
        mtp: MTP

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the combined class by its transformers class, because it is created at run time."""
        hf_class = type(self).__dict__.get("made_of")
        if hf_class is None:  # a user's subclass
            return super().__reduce_ex__(protocol)
        return _empty_model, (hf_class, getattr(self.__dict__.get("ktx"), "files", None)), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copied or unpickled model; a copy gets its own LoadInfo, which refers to it weakly."""
        super().__setstate__(state)
        _watch_modules(self)
        info = self.__dict__.get("ktx")
        if info is not None:
            self.__dict__["ktx"] = info.for_copy(self)
            if info.files is not None:
                info.files.free()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config":  # PEFT has added adapters
            training_notes.note_uncounted_weights(self)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As torch's; packed weights that are to be trained become float parameters.

        Raises:
            UsageError: some of them cannot; nothing is changed then.
        """
        if requires_grad:
            unpack(self)
        return super().requires_grad_(requires_grad)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        save_original_format: bool = True,
        *,
        dtype: torch.dtype | None = None,
        packed: bool = False,
        progress: bool | ProgressSink = True,
        **kwargs: Any,
    ) -> None:
        """As transformers' save_pretrained. Adapters and a given `state_dict` are written by transformers itself.

        Args:
            dtype: type of the written floats (ktx.model.saving.save).
            packed: writes each weight in its type in memory, for ktx.load (ktx.model.saving_packed.save_packed).
            progress: as in ktx.load.

        Raises:
            UsageError: an argument is not supported for packed weights.
            DoesNotFit: the disk has too little space.
        """
        if packed and dtype is not None:
            raise UsageError(
                "save_pretrained: packed=True writes each weight in its own type; leave out dtype or packed"
            )
        if state_dict is not None or getattr(self, "_hf_peft_config_loaded", False):
            option = "dtype" if dtype is not None else "packed" if packed else ""
            if option:
                raise UsageError(
                    f"save_pretrained: {option} applies to the model's own weights, not to a state_dict or an adapter"
                )
            options: dict[str, Any] = {
                "variant": variant,
                "save_original_format": save_original_format,
                "push_to_hub": push_to_hub,
            }
            super().save_pretrained(
                save_directory, is_main_process, state_dict, max_shard_size=max_shard_size, **options, **kwargs
            )
            return
        if not kwargs.pop("safe_serialization", True):
            raise UsageError("save_pretrained: weights are written as safetensors; leave safe_serialization out")
        if push_to_hub or kwargs:
            unsupported = "push_to_hub" if push_to_hub else next(iter(kwargs))
            raise UsageError(
                f"save_pretrained: {unsupported} is not supported for a model with packed weights;"
                " write it to a folder and upload that with huggingface_hub"
            )
        if not is_main_process:
            return
        folder = CheckpointFolder.from_arguments(save_directory, max_shard_size, variant)
        if packed:
            save_packed(self, folder, progress)
        else:
            save(self, folder, dtype=dtype, save_original_format=save_original_format, progress=progress)

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's, but finds the input embedding by BERT's name too.

        PEFT looks for the embedding by that name, else among the parameters, to which packed weights do not belong.
        """
        if target == BERT_EMBEDDING and not hasattr(self, target.partition(".")[0]):
            return self.get_input_embeddings()
        return super().get_submodule(target)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, then rebuilds what is derived from weights.

        Modules with packed weights pack the values that changed (see Operator.take). A tied embedding may be given
        under its output layer's name.
        """
        weights = dict(state_dict)
        for target, origin in dict(self.all_tied_weights_keys or {}).items():
            if target in weights and origin not in weights:
                weights[origin] = weights[target]
        result = super().load_state_dict(weights, strict, assign)
        if not strict:  # the caller reads the missing keys, among them names that were only filled in above
            result.missing_keys.extend(name for name in weights if name not in state_dict)
        self._rebuild()
        return result

    def _rebuild(self) -> None:
        """Ties output layers and rebuilds everything derived from weights, after weights have changed.

        Operators rebuild what they derive from their weights, children before parents; then layers are grouped for
        fusion.
        """
        for target, origin in dict(self.all_tied_weights_keys or {}).items():
            modules: list[Any] = [self.get_submodule(name.rpartition(".")[0]) for name in (target, origin)]
            head, embedding = modules
            tied = isinstance(head, Linear) and any(tied_module is embedding for tied_module in head.ties)
            if tied and isinstance(embedding, Embedding):
                head.parts = [embedding.packed]
        for module in reversed(list(self.modules())):  # children before their parents
            if isinstance(module, Operator):
                module.rebuild()
        group_layers(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As torch's, for `to`, `half` etc. Raises before any module changes if an operator does not support it."""
        for module in self.modules():  # all checks run before any module changes
            if isinstance(module, Operator):
                module.cast_dtype(fn)
        result = super()._apply(fn, recurse)
        group_layers(self)
        return result

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers'; packed weights count as the values that they represent.

        A tied matrix counts once, and no packed weight is trainable.
        """
        count: int = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        for module in self.modules():
            if isinstance(module, Operator) and not (isinstance(module, Embedding) and exclude_embeddings):
                is_tied = isinstance(module, Linear) and module.tied_to
                count += sum(
                    prod(floats.shape) for name, floats in module.floats().items() if not (is_tied and name == "weight")
                )
        return count

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of packed weights, parameters and buffers."""
        weight_bytes = sum(size.held_bytes for size in module_bytes(self))
        return weight_bytes + return_buffers * sum(buffer.nbytes for buffer in self.buffers())

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """As transformers'; embedding and output layer become plain torch modules first, which it can resize.

        Their weights are the floats that were packed, in the compute type.
        """
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            self._unpack_embeddings()
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _unpack_embeddings(self) -> None:
        """Replaces embedding and output layer by plain torch modules, which transformers can resize.

        They are tied to each other if the packed ones were.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if isinstance(embedding, Embedding):
            self.set_input_embeddings(embedding.to_torch(None))  # None: in the compute type
        if isinstance(head, Linear):
            plain_head = head.to_torch(None)
            if head.tied_to and isinstance(tied := self.get_input_embeddings(), nn.Embedding):
                plain_head.weight = tied.weight
            self.set_output_embeddings(plain_head)


def _loaded_class(hf_class: type[nn.Module]) -> type[nn.Module]:
    """Returns the class that combines LoadedModel with a transformers class; one class per transformers class."""
    if hf_class not in _LOADED_CLASSES:
        attributes = {name: getattr(hf_class, name) for name in ("__module__", "__qualname__", "__doc__")}
        attributes |= {"made_of": hf_class, "forward": _make_forward(hf_class)}
        _LOADED_CLASSES[hf_class] = type(hf_class.__name__, (LoadedModel, hf_class), attributes)
    return _LOADED_CLASSES[hf_class]


def _make_forward(hf_class: Any) -> Any:
    """Returns the forward of the transformers class, preceded by checks of what may have changed since loading.

    A script may have patched a class, replaced a module that has an adapter, or started to train frozen weights; fused
    calls and packed weights would ignore each of these silently. torch.compile sees the original forward only.
    """

    @functools.wraps(hf_class.forward)  # with its docstring
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Checks what may have changed since loading, then runs the transformers class's forward."""
        if torch.compiler.is_compiling():
            return hf_class.forward(self, *args, **kwargs)
        class_patches.update()  # disables fused calls that would bypass a patch
        info = self.__dict__.get("ktx")
        if info is not None and info.adapters.known:
            info.adapters.check(self)
        if self.training and torch.is_grad_enabled():
            training_notes.note_frozen_weights(self, kwargs | dict(enumerate(args)))
        return hf_class.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(hf_class.forward)  # type: ignore[attr-defined]
    return forward


def _watch_modules(model: nn.Module) -> None:
    """Watches the classes of all modules for patches, which disable fused calls that would bypass them."""
    for module in model.modules():
        class_patches.watch(module)


def _empty_model(hf_class: type[nn.Module], files: WeightFiles | None) -> Any:
    """Returns a model without state, for a copy or a pickle; loads the packed weights of a pickle first."""
    if files is not None:
        files.load_all()
    loaded_class = _loaded_class(hf_class)
    return loaded_class.__new__(loaded_class)


def set_loaded_class(model: nn.Module) -> None:
    """Sets a loaded model's class, and its operators' training flag to the model's, which parametrizations read."""
    model.train(model.training)
    _watch_modules(model)
    model.__class__ = _loaded_class(type(model))
