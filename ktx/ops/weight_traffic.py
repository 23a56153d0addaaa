"""Bytes of weights, module by module: what each holds and what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ktx.ops.base import Operator
from ktx.ops.embed import Embedding
from ktx.ops.experts import Experts
from ktx.ops.float_views import Dequantized
from ktx.ops.linear import Linear


@dataclass(frozen=True)
class ModuleBytes:
    """A module's own bytes, without its children's: `held`, none where another module holds the same, and `token`, what a single token makes kernels read."""

    path: str
    module: nn.Module
    held: int
    token: int


def sizes(model: nn.Module) -> list[ModuleBytes]:
    """Operators, and other modules with parameters of their own; plain parameters count as they are."""
    found, known = [], set[int]()
    for path, module in model.named_modules():
        own = plain_parameters(module)
        held, token = module.weight_bytes() if isinstance(module, Operator) else (0, 0)
        held = 0 if isinstance(module, Linear) and module.tied_to and not module.copies else held
        for parameter in own:
            held += 0 if id(parameter) in known else parameter.nbytes
            token += parameter.nbytes // (len(parameter) if isinstance(module, nn.Embedding) else 1)
            known.add(id(parameter))
        if own or isinstance(module, Operator):
            found.append(ModuleBytes(path, module, held, token))
    return found


def plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters that torch holds: packed weights, which it shows among them, are not."""
    return [parameter for parameter in module.parameters(recurse=False) if not isinstance(parameter, Dequantized)]


@dataclass(frozen=True)
class WeightTraffic:
    """Bytes that forwards read besides those of experts: each `always`, a `row` for each token, and the `head` where logits are made."""

    always: int = 0
    row: int = 0
    head: int = 0

    @classmethod
    def of(cls, model: Any) -> WeightTraffic:
        """A matrix counts once a forward, however many tokens share it."""
        head = model.get_output_embeddings()
        always = row = last = 0
        for size in sizes(model):
            if isinstance(size.module, Embedding | nn.Embedding):
                row += size.token
            elif size.module is head:
                last += size.token
            elif not isinstance(size.module, Experts):
                always += size.token
        return cls(always, row, last)

    def bytes(self, forwards: int, tokens: int, heads: int) -> int:
        """Of so many forwards with so many tokens, of which `heads` made logits."""
        return forwards * self.always + tokens * self.row + heads * self.head
