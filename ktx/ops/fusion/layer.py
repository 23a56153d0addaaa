"""Decoder layers in few kernel calls: norm, attention and sum, then norm, experts and sum; and several layers at once."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ktx.kernels.fused_steps import run
from ktx.kernels.gradients import recorded
from ktx.ops import class_patches, contract
from ktx.ops.attention import Attention
from ktx.ops.base import Context, Operator, adopt, known_class, unpack
from ktx.ops.fusion.fused import MAX_FUSED_TOKENS, KVTarget, PreNorm, kv_target
from ktx.ops.guard import Changes, Guard, current
from ktx.ops.mla import MLA
from ktx.ops.mlp import MLP
from ktx.ops.moe import MoE
from ktx.ops.norm import RMSNorm

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
PRE_NORM_LAYERS = (  # layers that are: x = x + attention(norm(x)), then x = x + mlp(norm(x))
    "DeepseekV2DecoderLayer",
    "DeepseekV3DecoderLayer",
    "Dots1DecoderLayer",
    "Ernie4_5_MoeDecoderLayer",
    "Glm4MoeDecoderLayer",
    "Glm4MoeLiteDecoderLayer",
    "LlamaDecoderLayer",
    "MiniMaxM2DecoderLayer",
    "MistralDecoderLayer",
    "MixtralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2MoeDecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
)
AT_ONCE, TOKEN_LAYERS = (
    8,
    64,
)  # layers of a call, and tokens times layers up to which there may be more: who wants to stop a forward waits for a call's end
MISSES, REST = 3, 100  # calls in a row whose results were not asked for, and how many then compute layers one by one


class Layer(Operator):
    """Its children stay modules of their own and are called one by one whenever a block of theirs cannot do it, or somebody listens to one."""

    remade = ("block", "stretch")
    block: Block | None
    stretch: FusedLayerGroup | None  # of which it is the first layer

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Layer:
        known_class(old, PRE_NORM_LAYERS, ctx, "it is not known whether {} adds up as others do")
        contract.layer(old, ctx.path)
        new: Layer = adopt(cls, old, ctx)
        new.block, new.stretch = None, None
        return new

    def ready(self) -> None:
        self.block = Block.of(self)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given, cache = self.call.split((hidden_states, *args), kwargs)
        if (
            torch.compiler.is_compiling()
        ):  # a graph holds the kernels that children call; what a tensor carries is not in it
            return super().forward(**self.call.joined(given, cache))
        asked = LayerInputs(given.get("attention_mask"), given.get("position_embeddings"), cache)
        ahead = hidden_states.__dict__.get("ktx_ahead")
        if ahead is not None and ahead.layer is self and ahead.take_if_valid(hidden_states, asked):
            return ahead.out
        if (block := current(self)) is not None:
            done = None if self.stretch is None else self.stretch(hidden_states, asked)
            done = block(hidden_states, asked) if done is None else done
            if done is not None:
                return done
        return super().forward(**self.call.joined(given, cache))


class Block:
    """A layer as two calls: its attention with the norm before it, and what follows with its norm."""

    def __init__(self, owner: Layer, norms: list[RMSNorm]):
        self.owner = owner
        self.guard = Guard(
            [owner],
            [child for name in PARTS if (child := owner._modules[name]) is not None],
            [norm.copied() for norm in norms],
        )
        self.before: list[PreNorm] = [(norm.in_f32, norm.epsilon, norm.plus_one) for norm in norms]

    @classmethod
    def of(cls, owner: Layer) -> Block | None:
        """None where a norm or the attention is none of ours."""
        children: dict[str, Any] = owner._modules
        norms: list[Any] = [children.get(PARTS[0]), children.get(PARTS[2])]
        if not all(map(RMSNorm.is_cpu_norm, norms)) or not isinstance(children.get("self_attn"), Attention | MLA):
            return None
        return None if children.get("mlp") is None else cls(owner, norms)

    def parts(self) -> tuple[Any, Any]:
        """The blocks of attention and feed-forward as they are now; None where there is none that holds."""
        children: dict[str, Any] = self.owner._modules
        mlp = children["mlp"]
        return current(children["self_attn"]), current(mlp) if isinstance(mlp, MoE | MLP) else None

    def __call__(self, hidden_states: torch.Tensor, asked: LayerInputs) -> torch.Tensor | None:
        """hidden_states f32 [B, S, D] -> [B, S, D]; None when this call has to go the long way."""
        attention, feed = self.parts()
        if attention is None:
            return None
        first, second = self.before
        x: torch.Tensor | None = attention(hidden_states, asked.embeddings, asked.mask, cache=asked.cache, before=first)
        if x is None:
            return None
        if (
            feed is not None
            and x.shape[0] * x.shape[1] <= MAX_FUSED_TOKENS
            and not (feed.drops and self.owner.training)
        ):
            return feed.made(x, second)  # type: ignore[no-any-return]
        children: dict[str, Any] = self.owner._modules
        return x + children["mlp"](children["post_attention_layernorm"](x))  # type: ignore[no-any-return]


class LayerInputs(NamedTuple):
    """What a layer is told beside hidden states, as far as its attention goes by it."""

    mask: torch.Tensor | None
    embeddings: Any
    cache: Any


@dataclass(slots=True)
class PrecomputedOutput:
    """What the layer behind a result makes of it, computed before it was asked; the result's tensor carries it."""

    layer: Layer
    out: torch.Tensor
    version: int  # of the result, which nobody may have written to
    asked: LayerInputs
    room: KVTarget
    index: int
    stretch: FusedLayerGroup

    def take_if_valid(self, hidden_states: torch.Tensor, asked: LayerInputs) -> bool:
        """Whether this is what the layer is asked for. If so its keys and values count, and the result lets go of what was made of it."""
        mask, embeddings, cache = self.asked
        if (
            hidden_states._version != self.version
            or recorded(hidden_states)
            or asked.mask is not mask
            or asked.cache is not cache
            or not _same(asked.embeddings, embeddings)
            or not self.room.fits(self.index, cache, mask)
        ):
            return False
        self.room.store_converted(self.index, hidden_states.shape[1])
        self.stretch.left -= 1
        del hidden_states.ktx_ahead  # type: ignore[attr-defined]  # who keeps hidden states keeps no more than these
        return True


def _trained(layers: list[LayerBlocks]) -> bool:
    """Whether modules that drop or add noise in training are in it."""
    return any(module.training for parts in layers for module in parts.layer.modules())


def _same(mine: Any, theirs: Any) -> bool:
    """Whether tables are the same tensors; their pair may have been made anew."""
    if mine is theirs:
        return True
    return isinstance(mine, tuple) and isinstance(theirs, tuple) and all(map(operator.is_, mine, theirs))


class LayerBlocks(NamedTuple):
    """A layer's blocks, as they were when its stretch was made."""

    layer: Layer
    block: Block
    attention: Any
    feed: Any
    guard: Guard

    @classmethod
    def of(cls, layer: Layer) -> LayerBlocks | None:
        block = current(layer)
        if block is None:
            return None
        attention, feed = block.parts()
        if attention is None or feed is None:
            return None
        return cls(layer, block, attention, feed, Guard.over((block.guard, attention.guard, feed.guard)))

    def hold(self) -> bool:
        layer, block, attention, feed, guard = self
        if layer.block is not block or not guard.holds():
            return False
        children: dict[str, Any] = layer._modules
        return children["self_attn"].block is attention and children["mlp"].block is feed


class FusedLayerGroup:
    """Layers in a row. When the first is asked one call computes all; the others, asked for just that, hand out what is there.

    Nobody can tell but by the time: a layer that is given other hidden states than the one before it returned (a hook or a script has
    changed them), another mask or cache computes them itself, and its cache has grown by what was asked for and no more. Where that happens
    again and again the stretch rests.
    """

    def __init__(self, layers: list[LayerBlocks]):
        self.left, self.missed, self.resting = 0, 0, 0
        self._take(layers)

    def _take(self, layers: list[LayerBlocks]) -> None:
        self.layers, self.changes = layers, Changes.count
        self.blocks = [parts.attention for parts in layers]
        self.drops = any(parts.attention.drops or parts.feed.drops for parts in layers)
        self.steps = [
            made.step(before)
            for _, block, attention, feed, _ in layers
            for made, before in zip((attention.made, feed.made), block.before, strict=True)
        ]

    def _renewed(self) -> bool:
        """Takes the blocks that were made of layers whose settings or weights have changed, once for each change; False where there are none."""
        if self.changes == Changes.count:
            return False
        self.changes = Changes.count
        layers = [LayerBlocks.of(parts.layer) for parts in self.layers]
        whole = [parts for parts in layers if parts is not None]
        if len(whole) < len(layers):
            return False
        self._take(whole)
        return True

    def __call__(self, hidden_states: torch.Tensor, asked: LayerInputs) -> torch.Tensor | None:
        """hidden_states f32 [B, S, D] -> what the first layer makes of it; None when layers have to be computed one by one."""
        first, tokens = self.blocks[0], hidden_states.shape[0] * hidden_states.shape[1]
        if not 0 < tokens <= MAX_FUSED_TOKENS or asked.embeddings is None or not self._pays():
            return None
        layers = self.layers[: max(1, TOKEN_LAYERS // AT_ONCE // tokens) * AT_ONCE]
        if not first.takes(hidden_states, asked.cache) or self.drops and _trained(layers):
            return None
        if not all(parts.hold() for parts in layers):
            if not self._renewed():
                return None
            first, layers = self.blocks[0], self.layers[: len(layers)]
        room = kv_target(hidden_states, asked.cache, self.blocks[: len(layers)], asked.mask)
        if room is None:
            return None
        with torch.inference_mode(False):  # tensors that count who writes to them
            outs = [torch.empty(hidden_states.shape, dtype=torch.float32, device="cpu") for _ in layers]
        run(
            hidden_states.contiguous(), self.steps[: 2 * len(layers)], outs, *room.about(asked.embeddings, first.halved)
        )
        for i in range(1, len(outs)):
            ahead = PrecomputedOutput(layers[i].layer, outs[i], outs[i - 1]._version, asked, room, i, self)
            outs[i - 1].ktx_ahead = ahead  # type: ignore[attr-defined]
        room.store_converted(0, hidden_states.shape[1])
        self.left = len(outs) - 1
        return outs[0]

    def _pays(self) -> bool:
        """Whether results are asked for, as far as the last calls tell."""
        self.missed = self.missed + 1 if self.left else 0
        self.left = 0
        if self.missed == MISSES:
            self.resting = REST
        self.resting -= self.resting > 0
        return not self.resting


class Row(nn.ModuleList):
    """Layers whose copies, and those read from a pickle, are joined again."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        group_layers(self)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As torch's, of packed weights too."""
        if requires_grad:
            unpack(self)
        return super().requires_grad_(requires_grad)

    def _get_name(self) -> str:
        return nn.ModuleList.__name__


def group_layers(model: nn.Module) -> None:
    """Makes stretches of a loaded model's layers that follow one another."""
    class_patches.follow()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        if type(module) is nn.ModuleList and any(isinstance(child, Layer) for child in module):
            module.__class__ = Row
        row: list[LayerBlocks] = []
        for child in [*module, None]:
            parts = LayerBlocks.of(child) if isinstance(child, Layer) else None
            if row and (parts is None or _manner(parts) != _manner(row[0])):
                for i in range(0, len(row) - 1, AT_ONCE):
                    row[i].layer.stretch = FusedLayerGroup(
                        row[i:]
                    )  # to the row's end; calls of many tokens go to the next
                row = []
            if parts is not None:
                row.append(parts)


def _manner(parts: LayerBlocks) -> tuple[Any, ...]:
    """What layers of a stretch have in common: they attend in one way, to the same keys."""
    attention = parts.attention.owner
    kinds = getattr(getattr(attention, "config", None), "layer_types", None)
    expands = getattr(attention, "w_uk", None) is not None
    return (
        type(parts.attention),
        kinds and kinds[attention.layer_idx],
        attention.kv_dtype,
        parts.attention.halved,
        expands,
    )
