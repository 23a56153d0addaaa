"""Experts of a model that transformers has loaded, computed by the CPU's kernels: what `experts_implementation="ktx"` calls.

The module keeps its parameters; a packed copy of them is made at the first forward and anew when they, or the module's settings, have changed. Where a
parameter is trained, backward is transformers' own on the parameters themselves.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from ktx.errors import UsageError, did_you_mean
from ktx.integrations.experts_interface import NAME
from ktx.kernels import cpu
from ktx.ops.activation_probe import KEEP
from ktx.ops.base import COMPUTED, Context, as_weights
from ktx.ops.change_counter import Live, edits
from ktx.ops.experts import Experts
from ktx.ops.guard import State
from ktx.quant.quantize import quantize
from ktx.quant.types import QTYPES
from ktx.utils.torch_defaults import torch_defaults
from ktx.weights.base import QuantizedTensor

HELD = "_ktx_experts"  # the attribute of an experts module that holds its packed copy
OTHERS = "take another experts_implementation (eager, grouped_mm)"


def experts(dtype: str | None = None) -> str:
    """A name for transformers' `experts_implementation`, by which experts are packed as `dtype` (Q8_0, Q4_K, BF16, ...; None: as the parameters' own type). UsageError for an unknown one."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if dtype is None:
        return NAME
    if dtype not in QTYPES:
        raise UsageError(f"experts: {dtype!r} is no type of weights{did_you_mean(dtype, QTYPES)}")
    functions: Any = ALL_EXPERTS_FUNCTIONS
    functions.register(f"{NAME}:{dtype}", functools.partial(forward, dtype))
    return f"{NAME}:{dtype}"


class PackedExperts:
    """A module's packed copy, and what the module was when it was made. Copies and pickles of the module have an empty one."""

    operator: Experts | None = None
    dtype: str | None = None

    def __init__(self, module: Any = None):
        self.module, self.lock = module, threading.Lock()

    def __reduce__(self) -> Any:
        return _empty, (self.dtype,)

    @classmethod
    def of(cls, module: Any) -> PackedExperts:
        """The one that a module has; a shallow copy of the module has another."""
        held: PackedExperts | None = module.__dict__.get(HELD)
        if held is None or held.module is not module:
            held = module.__dict__[HELD] = cls(module)
        return held

    def current(self, dtype: str | None) -> Experts:
        """The module's parameters as a type, packed where they are not. UsageError for a module that no kernel computes."""
        made = self.operator
        if made is not None and self._stands(dtype):
            return made
        with self.lock:
            if self.operator is None or not self._stands(dtype):
                self._make(self.module, dtype)
            assert self.operator is not None
            return self.operator

    def _stands(self, dtype: str | None) -> bool:
        """Whether the copy is of this type and the module is what it was."""
        return (
            self.dtype == dtype and self.state.same() and all(edits(tensor) == count for tensor, count in self.counted)
        )

    @torch_defaults()
    def _make(self, module: Any, dtype: str | None) -> None:
        self.operator, where = None, type(module).__name__
        try:
            made = Experts.from_hf(module, Context(where, module.config, torch.device("cpu"), torch.float32))
        except UsageError as error:  # which has the remedy of rules
            raise UsageError(str(error).replace(KEEP, OTHERS)) from error
        given = _parameters(module, made)
        made.pack(
            {name: tensor.detach() for name, tensor in given.items()},
            lambda values: _packed(values, dtype, where),
        )
        made.ready()
        made.is_ready = True
        for tensor in given.values():  # what is written to their data counts too
            tensor.__class__ = Live
        self.dtype, self.names = dtype, list(given)
        self.state, self.counted = State(module), [(tensor, edits(tensor)) for tensor in given.values()]
        self.operator = made


def _empty(dtype: str | None) -> PackedExperts:
    """Of a pickle, whose reader may not have asked for the name that the model's configuration has."""
    experts(dtype)
    return PackedExperts()


def _parameters(module: nn.Module, made: Experts) -> dict[str, torch.Tensor]:
    """By name, those that the operator packs."""
    found: dict[str, torch.Tensor] = {}
    for name in made.stacked():
        for own in (name, f"{name}_bias") if made.has_bias else (name,):
            tensor = module._parameters.get(own)
            at = f"{made.path}.{own}"
            if tensor is None:
                raise UsageError(
                    f"{at} is no parameter of its module (an adapter or a parametrization computes it?); {OTHERS}"
                )
            if type(tensor) not in (nn.Parameter, Live):
                raise UsageError(f"{at} is a {type(tensor).__name__}, ktx packs plain parameters; {OTHERS}")
            if tensor.device.type != "cpu":
                raise UsageError(f"{at} is on {tensor.device}, ktx computes experts on the CPU; {OTHERS}")
            if tensor.dtype not in COMPUTED:
                raise UsageError(f"{at} is of {tensor.dtype}, ktx packs {', '.join(map(str, COMPUTED))}; {OTHERS}")
            found[own] = tensor
    return found


def _packed(values: torch.Tensor, dtype: str | None, where: str) -> cpu.Packed:
    """Matrices [experts, n, k] as a type."""
    if dtype is None:
        return cpu.pack_experts(as_weights(values))
    qtype = QTYPES[dtype]
    if values.shape[-1] % qtype.block:
        raise UsageError(
            f"{where}: rows of {values.shape[-1]} weights are no whole blocks of {qtype.block}, which {dtype} has; take another type"
        )
    rows = torch.stack([quantize(matrix.float(), qtype) for matrix in values])
    return cpu.pack_experts(QuantizedTensor(rows, qtype, tuple(values.shape)))


@torch.compiler.disable
def forward(
    dtype: str | None,
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """By transformers' contract for experts: (hidden [T, D], ids [T, K], weights [T, K]) -> [T, D]. A choice of no expert, as experts in parallel processes have, adds nothing."""
    if torch.compiler.is_exporting():
        raise UsageError(f"{type(module).__name__}: torch.export has no form of what ktx packs; {OTHERS}")
    held = PackedExperts.of(module)
    operator = held.current(dtype)
    if hidden_states.dtype not in COMPUTED or hidden_states.device.type != "cpu":
        raise UsageError(
            f"{type(module).__name__}: hidden states are {hidden_states.dtype} on {hidden_states.device}, ktx computes"
            f" {', '.join(map(str, COMPUTED))} on the CPU; {OTHERS}"
        )
    parameters = [module._parameters[name] for name in held.names]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        made: torch.Tensor = Trained.apply(  # type: ignore[no-untyped-call]
            operator, module, hidden_states, top_k_index, top_k_weights, *parameters
        )
        return made
    out: torch.Tensor = operator(hidden_states, top_k_index, top_k_weights)
    return out


class Trained(torch.autograd.Function):
    """The packed copy forward, and backward transformers' own computation, for hidden states, choices' weights and parameters."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, operator: Experts, module: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.module = module
        ctx.save_for_backward(*inputs)
        out: torch.Tensor = operator(*inputs[:3])
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")  # as autocast was in forward
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        hidden, ids, weights, *parameters = ctx.saved_tensors
        usual: Callable[..., torch.Tensor] = inspect.unwrap(type(ctx.module).forward)
        with torch.enable_grad():
            given = [hidden.detach().requires_grad_(), weights.detach().requires_grad_()]
            out = usual(ctx.module, given[0], ids, given[1])
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        made = iter(torch.autograd.grad(out, [*given, *trained], grad.to(out.dtype), allow_unused=True))
        first = [next(made), None, next(made)]
        return None, None, *first, *(next(made) if parameter.requires_grad else None for parameter in parameters)
