"""Choosing the next token: what a user asks for (`Sampling`), and the state of one answer that does it (`Chooser`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ktx.errors import UsageError

LIMITS = {  # inclusive range of each setting
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1 << 30),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "max_new_tokens": (0, 1 << 30),
    "min_tokens": (0, 1 << 31),
    "repeat_last_n": (-1, 1 << 31),
    "logprobs": (0, 20),
}
FIRST, MORE = (
    256,
    8192,
)  # how many of the likeliest tokens are sorted before all are: a vocabulary takes ten milliseconds


@dataclass(frozen=True)
class SamplingParams:
    """How to choose; temperature 0 (the default) takes the likeliest token. `top_k` 0, `top_p` and `typical_p` 1 are off.

    Cuts follow one another as in transformers: top_k, top_p, min_p, typical_p, each on what the one before left.
    `logprobs`: how many likeliest tokens are told with each one's own log-probability (None: none of it), from the
    model's own distribution, before any setting here. `echo`: the prompt's tokens with theirs too.
    Nothing ends an answer before `min_tokens` of it. Penalties look back over `repeat_last_n` tokens (-1: all of them).
    `hidden` tokens have no text; `include_stop`: the text that ends an answer is part of it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_new_tokens: int = 1000
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    repeat_last_n: int = -1
    hidden: frozenset[int] = frozenset()
    include_stop: bool = False
    logprobs: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}, it must be from {low} to {high}")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise UsageError(f"seed is {self.seed}, it must fit 64 bits")
        if any(not math.isfinite(value) for value in self.logit_bias.values()):
            raise UsageError("logit_bias must hold finite numbers")

    @property
    def penalises(self) -> bool:
        changes = self.repetition_penalty != 1 or bool(self.presence_penalty) or bool(self.frequency_penalty)
        return changes and self.repeat_last_n != 0


@dataclass(frozen=True)
class SampledToken:
    """A token, and if they were asked for its log-probability and the likeliest tokens' (id, log-probability), best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One answer's choices. The same seed gives the same answer whatever else is computed beside it: a token takes one random number."""

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int] = ()):
        self.sampling, self.prompt = sampling, prompt
        self.source = torch.Generator()
        if sampling.seed is None:
            self.source.seed()
        else:
            self.source.manual_seed(sampling.seed % (1 << 64))
        self.read: torch.Tensor | None = None  # bool [vocabulary]: in the prompt or the answer
        self.count: torch.Tensor | None = None  # f32 [vocabulary]: how often in the answer
        self.said: list[int] = []  # the answer, where penalties look back over a part of it

    def sample(self, logits: torch.Tensor, mask: torch.Tensor | None = None) -> SampledToken:
        """The next token from logits [vocabulary]; `mask` bool says which ones a grammar allows."""
        logits = logits.float()
        token = self._pick(self._changed(logits, mask))
        if self.count is not None and self.read is not None:
            self.count[token] += 1
            self.read[token] = True
            self.said.append(token)
        return self.with_logprobs(logits, token)

    def with_logprobs(self, logits: torch.Tensor, token: int) -> SampledToken:
        """A token with what the settings want to know of the model's own distribution."""
        if self.sampling.logprobs is None:
            return SampledToken(token)
        share = logits.float().log_softmax(-1)
        values, ids = share.topk(min(self.sampling.logprobs, len(share)))
        return SampledToken(token, float(share[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _changed(self, logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits with penalties, biases and a grammar's mask."""
        s = self.sampling
        if s.penalises or s.logit_bias or mask is not None:
            logits = logits.clone()
        if s.penalises:
            self._penalise(logits)
        for token, bias in s.logit_bias.items():
            if 0 <= token < len(logits):
                logits[token] += bias
        return logits if mask is None else logits.masked_fill_(~mask, -torch.inf)

    def _penalise(self, logits: torch.Tensor) -> None:
        """Repetition counts the prompt too (Keskar et al. 2019, arXiv 1909.05858); presence and frequency the answer, as OpenAI's."""
        s = self.sampling
        if self.read is None or self.count is None or s.repeat_last_n >= 0:
            self.read, self.count = self._window(len(logits))
        if s.repetition_penalty != 1:
            values = logits[self.read]
            logits[self.read] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        logits -= s.frequency_penalty * self.count + s.presence_penalty * (self.count > 0)

    def _window(self, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens stand in what penalties look back over, and how often those of the answer do."""
        most = self.sampling.repeat_last_n
        said = self.said[-most:] if most >= 0 else self.said
        before = list(self.prompt)
        if most >= 0:
            before = before[len(before) - min(len(before), most - len(said)) :]
        read = torch.zeros(vocabulary, dtype=torch.bool)
        read[torch.tensor([*before, *said], dtype=torch.int64)] = True
        return read, torch.bincount(torch.tensor(said, dtype=torch.int64), minlength=vocabulary).float()

    def _pick(self, logits: torch.Tensor) -> int:
        s = self.sampling
        if s.temperature == 0:
            return int(logits.argmax())
        values, ids = self._candidates(logits / s.temperature)
        share = (values - values.max()).double().exp()
        at = torch.searchsorted(
            share.cumsum(0), torch.rand((), generator=self.source, dtype=torch.float64) * share.sum()
        )
        place = int(at.clamp(max=len(share) - 1))
        return place if ids is None else int(ids[place])

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits and ids of the tokens that the cuts leave, likeliest first; all in their own order (ids None) when nothing is cut."""
        s = self.sampling
        if not (s.top_k or s.top_p < 1 or s.min_p or s.typical_p < 1):
            return logits, None
        values, ids = self._likeliest(logits)
        share = values.softmax(-1)
        if s.top_p < 1:
            whole = share if s.top_k else (values - logits.logsumexp(-1)).exp()
            values = values[: _least_one(whole.cumsum(-1) - whole < s.top_p)]
        if s.min_p:
            values = values[: _least_one((values - values[0]).exp() >= s.min_p)]
        if s.typical_p < 1:
            values, ids = _typical(values, ids[: len(values)], s.typical_p)
        return values, ids[: len(values)]

    def _likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As many of the likeliest tokens, in order, as the cuts can leave."""
        s, total = self.sampling, logits.logsumexp(-1)
        if s.top_k:
            return logits.topk(min(s.top_k, len(logits)))
        for count in (FIRST, MORE):
            if count >= len(logits) or s.typical_p < 1:
                break
            values, ids = logits.topk(count)
            if s.top_p < 1 and float((values - total).exp().sum()) >= s.top_p:
                return values, ids
            if s.min_p and float((values[-1] - values[0]).exp()) < s.min_p:
                return values, ids
        return logits.sort(descending=True)  # type: ignore[return-value]


def _least_one(keep: torch.Tensor) -> int:
    """How many of an ordered list a cut keeps, the first one always."""
    return max(1, int(keep.sum()))


def _typical(values: torch.Tensor, ids: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens whose surprise is nearest to the expected one, up to `mass` (Meister et al. 2022, arXiv 2202.00666)."""
    share = values.softmax(-1)
    surprise = -share.log()
    entropy = (share * surprise.nan_to_num(0.0, posinf=0.0)).sum()
    order = (surprise - entropy).abs().argsort()
    keep = order[: _least_one(share[order].cumsum(-1) - share[order] < mass)].sort().values
    return values[keep], ids[keep]
