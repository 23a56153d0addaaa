"""Attention weights, and attention functions other than the kernel's, for who asks for them.

transformers' kernels of attention hand out no weights, and neither does ktx's. Weights are computed beside its result where a forward collects them
(`output_attentions=True`), and where the model's configuration names the eager implementation. A function that the user has registered with transformers is called
in place of the kernel.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ktx.cache.kv import values_of
from ktx.cache.paged import PagedCache
from ktx.errors import UsageError, did_you_mean
from ktx.kernels.reference import visible
from ktx.transformers_compat import attention_function, attention_name, collects

log = logging.getLogger("ktx.model.notes")
ATTENTIONS = "attentions"  # what transformers calls them
EAGER = "eager"
KERNELS = ("", "ktx", "ktx_gpu", "sdpa")  # implementations that a kernel stands in for; "": as when the model was made


class Choice:
    """Which implementation of attention a model's configuration names, now and when the model was made."""

    def __init__(self, config: Any):
        self.config, self.first = config, attention_name(config)

    @property
    def name(self) -> str:
        """What has been chosen since the model was made; "" for nothing."""
        now: str = self.config._attn_implementation if torch.compiler.is_compiling() else attention_name(self.config)
        return "" if now == self.first else now

    @property
    def foreign(self) -> bool:
        """Whether a function that is none of ktx's computes attention."""
        name = self.name
        return name not in KERNELS and name != EAGER

    def plain(self, cache: Any = None) -> bool:
        """Whether a kernel computes attention and nobody wants to see the weights. An engine's forwards have none."""
        name = self.name
        if type(cache) is PagedCache:
            return name in KERNELS or name == EAGER
        return name in KERNELS and not collects(ATTENTIONS)

    def shows(self, options: Mapping[str, Any], cache: Any = None) -> bool:
        """Whether a call with these keyword arguments returns attention weights."""
        asked = collects(ATTENTIONS) or bool(options.get("output_attentions")) or self.name == EAGER
        return asked and type(cache) is not PagedCache


class OwnConfig:
    """A model's configuration as a module of ktx's sees it: attention is implemented by the function `name`. All else is the model's, and what is set on it is set there."""

    def __init__(self, config: Any, name: str):
        self.__dict__.update(ktx_whole=config, ktx_name=name)

    @property
    def _attn_implementation(self) -> str:
        found: str = self.__dict__["ktx_name"]
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["ktx_whole"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["ktx_whole"], name, value)

    def __reduce__(self) -> Any:
        return OwnConfig, (self.__dict__["ktx_whole"], self.__dict__["ktx_name"])


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    ranges: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """query [B, H, S, D], key [B, Hkv, T, D] of any stored type -> [B, H, S, T] in the query's dtype; ranges, mask, sinks and softcap as ktx.kernels.reference.attention has them.

    A query that sees no key has the same weight for each, as in transformers' eager attention.
    """
    _say_once()
    keys = values_of(key).float()
    scores = query.float() @ keys.repeat_interleave(query.shape[1] // keys.shape[1], 1).transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen, extra = visible(query.shape[2], keys.shape[2], ranges, mask, query.device)
    if extra is not None:
        scores = scores + extra.float()
    scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : keys.shape[2]].to(query.dtype)


def weighed(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What weights [B, H, S, T] make of value [B, Hkv, T, D] of any stored type -> [B, S, H, D] in the weights' dtype."""
    values = values_of(value).float()
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], 1)
    return (weights.float() @ values).transpose(1, 2).contiguous().to(weights.dtype)


@functools.cache
def _say_once() -> None:
    log.warning(
        "attention weights are computed beside the kernel's results, in plain torch: slower, and [batch, heads, queries, keys] floats a layer"
    )


def by_function(
    name: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the attention function that transformers knows as `name` makes of queries, and of keys and values of any stored type. UsageError for pages of an engine."""
    if getattr(key, "ktx_batch", None) is not None:
        raise UsageError(
            f"attn_implementation {name!r} reads no pages of an engine's cache; call model.set_attn_implementation('ktx') before an engine computes"
        )
    states = (values_of(x).to(query.dtype) for x in (key, value))
    found: tuple[torch.Tensor, torch.Tensor | None] = attention_function(name)(module, query, *states, mask, **options)
    return found


def known_implementation(name: Any) -> None:
    """UsageError for what names no function of attention that is there; None names none."""
    if name is None or name in (EAGER, *KERNELS[1:]):
        return
    try:
        attention_function(str(name))
    except KeyError as error:
        known = [EAGER, "sdpa", "ktx"]
        raise UsageError(
            f"attn_implementation {name!r} is no function of attention that transformers knows{did_you_mean(str(name), known)}; give one of {', '.join(known)}, or"
            " register it before (transformers.AttentionInterface.register)"
        ) from error


def missing(path: str, kind: str) -> UsageError:
    """The error of a module that was asked for attention weights and has none."""
    return UsageError(
        f"{path}: {kind} returned no attention weights, its attention is transformers' own with a kernel that has none; call model.set_attn_implementation('eager') first"
    )
