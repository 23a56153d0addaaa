"""Computes the experts of a model loaded by transformers with ktx's CPU kernels: `experts_implementation="ktx"`.

The module keeps its parameters. The first forward packs a copy of them, and a later forward packs them again if they or
the module's settings have changed. If a parameter requires a gradient, backward is transformers' computation on the
parameters themselves.
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
from ktx.integrations.names import NAME
from ktx.kernels import cpu
from ktx.ops.activation_probe import KEEP_MODULE_HINT
from ktx.ops.base import COMPUTE_DTYPES, Context, as_weights
from ktx.ops.change_counter import CountedParameter, edits
from ktx.ops.experts import Experts
from ktx.ops.guard import ModuleState
from ktx.quant.types import QTYPES
from ktx.utils.torch_defaults import torch_defaults
from ktx.weights.base import QuantizedTensor

PACKED_ATTRIBUTE = "_ktx_experts"  # the attribute of an experts module that holds its packed copy
USE_OTHER = "use another experts_implementation (eager, grouped_mm)"


def experts(dtype: str | None = None) -> str:
    """Returns a name for transformers' `experts_implementation` and registers it.

    Args:
        dtype: the weight type that experts are packed as (Q8_0, Q4_K, BF16, ...); None: the parameters' own type.

    Raises:
        UsageError: the weight type is unknown.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if dtype is None:
        return NAME
    if dtype not in QTYPES:
        raise UsageError(f"experts: {dtype!r} is not a weight type{did_you_mean(dtype, QTYPES)}")
    functions: Any = ALL_EXPERTS_FUNCTIONS
    functions.register(f"{NAME}:{dtype}", functools.partial(forward, dtype))
    return f"{NAME}:{dtype}"


class PackedExperts:
    """A module's packed copy, and the module's state at packing time.

    Copies and pickles of the module get an empty one.
    """

    operator: Experts | None = None
    dtype: str | None = None

    def __init__(self, module: Any = None):
        self.module, self.lock = module, threading.Lock()

    def __reduce__(self) -> Any:
        return _unpickle, (self.dtype,)

    @classmethod
    def of(cls, module: Any) -> PackedExperts:
        """Returns the instance of a module, creating it if needed; a shallow copy of the module gets its own."""
        packed_experts: PackedExperts | None = module.__dict__.get(PACKED_ATTRIBUTE)
        if packed_experts is None or packed_experts.module is not module:
            packed_experts = module.__dict__[PACKED_ATTRIBUTE] = cls(module)
        return packed_experts

    def get_up_to_date(self, dtype: str | None) -> Experts:
        """Returns the operator with the module's parameters packed as `dtype`, packing them if they have changed.

        Locked, so that only one of several threads packs.

        Raises:
            UsageError: no kernel supports the module.
        """
        operator = self.operator
        if operator is not None and self._is_current(dtype):
            return operator
        with self.lock:
            if self.operator is None or not self._is_current(dtype):
                self._rebuild(self.module, dtype)
            assert self.operator is not None
            return self.operator

    def _is_current(self, dtype: str | None) -> bool:
        """Whether the copy has this weight type and the module is unchanged since it was packed."""
        return (
            self.dtype == dtype
            and self.state.unchanged()
            and all(edits(tensor) == count for tensor, count in self.counted)
        )

    @torch_defaults()
    def _rebuild(self, module: Any, dtype: str | None) -> None:
        """Packs the module's parameters anew and records the state that `_is_current` compares with.

        `operator` is None until everything is packed, so an error leaves no outdated copy behind.
        """
        self.operator, class_name = None, type(module).__name__
        try:
            operator = Experts.from_hf(module, Context(class_name, module.config, torch.device("cpu"), torch.float32))
        except UsageError as error:  # its remedy is a rule, which transformers' models do not have
            raise UsageError(str(error).replace(KEEP_MODULE_HINT, USE_OTHER)) from error
        parameters = _collect_parameters(module, operator)
        operator.pack(
            {name: tensor.detach() for name, tensor in parameters.items()},
            lambda values: _pack(values, dtype, class_name),
        )
        operator.ready()
        operator.is_ready = True
        for tensor in parameters.values():  # so that writes to their `data` are counted too
            tensor.__class__ = CountedParameter
        self.dtype, self.names = dtype, list(parameters)
        self.state, self.counted = ModuleState(module), [(tensor, edits(tensor)) for tensor in parameters.values()]
        self.operator = operator


def _unpickle(dtype: str | None) -> PackedExperts:
    """Creates the instance of a pickle, and registers the name in the model's configuration for the reading process."""
    experts(dtype)
    return PackedExperts()


def _collect_parameters(module: nn.Module, operator: Experts) -> dict[str, torch.Tensor]:
    """Returns the parameters that the operator packs, by name; UsageError for one that it cannot pack."""
    parameters: dict[str, torch.Tensor] = {}
    for name in operator.stacked_parameters():
        for full_name in (name, f"{name}_bias") if operator.has_bias else (name,):
            tensor = module._parameters.get(full_name)
            path = f"{operator.path}.{full_name}"
            if tensor is None:
                raise UsageError(
                    f"{path} is not a parameter of its module (does an adapter or a parametrization compute it?);"
                    f" {USE_OTHER}"
                )
            if type(tensor) not in (nn.Parameter, CountedParameter):
                raise UsageError(f"{path} is a {type(tensor).__name__}, ktx packs plain parameters; {USE_OTHER}")
            if tensor.device.type != "cpu":
                raise UsageError(f"{path} is on {tensor.device}, ktx computes experts on the CPU; {USE_OTHER}")
            if tensor.dtype not in COMPUTE_DTYPES:
                raise UsageError(
                    f"{path} has dtype {tensor.dtype}, ktx packs {', '.join(map(str, COMPUTE_DTYPES))}; {USE_OTHER}"
                )
            parameters[full_name] = tensor
    return parameters


def _pack(values: torch.Tensor, dtype: str | None, class_name: str) -> cpu.Packed:
    """Packs matrices [experts, n, k] as the weight type `dtype`, or as their own for None.

    UsageError if a row is not a whole number of the type's blocks; `class_name` is for its message.
    """
    if dtype is None:
        return cpu.pack_experts(as_weights(values))
    qtype = QTYPES[dtype]
    if values.shape[-1] % qtype.block:
        raise UsageError(
            f"{class_name}: rows of {values.shape[-1]} weights are not whole blocks of {qtype.block}, which {dtype}"
            " requires; use another weight type"
        )
    rows = torch.stack([qtype.quantize(matrix.float()) for matrix in values])
    return cpu.pack_experts(QuantizedTensor(rows, qtype, tuple(values.shape)))


@torch.compiler.disable
def forward(
    dtype: str | None,
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Computes experts by transformers' contract: (hidden [T, D], ids [T, K], weights [T, K]) -> [T, D].

    transformers calls this function instead of the module's forward. An id outside the module's experts, as in expert
    parallelism, adds nothing.

    Args:
        dtype: the weight type to pack as; None: the parameters' own type.
        module: transformers' experts module.
        hidden_states: [T, D], on the CPU.
        top_k_index: expert ids [T, K].
        top_k_weights: routing weights [T, K].

    Raises:
        UsageError: ktx cannot compute the module or the tensors.
    """
    if torch.compiler.is_exporting():
        raise UsageError(f"{type(module).__name__}: torch.export cannot export experts packed by ktx; {USE_OTHER}")
    packed_experts = PackedExperts.of(module)
    operator = packed_experts.get_up_to_date(dtype)
    if hidden_states.dtype not in COMPUTE_DTYPES or hidden_states.device.type != "cpu":
        raise UsageError(
            f"{type(module).__name__}: hidden states are {hidden_states.dtype} on {hidden_states.device}, ktx supports"
            f" {', '.join(map(str, COMPUTE_DTYPES))} on the CPU; {USE_OTHER}"
        )
    parameters = [module._parameters[name] for name in packed_experts.names]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        recorded: torch.Tensor = ExpertsFunction.apply(  # type: ignore[no-untyped-call]
            operator, module, hidden_states, top_k_index, top_k_weights, *parameters
        )
        return recorded
    out: torch.Tensor = operator(hidden_states, top_k_index, top_k_weights)
    return out


class ExpertsFunction(torch.autograd.Function):
    """Forward with the packed copy; backward through transformers' computation.

    Gradients are those of hidden states, routing weights and parameters.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, operator: Experts, module: Any, *inputs: torch.Tensor) -> torch.Tensor:
        """Computes with the packed experts and saves the inputs for backward."""
        ctx.module = module
        ctx.save_for_backward(*inputs)
        out: torch.Tensor = operator(*inputs[:3])
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")  # with the autocast state of the forward
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Recomputes the forward with transformers' code on the parameters, as packed weights have no gradients.

        The first two arguments (operator and module) and the expert ids have none.
        """
        hidden, ids, weights, *parameters = ctx.saved_tensors
        original_forward: Callable[..., torch.Tensor] = inspect.unwrap(type(ctx.module).forward)
        with torch.enable_grad():
            inputs = [hidden.detach().requires_grad_(), weights.detach().requires_grad_()]
            out = original_forward(ctx.module, inputs[0], ids, inputs[1])
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        grads = iter(torch.autograd.grad(out, [*inputs, *trained], grad.to(out.dtype), allow_unused=True))
        input_grads = [next(grads), None, next(grads)]
        return None, None, *input_grads, *(next(grads) if parameter.requires_grad else None for parameter in parameters)
