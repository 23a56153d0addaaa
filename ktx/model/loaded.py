"""What a loaded model does otherwise than its transformers class: it is copied, pickled, counted and written with the weights that operators hold packed."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.loader.load_weights import ProgressSink
from ktx.model import training_notes
from ktx.model.saving import save
from ktx.model.saving_packed import save_packed
from ktx.ops import class_patches
from ktx.ops.base import Operator, unpack
from ktx.ops.embed import Embedding
from ktx.ops.fusion import layer
from ktx.ops.linear import Linear
from ktx.ops.weight_traffic import sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ktx.model.pickling import Files
else:
    PreTrainedModel = object

BERT_EMBEDDING = "embeddings.word_embeddings"
_HEIRS: dict[type[nn.Module], type[nn.Module]] = {}


class Model(PreTrainedModel):
    """Before a transformers class in the bases of a loaded model's class, which has the name and module of that."""

    ktx: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        made_of = type(self).__dict__.get("made_of")
        if made_of is None:  # somebody's subclass
            return super().__reduce_ex__(protocol)
        return _bare, (made_of, getattr(self.__dict__.get("ktx"), "files", None)), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _watch(self)
        handle = self.__dict__.get("ktx")
        if handle is not None:
            self.__dict__["ktx"] = handle.of(self)
            if handle.files is not None:
                handle.files.close()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config":  # PEFT has put adapters on it
            training_notes.counted(self)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As torch's. Packed weights that are to be trained become parameters in floats; UsageError, before anything has changed, where some of them cannot."""
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
        """As transformers', in floats of `dtype` (see ktx.model.saving.save), or `packed`: each weight in the type that it has in memory, for ktx.load (ktx.model.saving_packed.save_packed).

        Adapters, and a state that is given, are transformers' own to write. `progress` is as ktx.load has it.
        """
        if packed and dtype is not None:
            raise UsageError(
                "save_pretrained: packed=True writes each weight in the type that it has; leave dtype out, or packed"
            )
        if state_dict is not None or getattr(self, "_hf_peft_config_loaded", False):
            given = "dtype" if dtype is not None else "packed" if packed else ""
            if given:
                raise UsageError(
                    f"save_pretrained: {given} is of the model's own weights, not of a state_dict or an adapter"
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
            odd = "push_to_hub" if push_to_hub else next(iter(kwargs))
            raise UsageError(
                f"save_pretrained: {odd} is not known for a model on packed weights; write it to a folder and upload that with huggingface_hub"
            )
        if is_main_process and packed:
            save_packed(self, save_directory, max_shard_size, variant, progress)
        elif is_main_process:
            save(self, save_directory, dtype, max_shard_size, variant, save_original_format, progress)

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's. PEFT looks for the embedding by the name that BERT has for it, else among parameters, of which packed weights are none: it is found by that name."""
        if target == BERT_EMBEDDING and not hasattr(self, target.partition(".")[0]):
            return self.get_input_embeddings()
        return super().get_submodule(target)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's: packed weights that are given are packed anew, as the floats they come in."""
        given = dict(state_dict)
        for target, origin in dict(self.all_tied_weights_keys or {}).items():
            if target in given and origin not in given:
                given[origin] = given[target]
        done = super().load_state_dict(given, strict, assign)
        if not strict:  # whose keys the caller reads
            done.missing_keys.extend(name for name in given if name not in state_dict)
        self._remake()
        return done

    def _remake(self) -> None:
        """After weights have changed: output layers are tied again, and what was made of weights is made anew."""
        for target, origin in dict(self.all_tied_weights_keys or {}).items():
            found: list[Any] = [self.get_submodule(name.rpartition(".")[0]) for name in (target, origin)]
            head, embedding = found
            tied = isinstance(head, Linear) and any(other is embedding for other in head.ties)
            if tied and isinstance(embedding, Embedding):
                head.parts = [embedding.packed]
        for module in reversed(list(self.modules())):  # children before their parents
            if isinstance(module, Operator):
                module.remake()
        layer.group_layers(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for module in self.modules():  # before one of them is changed
            if isinstance(module, Operator):
                module.cast_by(fn)
        done = super()._apply(fn, recurse)
        layer.group_layers(self)
        return done

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers': of what is packed the numbers that it stands for; a tied matrix counts once, none is trainable."""
        count: int = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        for module in self.modules():
            if isinstance(module, Operator) and not (isinstance(module, Embedding) and exclude_embeddings):
                tied = isinstance(module, Linear) and module.tied_to
                count += sum(
                    prod(floats.shape) for name, floats in module.floats().items() if not (tied and name == "weight")
                )
        return count

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes: of packed weights as they are packed, of parameters, and of buffers."""
        held = sum(size.held for size in sizes(self))
        return held + return_buffers * sum(buffer.nbytes for buffer in self.buffers())

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """As transformers'. Embedding and output layer become plain torch modules with the floats that they were packed from, in the type that the model computes in."""
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            self._plain_embeddings()
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _plain_embeddings(self) -> None:
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if isinstance(embedding, Embedding):
            self.set_input_embeddings(embedding.plain(None))
        if isinstance(head, Linear):
            new = head.plain(None)
            if head.tied_to and isinstance(tied := self.get_input_embeddings(), nn.Embedding):
                new.weight = tied.weight
            self.set_output_embeddings(new)


def _heir(old: type[nn.Module]) -> type[nn.Module]:
    if old not in _HEIRS:
        names = {name: getattr(old, name) for name in ("__module__", "__qualname__", "__doc__")}
        names |= {"made_of": old, "forward": _forward_of(old)}
        _HEIRS[old] = type(old.__name__, (Model, old), names)
    return _HEIRS[old]


def _forward_of(old: Any) -> Any:
    """That of the replaced class, after a look at what scripts have put on classes, and in training before one at what is trained."""

    @functools.wraps(old.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return old.forward(self, *args, **kwargs)
        class_patches.follow()
        handle = self.__dict__.get("ktx")
        if handle is not None and handle.adapters.known:
            handle.adapters.check(self)
        if self.training and torch.is_grad_enabled():
            training_notes.look(self, kwargs | dict(enumerate(args)))
        return old.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(old.forward)  # type: ignore[attr-defined]
    return forward


def _watch(model: nn.Module) -> None:
    for module in model.modules():
        class_patches.watch(module)


def _bare(old: type[nn.Module], files: Files | None) -> Any:
    """A model without anything in it, for one that is copied or read from a pickle; then all its weights are loaded first."""
    if files is not None:
        files.open()
    made = _heir(old)
    return made.__new__(made)


def become(model: nn.Module) -> None:
    """Makes a loaded model one of these. Its operators are evaluated as it is, which parametrizations that are put on them go by."""
    model.train(model.training)
    _watch(model)
    model.__class__ = _heir(type(model))
