"""Makes packed weights visible as parameters to torch and PEFT, and applies parametrizations registered on them.

A module's own `named_parameters()` lists its packed weights as read-only tensors (ktx.ops.float_views), although
`model.parameters()` does not; so PEFT finds the weights in `target_parameters` and `modules_to_save`.
`torch.nn.utils.parametrize` removes them for the duration of PEFT's forward, and the operator applies the
parametrizations.
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
from ktx.ops.change_counter import ChangeCounter
from ktx.ops.float_views import Dequantized, Floats

log = logging.getLogger("ktx.ops.parameters")
PARAMETRIZATIONS = "parametrizations"  # torch's name for the child
NOT_REMOVABLE = (
    "{}.{} is packed and cannot be removed from its module as a parameter (as torch.func.functional_call and"
    " torch.nn.utils.weight_norm do): write to it in `with ktx.edit(module) as weight:`, or replace a linear layer with"
    " ktx.dequantize(module); torch.nn.utils.parametrizations need neither"
)
NOT_MOVABLE = (
    "{}.{} is packed and stays where it was loaded: accelerate can neither offload nor move it (cpu_offload,"
    " disk_offload, dispatch_model, AlignDevicesHook(offload=True)); omit that and set the modules' devices when the"
    " model is loaded: ktx.load(..., device=...)"
)
_logged: set[tuple[str, str]] = set()  # (kind of operator, weight) pairs that `_warn_once` has logged


class FrozenParameters(dict[str, Any]):
    """The real parameters of an operator; raises UsageError if a packed weight of `names` is looked up or removed here.

    torch.func.functional_call and weight_norm do that; a KeyError would not tell the user what to do instead.
    """

    names: frozenset[str] = frozenset()
    path: str = ""

    def __missing__(self, name: str) -> Any:
        raise _missing_error(name, self.names, self.path)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise _missing_error(name, self.names, self.path)
        super().__delitem__(name)


def _missing_error(name: str, packed: frozenset[str], path: str) -> Exception:
    """Returns the error of a look-up that found no `name`: UsageError for a packed weight, else KeyError."""
    return UsageError(NOT_REMOVABLE.format(path, name)) if name in packed else KeyError(name)


class Owner(Protocol):
    """A module that has packed weights."""

    path: str
    placement: Device

    def repacked(self, name: str, values: torch.Tensor) -> Any:
        """Packs other values for a weight."""
        ...


class VisibleParameters(dict[str, Any]):
    """The buffers of an operator, in which `in` also finds the `names` of packed weights; iteration does not list them.

    So copies, casts and lists of buffers skip them. Values assigned to a name are packed (accelerate loads checkpoints
    this way); UsageError for values on another device.
    """

    names: frozenset[str] = frozenset()
    owner: Owner

    def __contains__(self, name: object) -> bool:
        return name in self.names or super().__contains__(name)

    def __missing__(self, name: str) -> Any:
        raise _missing_error(name, self.names, self.owner.path)

    def __delitem__(self, name: str) -> None:
        if name in self.names:
            self.names -= {name}
        else:
            super().__delitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Packs values assigned to a packed weight; another view of it (Dequantized) changes nothing."""
        if name not in self.names:
            super().__setitem__(name, value)
        elif value is None or value.device != self.owner.placement.torch:
            raise UsageError(NOT_MOVABLE.format(self.owner.path, name))
        elif not isinstance(value, Dequantized):
            self.owner.repacked(name, value)


class Parametrizable(Operator):
    """An operator that lists its packed weights among its own parameters, and on the CPU applies parametrizations."""

    def visible_names(self) -> frozenset[str]:
        """Returns the names of the packed weights that are visible as parameters."""
        return frozenset()

    def visible_parameter(self, name: str, floats: Floats) -> Dequantized:
        """Returns the packed weight `name` as the parameter that PEFT, accelerate and scripts expect under that name.

        Reads dequantize it, in-place writes raise UsageError, and values written to all of its `data` are packed.
        """
        return Dequantized(
            floats,
            self.dtype,
            f"{self.path}.{name}",
            self.placement.torch,
            on_write=lambda values: self.repacked(name, values),
            on_train=lambda: self.trained(name),
        )

    def repacked(self, name: str, values: torch.Tensor) -> Floats:
        """Packs other values for a weight and returns the packed values as floats."""
        self.take({name: values})
        return self.floats()[name]

    def trained(self, name: str) -> None:
        """Turns a packed weight into a trainable parameter. UsageError: this operator cannot."""
        raise UsageError(
            f"{self.path}.{name} is packed and cannot be trained itself: train an adapter of it"
            " (LoraConfig(target_parameters=[...])), or keep the module in floats with a rule"
        )

    def use_live_parameters(self) -> None:
        """Replaces the dicts of parameters and buffers, so that packed weights are found under their names."""
        frozen = self.__dict__["_parameters"] = FrozenParameters(self._parameters)
        frozen.names, frozen.path = self.visible_names(), self.path
        super().use_live_parameters()
        visible = VisibleParameters(self._buffers)
        visible.names, visible.owner = self.visible_names(), self
        self.__dict__["_buffers"] = visible

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the packed weights first, then torch's parameters.

        `nn.Module.parameters()` of a parent does not call this method, so optimizers do not get the packed weights.
        """
        if isinstance(self._buffers, VisibleParameters):
            names = self._buffers.names  # read once: training one of them replaces the buffers
            for name, floats in self.floats().items():
                if name in names:
                    yield f"{prefix}.{name}" if prefix else name, self.visible_parameter(name, floats)  # type: ignore[misc]
        # Not super(): the caller may have turned the module into a torch module.
        yield from nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)

    def __delattr__(self, name: str) -> None:
        """Called by torch's parametrize to remove a weight. UsageError on a GPU: kernels ignore parametrizations."""
        if self.placement.gpu and isinstance(self._buffers, VisibleParameters) and name in self._buffers.names:
            raise UsageError(
                f"{self.path}.{name} is on {self.placement}, where it cannot have an adapter of its own"
                " (target_parameters) or another parametrization; place the module on the CPU (device: cpu)"
            )
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Overrides torch's, which would store the read-only view of a packed weight as a real parameter.

        torch calls it with that view when the last parametrization of a packed weight is removed; then the weight only
        becomes visible again under its name. Any other parameter is registered as in torch.
        """
        if (
            isinstance(param, Dequantized)
            and isinstance(self._buffers, VisibleParameters)
            and name in self.visible_names()
        ):
            ChangeCounter.count += 1
            self._buffers.names |= {name}
        else:
            super().register_parameter(name, param)

    def has_parametrization(self, name: str) -> bool:
        """Whether a weight has parametrizations."""
        parametrizations: Any = self._modules.get(PARAMETRIZATIONS, ())
        return name in parametrizations


Product = Callable[[torch.Tensor, int], torch.Tensor]  # (rows [tokens, k], index of the matrix) -> [tokens, n]


class ParametrizedProduct(NamedTuple):
    """Products with a parametrized weight [n, k], or with stacked ones [matrices, n, k].

    Attributes:
        product: computes rows [tokens, k] -> [tokens, n] for a matrix.
        is_added: whether the result is added to the product with the packed weight; else it replaces that product.
    """

    product: Product
    is_added: bool

    @classmethod
    def of(cls, owner: Parametrizable, name: str, transposed: bool = False) -> ParametrizedProduct:
        """Builds the products of a parametrized weight.

        If all parametrizations are PEFT's, their updates are added to the packed product (`is_added`); otherwise the
        full weight is computed in each forward and replaces it. A warning names what is computed in full.

        Args:
            owner: the operator.
            name: the weight.
            transposed: whether its matrices are [k, n].
        """
        products = [
            _find_added_product(parametrization, transposed) for parametrization in owner.parametrizations[name]
        ]
        added_products = [product for product in products if product is not None]
        full_deltas = [
            parametrization.delta_weight
            for parametrization in owner.parametrizations[name]
            if hasattr(parametrization, "delta_weight")
        ]
        if len(added_products) == len(products):
            if full_deltas:
                _warn_once(
                    owner,
                    name,
                    "several adapters at once, or one that is not low-rank, are added as a full matrix",
                    full_deltas,
                )
            return cls(lambda rows, i: torch.stack([product(rows, i) for product in added_products]).sum(0), True)
        return cls(_dense_product(full_weight(owner, name), transposed), False)


def full_weight(owner: Parametrizable, name: str) -> torch.Tensor:
    """Returns a parametrized weight, computed in full."""
    values: torch.Tensor = getattr(owner, name)
    _warn_once(owner, name, "a parametrization of it is computed as a full matrix", [values])
    return values


def _find_added_product(parametrization: Any, transposed: bool) -> Product | None:
    """Returns the product that one of PEFT's parametrizations adds to the packed one; None for any other.

    Recognizes PEFT's two proxies by name: a low-rank update is computed as two thin products, without its full
    matrix; a proxy of the whole update, as a product with that matrix.
    """
    if not type(parametrization).__module__.startswith("peft."):
        return None
    if type(parametrization).__name__ == "_LoraParameterProxy":
        return _dense_product(parametrization.delta_weight, transposed)
    if type(parametrization).__name__ != "_LoraFactorsProxy":
        return None
    lhs, rhs, scaling = (
        _split_matrices(parametrization.lhs),
        _split_matrices(parametrization.rhs),
        parametrization.scaling,
    )

    def product(rows: torch.Tensor, i: int) -> torch.Tensor:
        first, second = (lhs[i], rhs[i]) if transposed else (rhs[i].T, lhs[i].T)
        return (rows @ first.to(rows.dtype)) @ second.to(rows.dtype) * scaling

    return product


def _split_matrices(values: Any) -> tuple[torch.Tensor, ...]:
    """Returns the matrices of a stack, or a single matrix."""
    return values.unbind(0) if values.dim() == 3 else (values,)  # type: ignore[no-any-return]


def _dense_product(values: Any, transposed: bool) -> Product:
    """Returns the product with full matrices."""
    matrices = _split_matrices(values)
    return lambda rows, i: rows @ (matrices[i] if transposed else matrices[i].T).to(rows.dtype)


def _warn_once(owner: Operator, name: str, reason: str, tensors: list[torch.Tensor]) -> None:
    """Logs a warning once per operator class and weight name, because each layer would repeat it.

    Args:
        owner: the operator with the weight.
        name: the weight.
        reason: what is slow.
        tensors: the tensors that each forward computes in full, for their size.
    """
    key = type(owner).__name__.removeprefix("Parametrized"), name
    if key not in _logged:
        _logged.add(key)
        size = format_bytes(sum(values.nbytes for values in tensors))
        log.warning("%s.%s: %s, which is slow and takes %s in each forward", owner.path, name, reason, size)
