"""What a loaded model does otherwise than its transformers class: it is copied, pickled, counted and written with the weights that operators hold packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ktx.ops import layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ktx.reloading import Files
else:
    PreTrainedModel = object

_HEIRS: dict[type[nn.Module], type[nn.Module]] = {}


class Model(PreTrainedModel):
    """Before a transformers class in the bases of a loaded model's class, which has the name and module of that."""

    ktx: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        handle = self.__dict__.get("ktx")
        return _bare, (type(self).__bases__[1], getattr(handle, "files", None)), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        handle = self.__dict__.get("ktx")
        if handle is not None:
            self.__dict__["ktx"] = handle.of(self)
            if handle.files is not None:
                handle.files.close()
        layer.join(self)


def _heir(old: type[nn.Module]) -> type[nn.Module]:
    if old not in _HEIRS:
        names = {name: getattr(old, name) for name in ("__module__", "__qualname__", "__doc__")}
        _HEIRS[old] = type(old.__name__, (Model, old), names)
    return _HEIRS[old]


def _bare(old: type[nn.Module], files: Files | None) -> Any:
    """A model without anything in it, for one that is copied or read from a pickle; then all its weights are loaded first."""
    if files is not None:
        files.open()
    made = _heir(old)
    return made.__new__(made)


def become(model: nn.Module) -> None:
    """Makes a loaded model one of these."""
    model.__class__ = _heir(type(model))
