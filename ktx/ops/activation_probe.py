"""Which activation a feed-forward module computes: found by asking it, because configurations name it in too many ways.

Between its projections a module is a function of numbers alone, so it is tried on a few and compared with what the kernels
have. A family that clamps or scales in its own way is refused here, before it answers nonsense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import reference

PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
GATE = torch.linspace(-40.0, 40.0, 257, dtype=torch.float32, device="cpu")  # beyond every limit in use
UP = GATE.flip(0) + 0.5
UNSUPPORTED = (  # attributes of experts modules: name, the value that the kernel has, what another value means
    ("has_post_expert_norm", False, "norms the output of each expert, which the experts kernel does not"),
)

KEEP = "a rule before this one keeps it, in plain torch and f32: match its name, replace: {class: default}, recursive: false"


class Activation(NamedTuple):
    """A kernel's activation: act(gate) * up, or with `swiglu_oai` gpt-oss's, which is clamped at `limit`."""

    act: str
    alpha: float = 0.0
    limit: float = 0.0


def gate_of_experts(experts: Any, where: str) -> Activation:
    """What a transformers experts module does between its projections; UsageError when no kernel does that."""
    odd = [what for name, usual, what in UNSUPPORTED if getattr(experts, name, usual) is not usual]
    if odd or not hasattr(experts, "_apply_gate"):
        wrong = odd[0] if odd else "does not keep the experts contract of transformers 5"
        raise UsageError(f"{where}: {type(experts).__name__} {wrong}; {KEEP}")
    if not is_gated(experts):
        return _known(lambda: [experts.act_fn(GATE)], experts, where, GATE)
    laid_out = (torch.cat([GATE, UP]), torch.stack([GATE, UP], -1).flatten())  # gpt-oss interleaves the two
    return _known(lambda: [experts._apply_gate(both[None])[0] for both in laid_out], experts, where)


def is_gated(experts: Any) -> bool:
    """Whether experts have a gate projection. Those without compute act(up(x)), which for relu2 is relu(up(x)) * up(x): a gate that is the other projection once more."""
    return bool(getattr(experts, "has_gate", True))


def is_interleaved(experts: Any, gate: Activation) -> bool:
    """Whether the module keeps gate and up in turns, row by row, and not one behind the other."""
    if not is_gated(experts):
        return False
    with torch.no_grad(), torch.device("cpu"):
        answer = experts._apply_gate(torch.stack([GATE, UP], -1).flatten()[None])[0].float()
    return bool(torch.allclose(reference.activate(GATE, UP, *gate), answer, rtol=1e-5, atol=1e-5))


def gate_of_mlp(mlp: Any, where: str) -> Activation:
    """The same of a module with gate_proj and up_proj, or gate_up_proj, and down_proj."""
    fed = {"gate_proj": _Answers(GATE), "up_proj": _Answers(UP), "gate_up_proj": _Answers(torch.cat([GATE, UP]))}
    fed["down_proj"] = nn.Identity()  # type: ignore[assignment]
    probe = probe_copy(mlp, modules={name: fed.get(name, child) for name, child in mlp._modules.items()})
    return _known(lambda: [probe(GATE[None, None])[0, 0]], mlp, where)


def as_usual(seen: torch.Tensor, gate: torch.Tensor, act: str, up: torch.Tensor | None = None) -> bool:
    """Whether an activation module has given, bit for bit, act(gate), or act(gate) * up where it multiplies too: nobody has changed it, by a hook for example, and a CPU kernel may compute with it."""
    if gate.requires_grad or gate.device.type != "cpu":
        return False
    return torch.equal(seen, reference.activate(gate, torch.ones((), dtype=gate.dtype) if up is None else up, act))


def probe_copy(old: nn.Module, **changed: dict[str, Any]) -> Any:
    """The module's twin with other `modules` or `parameters`, to be asked in its place: it is on the meta device, without numbers."""
    twin = nn.Module.__new__(type(old))
    nn.Module.__init__(twin)
    twin.__dict__.update(old.__dict__)
    twin.__dict__.update({f"_{what}": values for what, values in changed.items()})
    return twin


def refused(module: nn.Module, where: str, what: str, error: Exception) -> UsageError:
    """The error of a module that could not be asked."""
    first = str(error).partition("\n")[0]
    return UsageError(f"{where}: {type(module).__name__} does not tell {what} ({type(error).__name__}: {first})")


class _Answers(nn.Module):
    """A projection that gives the same numbers whatever it is asked."""

    def __init__(self, values: torch.Tensor):
        super().__init__()
        self.values = values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values[None, None]


def _known(ask: Callable[[], list[torch.Tensor]], module: nn.Module, where: str, up: torch.Tensor = UP) -> Activation:
    try:
        with torch.no_grad(), torch.device("cpu"):
            answers = [answer.float() for answer in ask()]
    except Exception as error:  # a family's own code, fed with numbers it may not expect
        raise refused(module, where, "its activation", error) from error
    for gate in _candidates(module):
        expected = reference.activate(GATE, up, *gate)
        alike = (answer for answer in answers if answer.shape == expected.shape)
        if any(torch.allclose(expected, answer, rtol=1e-5, atol=1e-5) for answer in alike):
            return gate
    names = " ".join((*PLAIN, "swiglu_oai"))
    what = "gate and up" if up is UP else "one projection"
    raise UsageError(f"{where}: what {type(module).__name__} does with {what} is in no kernel; ktx has {names}; {KEEP}")


def _candidates(module: Any) -> list[Activation]:
    alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", None))
    limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
    clamped = [Activation("swiglu_oai", float(alpha), float(limit))] if alpha is not None and limit is not None else []
    return [*map(Activation, PLAIN), *clamped]
