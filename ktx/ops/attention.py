"""Attention for every family: transformers' own module around our kernel.

The kernel is registered as the attention implementation "ktx". Its mask is not a matrix but an interval of visible keys for each query (ktx.ops.masks), and
the kernel skips what is outside. A mask that is none (holes, custom functions) stays transformers' bool matrix.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ktx.cache.kv import KVType, as_stock
from ktx.cache.paged import PagedCache
from ktx.errors import UsageError
from ktx.kernels import cpu, reference
from ktx.kernels.gpu.attention_backend import known_backend
from ktx.kernels.gradients import backward_only, recorded
from ktx.ops import contract
from ktx.ops.attention_weights import EAGER, Choice, OwnConfig, attention_weights, by_function, missing, weighed
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.fusion.fused import (
    MAX_FUSED_TOKENS,
    NO_NORM,
    FusedStep,
    PreNorm,
    WeightDescriptor,
    float_type,
    plain_linear,
    run_attention,
    split_mask,
    window_of,
)
from ktx.ops.guard import Guard, below, current
from ktx.ops.masks import Intervals, intervals_of, uncausal
from ktx.ops.norm import RMSNorm
from ktx.transformers_compat import CACHE_NAMES

NAME = "ktx"
FUSABLE = (  # attention that is: project, normalise q and k if it has norms, turn halves, store, attend, project
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Qwen2Attention",
    "Qwen2MoeAttention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "Dots1Attention",
    "Glm4MoeAttention",
    "MiniMaxM2Attention",
    "GptOssAttention",
)

KNOWN_KWARGS = (  # what a module may hand to its attention function beside tensors and mask: `attend` knows it, or it changes nothing here
    *("scaling", "dropout", "softcap", "s_aux", "sliding_window", "is_causal", "position_ids", "output_attentions"),
    *(
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "use_cache",
        *CACHE_NAMES,
        "attention_mask",
    ),
)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function: query [B, H, S, D], key and value [B, Hkv, T, D] -> [B, S, H, D], and weights [B, H, S, T] where somebody asks for them.

    Key and value may be the pools of a PagedCache: the mask is then what its batch says.
    """
    choice = choice_of(module)
    if choice.foreign:
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux} | kwargs
        given = {name: value for name, value in options.items() if value is not None}
        return by_function(choice.name, module, query, key, value, attention_mask, **given)
    batch = getattr(key, "ktx_batch", None)
    if batch is not None:
        if not is_causal(module, kwargs):
            raise causal_pages(module)
        ranges, mask = batch.ranges(window_of(module)), None
    else:
        ranges, mask = split_mask(attention_mask, query.shape[0], query.shape[2], key.shape[2])
        # Sinks are for eager attention alone in transformers, which goes by the mask.
        if s_aux is None and not hides(module, choice, attention_mask, kwargs):
            ranges = uncausal(ranges, mask, (query.shape[0], query.shape[2], key.shape[2]))
        ranges = None if ranges is None else ranges.to(query.device)
    if batch is None and ranges is None and mask is None and query.shape[2] > key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries on {key.shape[2]} keys need a mask")
    kernel = cpu.attention if query.device.type == "cpu" else reference.attention
    backward_only(query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.float().contiguous()
    about = {} if batch is None else {"sequences": batch.sequences, "pages": batch.pages}
    cap = float(softcap or 0.0)
    if dropout > 0 and batch is not None:
        raise not_dropped(dropout, "an engine's forward")
    trained = batch is None and recorded(query, key, value) and choice.shows(kwargs)  # weights have a gradient too
    if dropout > 0 or trained:
        weights = F.dropout(attention_weights(query, key, ranges, mask, float(scale), sinks, cap), dropout)
        return weighed(weights, value), weights if choice.shows(kwargs) else None
    out = kernel(query, _dense(key), _dense(value), ranges, mask, float(scale), sinks, cap, **about)
    if batch is not None or not choice.shows(kwargs):
        return out, None
    return out, attention_weights(query, key, ranges, mask, float(scale), sinks, cap)


def not_dropped(dropout: float, where: str) -> UsageError:
    """The error of what cannot drop attention weights, in training."""
    return UsageError(
        f"attention_dropout={dropout}: {where} drops nothing; call model.eval(), or set attention_dropout of the attention modules and of the model's configuration to 0"
    )


def choice_of(module: nn.Module) -> Choice:
    """Of a module of ktx's, or of transformers' own that calls ktx's function by its name."""
    found: Any = module.__dict__.get("choice")
    return Choice(module.config) if found is None else found


def is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether a prompt's tokens do not see those behind them, as transformers' usual kernel finds it where it is given no mask."""
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def hides(module: nn.Module, choice: Choice, mask: torch.Tensor | None, options: Mapping[str, Any]) -> bool:
    """Whether they do not see those in one forward: eager attention goes by the mask alone."""
    return mask is not None if choice.name == EAGER else is_causal(module, options)


def causal_pages(module: Any) -> UsageError:
    """The error of a module that is not causal on an engine's pages."""
    at = getattr(module, "path", type(module).__name__)
    return UsageError(
        f"{at}.is_causal is False: an engine computes prompts in parts, each token after those before it; call the model itself"
    )


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    q_offset: int,
    kv_offset: int,
    mask_function: Any,
    attention_mask: torch.Tensor | None,
    device: Any = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' mask function, whose arguments have no defaults: one that is asked by another name must not be replaced by one. Intervals where the mask is an interval for each query, else bool [B, 1, S, T]."""
    q_offset = int(q_offset)
    compiling = torch.compiler.is_compiling()  # a graph has no numbers to look at: there the mask is a matrix
    if mask_function is causal_mask_function and not compiling:
        keys = int(kv_length)
        seen = None if attention_mask is None else attention_mask.cpu()
        if seen is None and 0 < q_length <= MAX_FUSED_TOKENS:  # a step of an answer: one operation instead of ten
            after = q_offset + 1 - int(kv_offset)
            ends = [[0, min(after + i, keys)] for i in range(q_length)]
            return Intervals(torch.tensor([ends] * batch_size, dtype=torch.int32, device="cpu"), keys, device)
        first = _left_padding(seen, batch_size, kv_offset, kv_length)
        if first is not None:
            last = torch.arange(q_offset + 1 - kv_offset, q_offset + 1 - kv_offset + q_length, device="cpu").clamp(
                max=keys
            )
            ranges = torch.stack([first[:, None].expand(-1, q_length), last.expand(batch_size, -1)], -1)
            return Intervals(ranges.to(torch.int32), keys, device)
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    full = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )
    assert full is not None  # skipping was not allowed
    return full if compiling else intervals_of(full)


def _left_padding(mask: torch.Tensor | None, batch: int, offset: int, length: int) -> torch.Tensor | None:
    """First key of each sequence; None when its padding is not all on the left."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device="cpu")
    seen = mask[:, offset : offset + length].bool()
    first = seen.int().argmax(1)
    left = seen.sum(1) + first == seen.shape[1]
    return first if bool(left.all()) else None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, interval_mask)


def unsupported_kwargs(module: nn.Module) -> list[str]:
    """What a module's forward tells its attention function, or asks of the function's name, that our kernel would not heed: sparse indices, position biases."""
    code: CodeType = inspect.unwrap(type(module).forward).__code__
    tuples = [const for const in code.co_consts if isinstance(const, tuple)]
    words = {word for const in tuples if "scaling" in const for word in const if isinstance(word, str)}
    asked = {
        const for const in [*code.co_consts, *(c for const in tuples for c in const)] if const in ("eager", "sdpa")
    }
    return sorted((words - set(KNOWN_KWARGS)) | asked)


class Attention(Operator):
    """The transformers module itself, computing with our kernel: projections, norms, rotary code and gates are its own.

    A module without a configuration has no attention to choose (linear attention): it stays as it is, and so does one whose attention is told
    what the kernel does not know (`foreign_words`); `ours` says whether the kernel computes. Option: `backend` (triton, flashinfer, auto) says whose kernels attend on a GPU.
    """

    remade = ("block",)
    reads = frozenset({"scaling", "sinks"})
    kv_dtype: KVType
    block: AttentionBlock | None
    uses_ktx_kernel: bool
    choice: Choice
    implementation = NAME  # of the kernels' function

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, backend: str = "triton", **kwargs: Any) -> Attention:
        if not hasattr(old, "layer_idx"):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, which is no attention: it has no place in a cache (layer_idx)"
            )
        new: Attention = adopt(cls, old, ctx)
        new.kv_dtype, new.block, new.usual = ctx.kv_dtype, None, type(old).__name__ in FUSABLE
        new.backend = known_backend(backend)
        new.half_tables = type(old).__name__ == "GptOssAttention"
        new.uses_ktx_kernel = hasattr(old, "config") and not unsupported_kwargs(old)
        if hasattr(old, "config"):
            new.choice = Choice(old.config)
        if new.uses_ktx_kernel:
            new.config = OwnConfig(old.config, cls.implementation)
            contract.masks(NAME)
        if new.usual and new.uses_ktx_kernel:
            contract.attention(old, ctx.path, new.half_tables, window_of(old))
        return new

    def ready(self) -> None:
        self.block = AttentionBlock.of(self) if self.usual and self.uses_ktx_kernel else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.computed(*self.call.split(args, kwargs))

    def by_class(self, *args: Any, **kwargs: Any) -> Any:
        if self.placement.gpu:
            return super().by_class(*args, **kwargs)
        return self.computed(*self.call.split(args, kwargs))  # ends there

    def computed(self, given: dict[str, Any], cache: Any) -> Any:
        """The forward, its arguments by name and its cache apart."""
        if (block := current(self)) is not None:
            done = block(cache=cache, **given)
            if done is not None:
                return done, None
        if recorded(given.get("hidden_states")):
            as_stock(cache, self.layer_idx)
        stored = cache
        if self.uses_ktx_kernel and self.kv_dtype is not None and cache is not None and type(cache) is not PagedCache:
            stored = CastingCache(cache, float_type(self.kv_dtype, torch.float16))
        out = super().forward(**self.call.joined(given, stored))
        if "choice" in self.__dict__ and self.choice.shows(given, cache) and not _has_weights(out):
            raise missing(self.path, type(self).__name__)
        return out


def _has_weights(out: Any) -> bool:
    """Whether an attention module's result is one with weights."""
    return isinstance(out, tuple) and len(out) > 1 and out[1] is not None


PROJECTIONS, NORMS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_norm", "k_norm"]


class AttentionBlock:
    """The usual attention in one kernel call, on a cache that grows in place."""

    def __init__(self, owner: Attention, matrices: WeightDescriptor):
        self.owner, self.halved = owner, owner.half_tables
        children: dict[str, Any] = owner._modules
        norms = [children.get(name) for name in NORMS]
        self.heads, self.columns = children["k_proj"].out_features // owner.head_dim, (owner.head_dim, owner.head_dim)
        self.drops = getattr(owner, "attention_dropout", 0.0) > 0
        sinks = getattr(owner, "sinks", None)
        copied = [norm.copied() for norm in norms if norm is not None]
        copied += [children[name].copied_bias() for name in PROJECTIONS]
        self.guard = Guard([owner], below(owner), [*copied, sinks])
        self.made = FusedStep(
            "gqa_step",
            matrices.packed,
            matrices.descriptor,
            [matrices.hidden, self.heads, owner.head_dim],
            *(children[name].bias_in_f32 for name in PROJECTIONS),
            *(None if norm is None else norm.in_f32 for norm in norms),
            norms[0] is not None and norms[0].in_f32.numel() != owner.head_dim,
            norms[0] is not None and bool(norms[0].plus_one),
            None if sinks is None else sinks.detach().float().contiguous(),
            [*(1.0 if norm is None else norm.epsilon for norm in norms), float(owner.scaling), 0.0],
        )

    def takes(self, hidden: torch.Tensor, cache: Any) -> bool:
        """Whether hidden [B, S, D] has few tokens, nobody wants to see how they attend, and nothing is to be dropped."""
        if self.drops and self.owner.training:
            return False
        return hidden.shape[0] * hidden.shape[1] <= MAX_FUSED_TOKENS and self.owner.choice.plain(cache)

    @classmethod
    def of(cls, owner: Attention) -> AttentionBlock | None:
        """None where a projection or a norm is something else than ours."""
        children: dict[str, Any] = owner._modules
        norms = [children.get(name) for name in NORMS]
        if any(not plain_linear(children.get(name)) for name in PROJECTIONS):
            return None
        if any(norm is not None and not RMSNorm.is_cpu_norm(norm) for norm in norms) or (norms[0] is None) != (
            norms[1] is None
        ):
            return None
        matrices = WeightDescriptor()
        for name in PROJECTIONS:
            matrices.projection(children[name].parts)
        return cls(owner, matrices)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        *,
        cache: Any = None,
        before: PreNorm = NO_NORM,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """hidden_states f32 [B, S, D] -> [B, S, D], with `before` plus hidden_states; None when this call has to go the long way."""
        if position_embeddings is None or not self.takes(hidden_states, cache):
            return None
        return run_attention(self, hidden_states, position_embeddings, attention_mask, cache, before)


class CastingCache:
    """A transformers cache that is handed keys and values in another type than the model computes in."""

    def __init__(self, cache: Any, dtype: torch.dtype):
        self.cache, self.dtype = cache, dtype

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.cache.update(keys.to(self.dtype), values.to(self.dtype), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)
