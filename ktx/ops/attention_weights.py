"""Attention weights, and attention functions other than the kernel of ktx.

Like the attention kernels of transformers, the kernel of ktx returns no weights. They are computed in addition to its
result if a forward collects them (`output_attentions=True`), or if the configuration of the model names the eager
implementation. An attention function that the user has registered with transformers is called instead of the kernel.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ktx.cache.forward_context import batch_of
from ktx.cache.kv import to_floats
from ktx.cache.paged import PagedCache
from ktx.errors import UsageError, did_you_mean
from ktx.kernels.reference import visible_keys
from ktx.transformers_compat import attention_function, attention_name, collects_output

log = logging.getLogger("ktx.model.notes")
ATTENTIONS = "attentions"  # the name of attention weights in transformers' outputs
EAGER = "eager"
KERNELS = ("", "ktx", "ktx_gpu", "sdpa")  # implementations that the kernels of ktx compute; "": unchanged since loading


class AttentionChoice:
    """The attention implementation that a model's configuration names, compared with the one at construction."""

    def __init__(self, config: Any):
        self.config, self.initial = config, attention_name(config)

    @property
    def name(self) -> str:
        """The implementation that the configuration names now; "" if it is the one that it named at construction."""
        current: str = (
            self.config._attn_implementation if torch.compiler.is_compiling() else attention_name(self.config)
        )
        return "" if current == self.initial else current

    @property
    def is_custom(self) -> bool:
        """Whether an attention function that is not part of ktx computes attention."""
        name = self.name
        return name not in KERNELS and name != EAGER

    def uses_kernel(self, cache: Any = None) -> bool:
        """Whether a kernel computes attention and no attention weights are needed.

        An engine's forwards, whose cache is a PagedCache, never return weights.
        """
        name = self.name
        if type(cache) is PagedCache:
            return name in KERNELS or name == EAGER
        return name in KERNELS and not collects_output(ATTENTIONS)

    def returns_weights(self, options: Mapping[str, Any], cache: Any = None) -> bool:
        """Whether a call with the keyword arguments `options` returns attention weights."""
        requested = collects_output(ATTENTIONS) or bool(options.get("output_attentions")) or self.name == EAGER
        return requested and type(cache) is not PagedCache


class ConfigView:
    """A view of a model's configuration that names the attention function `name`.

    All other attributes are those of the model's configuration, and assignments go there.
    """

    def __init__(self, config: Any, name: str):
        self.__dict__.update(ktx_whole=config, ktx_name=name)

    @property
    def _attn_implementation(self) -> str:
        name: str = self.__dict__["ktx_name"]
        return name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["ktx_whole"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["ktx_whole"], name, value)

    def __reduce__(self) -> Any:
        return ConfigView, (self.__dict__["ktx_whole"], self.__dict__["ktx_name"])


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    ranges: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Computes attention weights in plain torch, for calls that return them, because the kernels do not.

    A query that sees no key gets equal weights for all keys, as in the eager attention of transformers.

    Args:
        query: [B, H, S, D].
        key: [B, Hkv, T, D] in any cache dtype.
        ranges: Intervals of visible keys, as in ktx.kernels.reference.attention.
        mask: The dense mask, as in ktx.kernels.reference.attention.
        scale: The factor of the scores.
        sinks: Attention sinks f32 [H], or None.
        softcap: The cap of the scores; 0 for none.

    Returns:
        The weights [B, H, S, T] in the dtype of `query`.
    """
    _warn_once()
    keys = to_floats(key).float()
    scores = query.float() @ keys.repeat_interleave(query.shape[1] // keys.shape[1], 1).transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible, additive = visible_keys(query.shape[2], keys.shape[2], ranges, mask, query.device)
    if additive is not None:
        scores = scores + additive.float()
    scores = scores.masked_fill(~visible, torch.finfo(torch.float32).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : keys.shape[2]].to(query.dtype)


def apply_weights(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Applies weights [B, H, S, T] to value [B, Hkv, T, D] in any cache dtype -> [B, S, H, D] in the weights' dtype."""
    values = to_floats(value).float()
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], 1)
    return (weights.float() @ values).transpose(1, 2).contiguous().to(weights.dtype)


@functools.cache
def _warn_once() -> None:
    log.warning(
        "attention weights are computed in plain torch, in addition to the kernel's results: this is slower, and takes"
        " [batch, heads, queries, keys] floats per layer"
    )


def call_registered(
    name: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Calls the attention function `name`, which the user registered with transformers, in place of ktx's kernel.

    Args:
        name: The registered name.
        module: The attention module.
        query: [B, H, S, D].
        key: [B, Hkv, T, D] in any cache dtype; converted to the dtype of `query`.
        value: [B, Hkv, T, D], likewise.
        mask: The attention mask, as transformers created it.
        **options: Further arguments of the function.

    Returns:
        The output [B, S, H, D], and the attention weights or None.

    Raises:
        UsageError: Keys and values are in the paged KV cache of an engine.
    """
    if batch_of(key) is not None:
        raise UsageError(
            f"attn_implementation {name!r} cannot read the paged KV cache of an engine; call"
            " model.set_attn_implementation('ktx') before using an engine"
        )
    states = (to_floats(x).to(query.dtype) for x in (key, value))
    result: tuple[torch.Tensor, torch.Tensor | None] = attention_function(name)(module, query, *states, mask, **options)
    return result


def check_implementation(name: Any) -> None:
    """Raises UsageError if `name` is no registered attention function, before anything is loaded; None is valid."""
    if name is None or name in (EAGER, *KERNELS[1:]):  # all kernels but "", which no user gives
        return
    try:
        attention_function(str(name))
    except KeyError as error:
        known = [EAGER, "sdpa", "ktx"]
        raise UsageError(
            f"attn_implementation {name!r} is not an attention function registered with transformers"
            f"{did_you_mean(str(name), known)}; give one of {', '.join(known)}, or register it first"
            " (transformers.AttentionInterface.register)"
        ) from error


def missing_weights_error(path: str, kind: str) -> UsageError:
    """Returns the error for a module that did not return the requested attention weights."""
    return UsageError(
        f"{path}: {kind} returned no attention weights, because transformers computes its attention with a kernel that"
        " has none; call model.set_attn_implementation('eager') first"
    )
