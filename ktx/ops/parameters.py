"""Packed weights where torch and PEFT look for parameters of a module, and parametrizations that others put on them.

A module that is asked for its own parameters names its packed weights among them, as read-only tensors (ktx.ops.float_views), though `model.parameters()` does not: so PEFT finds what
`target_parameters` and `modules_to_save` name. `torch.nn.utils.parametrize` takes them away, for as long as PEFT's forward lasts, and the operator computes with what is added.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ktx.devices import Device
from ktx.errors import UsageError
from ktx.hardware import format_bytes
from ktx.ops.base import Operator
from ktx.ops.change_counter import Changes
from ktx.ops.float_views import Dequantized, Floats

log = logging.getLogger("ktx.ops.parameters")
PARAMETRIZATIONS = "parametrizations"  # torch's name for the child
EXCHANGED = (
    "{}.{} is packed, and no parameter that could be taken out of its module (as torch.func.functional_call and torch.nn.utils.weight_norm do): write to it in"
    " `with ktx.edit(module) as weight:`, or put ktx.dequantize(module) in a linear layer's place; torch.nn.utils.parametrizations need neither"
)
OFFLOADED = (
    "{}.{} is packed and stays where it was loaded: accelerate can neither offload nor move it (cpu_offload, disk_offload, dispatch_model, AlignDevicesHook(offload=True));"
    " leave that out and say where modules are when the model is loaded: ktx.load(..., device=...)"
)
_said: set[tuple[str, str]] = set()


class Frozen(dict[str, Any]):
    """The parameters of an operator. UsageError for who wants to take packed weights, `names`, out of them."""

    names: frozenset[str] = frozenset()
    path: str = ""

    def __missing__(self, name: str) -> Any:
        raise _not_there(name, self.names, self.path)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise _not_there(name, self.names, self.path)
        super().__delitem__(name)


def _not_there(name: str, packed: frozenset[str], path: str) -> Exception:
    return UsageError(EXCHANGED.format(path, name)) if name in packed else KeyError(name)


class Owner(Protocol):
    """A module that has packed weights. `replaced` packs others."""

    path: str
    home: Device

    def replaced(self, name: str, values: torch.Tensor) -> Any: ...


class OfferedParameters(dict[str, Any]):
    """The buffers of an operator, `owner`, among which `names` of packed weights are found too. No copy, cast or list of buffers sees these.

    Values that are put there, as accelerate loads a checkpoint, are packed. UsageError for a weight that is to be elsewhere.
    """

    names: frozenset[str] = frozenset()
    owner: Owner

    def __contains__(self, name: object) -> bool:
        return name in self.names or super().__contains__(name)

    def __missing__(self, name: str) -> Any:
        raise _not_there(name, self.names, self.owner.path)

    def __delitem__(self, name: str) -> None:
        if name in self.names:
            self.names -= {name}
        else:
            super().__delitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.names:
            super().__setitem__(name, value)
        elif value is None or value.device != self.owner.home.torch:
            raise UsageError(OFFLOADED.format(self.owner.path, name))
        elif not isinstance(value, Dequantized):
            self.owner.replaced(name, value)


class Parametrizable(Operator):
    """An operator that names its packed weights among its own parameters, and on the CPU heeds what others put on them."""

    def offered(self) -> frozenset[str]:
        """The names of such weights."""
        return frozenset()

    def visible_parameters(self, name: str, floats: Floats) -> Dequantized:
        """A packed weight as a parameter."""
        return Dequantized(
            floats,
            self.dtype,
            f"{self.path}.{name}",
            self.placement.torch,
            lambda values: self.replaced(name, values),
            lambda: self.trained(name),
        )

    def replaced(self, name: str, values: torch.Tensor) -> Floats:
        """Packs other values for a weight, and says them."""
        self.take({name: values})
        return self.floats()[name]

    def trained(self, name: str) -> None:
        """Makes a packed weight a parameter that is trained."""
        raise UsageError(
            f"{self.path}.{name} is packed and is not trained itself: train an adapter of it (LoraConfig(target_parameters=[...])), or keep the module in floats by a rule"
        )

    def enliven(self) -> None:
        frozen = self.__dict__["_parameters"] = Frozen(self._parameters)
        frozen.names, frozen.path = self.offered(), self.path
        super().enliven()
        offered = OfferedParameters(self._buffers)
        offered.names, offered.owner = self.offered(), self
        self.__dict__["_buffers"] = offered

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's, behind its packed weights."""
        if isinstance(self._buffers, OfferedParameters):
            names = self._buffers.names  # who trains one of them makes other buffers
            for name, floats in self.floats().items():
                if name in names:
                    yield f"{prefix}.{name}" if prefix else name, self.visible_parameters(name, floats)  # type: ignore[misc]
        yield from nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)  # it may be torch's own now

    def __delattr__(self, name: str) -> None:
        """As torch's parametrize takes a weight away. UsageError on a GPU, where kernels do not heed what is put on it."""
        if self.placement.gpu and isinstance(self._buffers, OfferedParameters) and name in self._buffers.names:
            raise UsageError(
                f"{self.path}.{name} is on {self.placement}, where it cannot have an adapter of its own (target_parameters) or another parametrization;"
                " put the module on the CPU (device: cpu)"
            )
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; a weight whose parametrizations are taken away comes back so, because it is a parameter to who asks isinstance."""
        if isinstance(param, Dequantized) and isinstance(self._buffers, OfferedParameters) and name in self.offered():
            Changes.count += 1
            self._buffers.names |= {name}
        else:
            super().register_parameter(name, param)

    def parametrized(self, name: str) -> bool:
        """Whether others have put something on one of its weights."""
        own: Any = self._modules.get(PARAMETRIZATIONS, ())
        return name in own


Product = Callable[[torch.Tensor, int], torch.Tensor]


class ParametrizedProduct(NamedTuple):
    """What parametrizations make of a weight [n, k], or of stacked ones: products of rows [tokens, k] with it, [tokens, n], by number. `added`: to the products of the weight as it is packed."""

    product: Product
    added: bool

    @classmethod
    def of(cls, owner: Parametrizable, name: str, transposed: bool = False) -> ParametrizedProduct:
        """PEFT's low ranks and sums of them are added; of anything else the whole weight is computed."""
        parts = [_added(each, transposed) for each in owner.parametrizations[name]]
        known = [part for part in parts if part is not None]
        large = [each.delta_weight for each in owner.parametrizations[name] if hasattr(each, "delta_weight")]
        if len(known) == len(parts):
            if large:
                _say(
                    owner, name, "several adapters at once, or one that is not of low rank, are added as a whole", large
                )
            return cls(lambda rows, i: torch.stack([part(rows, i) for part in known]).sum(0), True)
        return cls(_dense(whole(owner, name), transposed), False)


def whole(owner: Parametrizable, name: str) -> torch.Tensor:
    """A parametrized weight, all of it."""
    values: torch.Tensor = getattr(owner, name)
    _say(owner, name, "a parametrization of it is computed as a whole", [values])
    return values


def _added(each: Any, transposed: bool) -> Product | None:
    """What one of PEFT's parametrizations adds to the products; None for any other."""
    if not type(each).__module__.startswith("peft."):
        return None
    if type(each).__name__ == "_LoraParameterProxy":
        return _dense(each.delta_weight, transposed)
    if type(each).__name__ != "_LoraFactorsProxy":
        return None
    left, right, scaling = _matrices(each.lhs), _matrices(each.rhs), each.scaling

    def product(rows: torch.Tensor, i: int) -> torch.Tensor:
        first, second = (left[i], right[i]) if transposed else (right[i].T, left[i].T)
        return (rows @ first.to(rows.dtype)) @ second.to(rows.dtype) * scaling

    return product


def _matrices(values: Any) -> tuple[torch.Tensor, ...]:
    """One by one, of stacked ones or of a single matrix."""
    return values.unbind(0) if values.dim() == 3 else (values,)  # type: ignore[no-any-return]


def _dense(values: Any, transposed: bool) -> Product:
    matrices = _matrices(values)
    return lambda rows, i: rows @ (matrices[i] if transposed else matrices[i].T).to(rows.dtype)


def _say(owner: Operator, name: str, what: str, tensors: list[torch.Tensor]) -> None:
    """One line, once for a kind of weight."""
    kind = type(owner).__name__.removeprefix("Parametrized"), name
    if kind not in _said:
        _said.add(kind)
        held = format_bytes(sum(values.nbytes for values in tensors))
        log.warning("%s.%s: %s, which is slow and takes %s in each forward", owner.path, name, what, held)
