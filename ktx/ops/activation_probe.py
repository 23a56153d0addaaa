"""Detects which activation a feed-forward module computes by running it, because configurations name it in many ways.

Between its projections a module is an elementwise function. It is evaluated on a grid of values and the result is
compared with the activations of the kernels. A family that clamps or scales in an unsupported way is rejected here,
before it produces wrong results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import reference

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
GATE = torch.linspace(-40.0, 40.0, 257, dtype=torch.float32, device="cpu")  # exceeds every clamping limit in use
UP = GATE.flip(0) + 0.5  # pairs each gate value with another up value
UNSUPPORTED = (  # attributes of experts modules: name, the value that the kernel supports, what another value means
    ("has_post_expert_norm", False, "normalizes the output of each expert, which the experts kernel does not support"),
)

KEEP_MODULE_HINT = (
    "add a rule before this one that keeps the module in plain torch and f32: match its name,"
    " replace: {class: default}, recursive: false"
)


class Activation(NamedTuple):
    """An activation of the kernels: act(gate) * up, or `swiglu_oai`, the one of gpt-oss, clamped at `limit`."""

    act: str
    alpha: float = 0.0
    limit: float = 0.0


def probe_experts(experts: Any, where: str) -> Activation:
    """Returns the activation that a transformers experts module computes between its projections.

    It is detected by running that step (`_apply_gate`) on GATE and UP, stacked in each layout that is in use.

    Args:
        experts: The experts module.
        where: Its module path, which starts error messages.

    Raises:
        UsageError: No kernel computes it, or the module does not follow the experts contract of transformers 5.
    """
    unsupported = [
        meaning for name, supported, meaning in UNSUPPORTED if getattr(experts, name, supported) is not supported
    ]
    if unsupported or not hasattr(experts, "_apply_gate"):
        reason = unsupported[0] if unsupported else "does not follow the experts contract of transformers 5"
        raise UsageError(f"{where}: {type(experts).__name__} {reason}; {KEEP_MODULE_HINT}")
    if not is_gated(experts):
        return _match_activation(lambda: [experts.act_fn(GATE)], experts, where, GATE)
    # The second layout, interleaved, is that of gpt-oss.
    layouts = (torch.cat([GATE, UP]), torch.stack([GATE, UP], -1).flatten())
    return _match_activation(lambda: [experts._apply_gate(both[None])[0] for both in layouts], experts, where)


def is_gated(experts: Any) -> bool:
    """Whether experts have a gate projection.

    Experts without one compute act(up(x)). For relu2 that is relu(up(x)) * up(x), so `up` serves as the gate too.
    """
    return bool(getattr(experts, "has_gate", True))


def is_interleaved(experts: Any, activation: Activation) -> bool:
    """Whether the module stores gate and up interleaved row by row, instead of all gate rows before all up rows."""
    if not is_gated(experts):
        return False
    with torch.no_grad(), torch.device("cpu"):
        output = experts._apply_gate(torch.stack([GATE, UP], -1).flatten()[None])[0].float()
    return bool(torch.allclose(reference.activate(GATE, UP, *activation), output, rtol=1e-5, atol=1e-5))


def probe_mlp(mlp: Any, where: str) -> Activation:
    """Returns the activation of a module with gate_proj and up_proj (or gate_up_proj) and down_proj.

    The module runs with stubs that return GATE and UP as the projections' outputs, and its result is compared with
    those of the kernels' activations.

    Args:
        mlp: The feed-forward module.
        where: Its module path, which starts error messages.

    Raises:
        UsageError: No kernel computes its activation.
    """
    stubs = {
        "gate_proj": _ConstantProjection(GATE),
        "up_proj": _ConstantProjection(UP),
        "gate_up_proj": _ConstantProjection(torch.cat([GATE, UP])),
    }
    stubs["down_proj"] = nn.Identity()  # type: ignore[assignment]
    probe = probe_copy(mlp, modules={name: stubs.get(name, child) for name, child in mlp._modules.items()})
    return _match_activation(lambda: [probe(GATE[None, None])[0, 0]], mlp, where)


def is_unmodified(output: torch.Tensor, gate: torch.Tensor, act: str, up: torch.Tensor | None = None) -> bool:
    """Whether the output of an activation module is bit for bit act(gate), or act(gate) * up if `up` is given.

    Then no hook, for example, has modified it, and a CPU kernel may compute the activation instead. Always False for
    tensors that require gradients or are not on the CPU.
    """
    if gate.requires_grad or gate.device.type != "cpu":
        return False
    return torch.equal(output, reference.activate(gate, torch.ones((), dtype=gate.dtype) if up is None else up, act))


def probe_copy(old: nn.Module, **changed: dict[str, Any]) -> Any:
    """Returns a shallow copy of a module that runs on test values, to see what it computes, for example its activation.

    The module itself cannot run: its parameters are on the meta device.

    Args:
        old: The module to copy.
        **changed: Replacements for its `modules`, `parameters` or `buffers` dictionaries.
    """
    copy = nn.Module.__new__(type(old))
    nn.Module.__init__(copy)
    copy.__dict__.update(old.__dict__)
    copy.__dict__.update({f"_{kind}": values for kind, values in changed.items()})
    return copy


def probe_error(module: nn.Module, where: str, what: str, error: Exception) -> UsageError:
    """Returns the error for a module whose code failed while it was probed for `what`."""
    first_line = str(error).partition("\n")[0]
    return UsageError(
        f"{where}: {type(module).__name__} cannot be probed for {what} ({type(error).__name__}: {first_line})"
    )


class _ConstantProjection(nn.Module):
    """A projection that returns the same values for every input."""

    def __init__(self, values: torch.Tensor):
        super().__init__()
        self.values = values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values[None, None]


def _match_activation(
    evaluate: Callable[[], list[torch.Tensor]], module: nn.Module, where: str, up: torch.Tensor = UP
) -> Activation:
    """Returns the kernel activation that matches one of the results of a probe.

    Args:
        evaluate: Runs the module on GATE and UP, in each memory layout that it may have; returns a result per layout.
        module: The probed module.
        where: Its module path.
        up: The values that the gate's activation is multiplied with; GATE for experts without a gate.

    Raises:
        UsageError: No activation matches, or the module's code fails.
    """
    try:
        with torch.no_grad(), torch.device("cpu"):
            outputs = [output.float() for output in evaluate()]
    except Exception as error:  # code of a model family, with inputs that it may not expect
        raise probe_error(module, where, "its activation", error) from error
    for activation in _list_candidates(module):
        expected = reference.activate(GATE, up, *activation)
        comparable = (output for output in outputs if output.shape == expected.shape)
        if any(torch.allclose(expected, output, rtol=1e-5, atol=1e-5) for output in comparable):
            return activation
    names = " ".join((*ACTIVATIONS, "swiglu_oai"))
    inputs = "gate and up" if up is UP else "one projection"
    raise UsageError(
        f"{where}: no kernel computes what {type(module).__name__} computes from {inputs}; ktx has {names};"
        f" {KEEP_MODULE_HINT}"
    )


def _list_candidates(module: Any) -> list[Activation]:
    """Returns the activations of the kernels; swiglu_oai only if the module has the attributes for its parameters."""
    alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", None))
    limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
    clamped = [Activation("swiglu_oai", float(alpha), float(limit))] if alpha is not None and limit is not None else []
    return [*map(Activation, ACTIVATIONS), *clamped]
