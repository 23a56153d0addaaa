"""Weight bytes per module: the bytes that it holds, and the bytes that a token reads."""

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
    """A module's own bytes, without its children's.

    Attributes:
        path: the module's path.
        module: the module.
        held_bytes: bytes in memory; 0 for weights that another module in the list holds.
        bytes_per_token: bytes that the kernels read for a single token.
    """

    path: str
    module: nn.Module
    held_bytes: int
    bytes_per_token: int


def module_bytes(model: nn.Module) -> list[ModuleBytes]:
    """Lists the bytes of operators and of other modules with parameters of their own.

    A weight that two modules share is held once, but each of them reads it. An embedding reads one row per token.
    """
    modules, counted = [], set[int]()
    for path, module in model.named_modules():
        parameters = plain_parameters(module)
        held_bytes, token_bytes = module.weight_bytes() if isinstance(module, Operator) else (0, 0)
        held_bytes = 0 if isinstance(module, Linear) and module.tied_to and not module.has_own_copy else held_bytes
        for parameter in parameters:
            held_bytes += 0 if id(parameter) in counted else parameter.nbytes
            token_bytes += parameter.nbytes // (len(parameter) if isinstance(module, nn.Embedding) else 1)
            counted.add(id(parameter))
        if parameters or isinstance(module, Operator):
            modules.append(ModuleBytes(path, module, held_bytes, token_bytes))
    return modules


def plain_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Returns a module's own torch parameters, without packed weights that the module lists among them."""
    return [parameter for parameter in module.parameters(recurse=False) if not isinstance(parameter, Dequantized)]


@dataclass(frozen=True)
class WeightTraffic:
    """Weight bytes that forwards read, without routed experts, for the memory bandwidth in metrics and benchmarks.

    Attributes:
        bytes_per_forward: the matrices that each forward reads once, whatever its number of tokens.
        bytes_per_token: an embedding row.
        bytes_per_logits: the output layer, which is read only by forwards that compute logits.
    """

    bytes_per_forward: int = 0
    bytes_per_token: int = 0
    bytes_per_logits: int = 0

    @classmethod
    def from_model(cls, model: Any) -> WeightTraffic:
        """Sums up the weight bytes of a model's modules by what they are read for.

        A matrix counts once per forward, because all tokens of the forward share one read.
        """
        output_layer = model.get_output_embeddings()
        per_forward = per_token = per_logits = 0
        for size in module_bytes(model):
            if isinstance(size.module, Embedding | nn.Embedding):
                per_token += size.bytes_per_token
            elif size.module is output_layer:
                per_logits += size.bytes_per_token
            elif not isinstance(size.module, Experts):  # how many experts a forward reads depends on its tokens
                per_forward += size.bytes_per_token
        return cls(per_forward, per_token, per_logits)

    def bytes(self, forwards: int, tokens: int, logits_forwards: int) -> int:
        """Returns the bytes read by `forwards` forwards of `tokens` tokens, `logits_forwards` of them with logits."""
        return (
            forwards * self.bytes_per_forward + tokens * self.bytes_per_token + logits_forwards * self.bytes_per_logits
        )
