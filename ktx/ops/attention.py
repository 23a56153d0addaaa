"""Attention for every model family: the module of transformers with the attention kernel of ktx.

The kernel is registered with transformers as the attention implementation "ktx". Its mask is not a dense matrix but an
interval of visible keys for each query (ktx.ops.masks), and the kernel skips the keys outside. A mask that cannot be
written as intervals (holes, custom mask functions) stays the dense bool mask of transformers.

Shapes: B sequences, H query heads, Hkv key-value heads, S new tokens, T keys, D columns of a head.
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

from ktx.cache.forward_context import batch_of
from ktx.cache.kv import KVType, restore_stock_layer
from ktx.cache.paged import PagedCache
from ktx.errors import UsageError
from ktx.families import FUSABLE_ATTENTION, HALF_TABLES
from ktx.kernels import cpu, reference
from ktx.kernels.gpu.attention_backend import known_backend
from ktx.kernels.gradients import is_recorded, refuse_forward_mode
from ktx.ops import contract
from ktx.ops.attention_weights import (
    EAGER,
    AttentionChoice,
    ConfigView,
    apply_weights,
    attention_weights,
    call_registered,
    missing_weights_error,
)
from ktx.ops.base import Context, Operator, adopt
from ktx.ops.fusion.fused import (
    MAX_FUSED_TOKENS,
    NO_NORM,
    FusedStep,
    PreNorm,
    WeightDescriptor,
    is_plain_linear,
    kv_float_dtype,
    run_attention,
    sliding_window,
    split_mask,
)
from ktx.ops.guard import Guard, descendants, valid_fast_path
from ktx.ops.masks import Intervals, intervals_of, non_causal_ranges
from ktx.ops.norm import RMSNorm
from ktx.transformers_compat import CACHE_NAMES

NAME = "ktx"
# Arguments, besides tensors and mask, that a module may pass to its attention function: `attend` handles them, or they
# have no effect on the result.
KNOWN_KWARGS = (
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
    """The attention function "ktx", with the signature that transformers expects.

    Args:
        module: The attention module.
        query: [B, H, S, D].
        key: [B, Hkv, T, D], or the page pool of a PagedCache, whose batch then defines the visible keys.
        value: [B, Hkv, T, D], or the page pool of a PagedCache.
        attention_mask: Intervals, a dense mask [B, 1 or H, S, T], or None.
        scaling: The factor of the scores; None: D ** -0.5.
        dropout: The probability that an attention weight is dropped, in training.
        softcap: The cap of the scores; None or 0 for none.
        s_aux: Attention sinks [H].
        **kwargs: Further arguments of the module, see KNOWN_KWARGS.

    Returns:
        The output [B, S, H, D], and the attention weights [B, H, S, T] if they are requested, else None.

    Raises:
        UsageError: On a PagedCache: the module is not causal, or attention weights are to be dropped.
        ValueError: There are more queries than keys, and no mask.
    """
    choice = attention_choice(module)
    if choice.is_custom:
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux} | kwargs
        given = {name: value for name, value in options.items() if value is not None}
        return call_registered(choice.name, module, query, key, value, attention_mask, **given)
    batch = batch_of(key)
    if batch is not None:
        if not is_causal(module, kwargs):
            raise non_causal_error(module)
        ranges, mask = batch.window_ranges(sliding_window(module)), None
    else:
        ranges, mask = split_mask(attention_mask, query.shape[0], query.shape[2], key.shape[2])
        # In transformers only eager attention supports sinks, and it uses the mask alone, not `is_causal`.
        if s_aux is None and not masks_future(module, choice, attention_mask, kwargs):
            ranges = non_causal_ranges(ranges, mask, (query.shape[0], query.shape[2], key.shape[2]))
        ranges = None if ranges is None else ranges.to(query.device)
    if batch is None and ranges is None and mask is None and query.shape[2] > key.shape[2]:
        raise ValueError(f"{query.shape[2]} queries on {key.shape[2]} keys need a mask")
    kernel = cpu.attention if query.device.type == "cpu" else reference.attention
    refuse_forward_mode(query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.float().contiguous()
    paging = {} if batch is None else {"sequences": batch.sequences, "pages": batch.pages}
    cap = float(softcap or 0.0)
    if dropout > 0 and batch is not None:
        raise dropout_error(dropout, "an engine's forward")
    # The kernel's backward gives no gradients of attention weights.
    needs_weight_gradients = batch is None and is_recorded(query, key, value) and choice.returns_weights(kwargs)
    if dropout > 0 or needs_weight_gradients:
        weights = F.dropout(attention_weights(query, key, ranges, mask, float(scale), sinks, cap), dropout)
        return apply_weights(weights, value), weights if choice.returns_weights(kwargs) else None
    out = kernel(
        query,
        _make_rows_contiguous(key),
        _make_rows_contiguous(value),
        ranges,
        mask,
        float(scale),
        sinks,
        cap,
        **paging,
    )
    if batch is not None or not choice.returns_weights(kwargs):
        return out, None
    return out, attention_weights(query, key, ranges, mask, float(scale), sinks, cap)


def dropout_error(dropout: float, where: str) -> UsageError:
    """Returns the error for attention dropout in training where it is not supported."""
    return UsageError(
        f"attention_dropout={dropout}: {where} does not support attention dropout; call model.eval(), or set"
        " attention_dropout of the attention modules and of the model's configuration to 0"
    )


def attention_choice(module: nn.Module) -> AttentionChoice:
    """Returns the AttentionChoice of an operator, or of a transformers module that uses the function "ktx"."""
    choice: Any = module.__dict__.get("choice")
    return AttentionChoice(module.config) if choice is None else choice


def is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether attention without a mask is causal, as in transformers' SDPA: by the argument, else the attribute."""
    argument = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if argument is None else argument)


def masks_future(
    module: nn.Module, choice: AttentionChoice, mask: torch.Tensor | None, options: Mapping[str, Any]
) -> bool:
    """Whether tokens of a forward do not see later tokens; eager attention depends on the mask alone."""
    return mask is not None if choice.name == EAGER else is_causal(module, options)


def non_causal_error(module: Any) -> UsageError:
    """Returns the error for a module that is not causal on the paged KV cache of an engine."""
    path = getattr(module, "path", type(module).__name__)
    return UsageError(
        f"{path}.is_causal is False: an engine prefills prompts in chunks, so a token cannot see later tokens; call the"
        " model itself"
    )


def _make_rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` with contiguous columns, as the kernels require."""
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
    """The mask function that transformers calls for the implementation "ktx".

    The arguments that transformers passes have no defaults on purpose: if a version renames one, the call must fail
    instead of using a default.

    Returns:
        Intervals if the mask is one interval for each query, else a dense mask bool [B, 1, S, T].
    """
    q_offset = int(q_offset)
    compiling = torch.compiler.is_compiling()  # values are unknown in a graph, so the mask is dense there
    if mask_function is causal_mask_function and not compiling:
        keys = int(kv_length)
        padding_mask = None if attention_mask is None else attention_mask.cpu()
        if padding_mask is None and 0 < q_length <= MAX_FUSED_TOKENS:  # decode: one operation instead of ten
            first_end = q_offset + 1 - int(kv_offset)
            intervals = [[0, min(first_end + i, keys)] for i in range(q_length)]
            return Intervals(torch.tensor([intervals] * batch_size, dtype=torch.int32, device="cpu"), keys, device)
        starts = _find_first_visible(padding_mask, batch_size, kv_offset, kv_length)
        if starts is not None:
            ends = torch.arange(q_offset + 1 - kv_offset, q_offset + 1 - kv_offset + q_length, device="cpu").clamp(
                max=keys
            )
            ranges = torch.stack([starts[:, None].expand(-1, q_length), ends.expand(batch_size, -1)], -1)
            return Intervals(ranges.to(torch.int32), keys, device)
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(
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
    assert mask is not None  # because skipping is disabled
    return mask if compiling else intervals_of(mask)


def _find_first_visible(mask: torch.Tensor | None, batch: int, offset: int, length: int) -> torch.Tensor | None:
    """Returns the first visible key of each sequence, or None if a sequence has padding that is not on the left."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device="cpu")
    visible = mask[:, offset : offset + length].bool()
    first = visible.int().argmax(1)
    left = visible.sum(1) + first == visible.shape[1]
    return first if bool(left.all()) else None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, interval_mask)


def unsupported_requirements(module: nn.Module) -> list[str]:
    """Returns what a module's forward requires of its attention function that the kernel does not support.

    That is keyword arguments outside KNOWN_KWARGS (sparse indices, position biases), and the names "eager" and "sdpa"
    if the forward compares the implementation with them. Both are read from the constants of its code.
    """
    code: CodeType = inspect.unwrap(type(module).forward).__code__
    # Python stores the keyword names of each call as a tuple; the one with "scaling" is that of the attention function.
    tuples = [const for const in code.co_consts if isinstance(const, tuple)]
    argument_names = {name for const in tuples if "scaling" in const for name in const if isinstance(name, str)}
    implementations = {
        const for const in [*code.co_consts, *(c for const in tuples for c in const)] if const in ("eager", "sdpa")
    }
    return sorted((argument_names - set(KNOWN_KWARGS)) | implementations)


class Attention(Operator):
    """The attention module of transformers with the kernel of ktx; projections, norms, RoPE and gates stay its own.

    A module without a configuration, such as linear attention, has no attention function to choose, so it computes as
    in transformers. So does a module that requires what the kernel does not support (`unsupported_requirements`).

    Option: `backend` (triton, flashinfer, auto) selects the attention kernels on a GPU.

    Attributes:
        kv_dtype: The dtype of cached keys and values.
        block: The fused attention step, if this module supports it.
        uses_ktx_kernel: Whether the kernel of ktx computes the attention.
        choice: The attention implementation that the model's configuration names.
        implementation: The name under which the kernel is registered.
    """

    remade = ("block",)
    reads = frozenset({"scaling", "sinks"})
    kv_dtype: KVType
    block: AttentionBlock | None
    uses_ktx_kernel: bool
    choice: AttentionChoice
    implementation = NAME

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, backend: str = "triton", **kwargs: Any) -> Attention:
        """Creates the operator that replaces a transformers attention module.

        Args:
            old: The module, on the meta device.
            ctx: The operator's path, configuration, device and dtypes.
            backend: The attention kernels on a GPU: triton, flashinfer or auto.
            **kwargs: Not used.

        Raises:
            UsageError: `old` has no cache index, or computes otherwise than the fused step of its class.
        """
        if not hasattr(old, "layer_idx"):
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, which is not cached attention: it has no cache index"
                " (layer_idx)"
            )
        new: Attention = adopt(cls, old, ctx)
        new.kv_dtype, new.block, new.fusable = ctx.kv_dtype, None, type(old).__name__ in FUSABLE_ATTENTION
        new.backend = known_backend(backend)
        new.half_tables = type(old).__name__ in HALF_TABLES
        new.uses_ktx_kernel = hasattr(old, "config") and not unsupported_requirements(old)
        if hasattr(old, "config"):
            new.choice = AttentionChoice(old.config)
        if new.uses_ktx_kernel:
            new.config = ConfigView(old.config, cls.implementation)
            contract.check_masks(NAME)
        if new.fusable and new.uses_ktx_kernel:
            contract.check_attention(old, ctx.path, new.half_tables, sliding_window(old))
        return new

    def ready(self) -> None:
        """Builds the fused step, if this attention can be one."""
        self.block = AttentionBlock.of(self) if self.fusable and self.uses_ktx_kernel else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the replaced module returns, whatever names its arguments have."""
        return self.compute(*self.call.split(args, kwargs))

    def call_patched_class(self, *args: Any, **kwargs: Any) -> Any:
        """Computes as `forward`, which calls the patched method; on a GPU raises UsageError."""
        if self.placement.gpu:
            return super().call_patched_class(*args, **kwargs)
        return self.compute(*self.call.split(args, kwargs))  # which calls the forward of the replaced class

    def compute(self, arguments: dict[str, Any], cache: Any) -> Any:
        """Computes the attention in the fused step if that is valid, else by the replaced module's forward.

        That forward stores keys and values in the dtype it computes them in, so a `CastingCache` casts them for
        `kv_dtype`; autograd needs a cache layer that does not grow in place.

        Args:
            arguments: The arguments by name, without the cache.
            cache: The cache, or None.
        """
        if (block := valid_fast_path(self)) is not None:
            fused = block(cache=cache, **arguments)
            if fused is not None:
                return fused, None
        if is_recorded(arguments.get("hidden_states")):
            restore_stock_layer(cache, self.layer_idx)
        casting = cache
        if self.uses_ktx_kernel and self.kv_dtype is not None and cache is not None and type(cache) is not PagedCache:
            casting = CastingCache(cache, kv_float_dtype(self.kv_dtype, torch.float16))
        out = super().forward(**self.call.join(arguments, casting))
        if "choice" in self.__dict__ and self.choice.returns_weights(arguments, cache) and not _has_weights(out):
            raise missing_weights_error(self.path, type(self).__name__)
        return out


def _has_weights(out: Any) -> bool:
    """Whether the output of an attention module contains attention weights."""
    return isinstance(out, tuple) and len(out) > 1 and out[1] is not None


PROJECTIONS, NORMS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_norm", "k_norm"]


class AttentionBlock:
    """Fuses the attention of a FUSABLE_ATTENTION module into one kernel call, on a cache that grows in place."""

    def __init__(self, owner: Attention, matrices: WeightDescriptor):
        """Builds the kernel step from `owner` and its packed `matrices`, in the order of PROJECTIONS."""
        self.owner, self.half_rotary = owner, owner.half_tables
        children: dict[str, Any] = owner._modules
        norms = [children.get(name) for name in NORMS]
        self.heads, self.head_dims = children["k_proj"].out_features // owner.head_dim, (owner.head_dim, owner.head_dim)
        self.has_dropout = getattr(owner, "attention_dropout", 0.0) > 0
        sinks = getattr(owner, "sinks", None)
        copied_tensors = [norm.copied_weight() for norm in norms if norm is not None]
        copied_tensors += [children[name].copied_bias() for name in PROJECTIONS]
        self.guard = Guard([owner], descendants(owner), [*copied_tensors, sinks])
        self.fused_step = FusedStep(
            "gqa_step",
            matrices.packed,
            matrices.descriptor,
            [matrices.hidden, self.heads, owner.head_dim],
            *(children[name].bias_in_f32 for name in PROJECTIONS),
            *(None if norm is None else norm.in_f32 for norm in norms),
            norms[0] is not None and norms[0].in_f32.numel() != owner.head_dim,  # norms of all heads' columns at once
            norms[0] is not None and bool(norms[0].plus_one),
            None if sinks is None else sinks.detach().float().contiguous(),
            # the norms' epsilons, the scale of the scores, and their softcap (none)
            [*(1.0 if norm is None else norm.epsilon for norm in norms), float(owner.scaling), 0.0],
        )

    def supports(self, hidden: torch.Tensor, cache: Any) -> bool:
        """Whether hidden [B, S, D] has at most MAX_FUSED_TOKENS tokens and needs no attention weights or dropout."""
        if self.has_dropout and self.owner.training:
            return False
        return hidden.shape[0] * hidden.shape[1] <= MAX_FUSED_TOKENS and self.owner.choice.uses_kernel(cache)

    @classmethod
    def of(cls, owner: Attention) -> AttentionBlock | None:
        """Builds the block of `owner`; None unless its projections, and both norms or none, are operators of ktx."""
        children: dict[str, Any] = owner._modules
        norms = [children.get(name) for name in NORMS]
        if any(not is_plain_linear(children.get(name)) for name in PROJECTIONS):
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
        """Computes the attention with its projections in one kernel call, because for few tokens call overhead counts.

        Args:
            hidden_states: f32 [B, S, D].
            position_embeddings: The rotary tables.
            attention_mask: The mask, as transformers passes it.
            cache: The cache.
            before: The norm of the input; if it has one, the input is added to the output (residual).
            **kwargs: Further arguments of the forward, ignored.

        Returns:
            f32 [B, S, D], or None if this call needs the unfused forward.
        """
        if position_embeddings is None or not self.supports(hidden_states, cache):
            return None
        return run_attention(self, hidden_states, position_embeddings, attention_mask, cache, before)


class CastingCache:
    """Wraps a transformers cache and casts keys and values to `dtype` before they are stored."""

    def __init__(self, cache: Any, dtype: torch.dtype):
        self.cache, self.dtype = cache, dtype

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores keys and values cast to `dtype`."""
        return self.cache.update(keys.to(self.dtype), values.to(self.dtype), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)
