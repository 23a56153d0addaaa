"""Sampling of the next token: a request's parameters (`SamplingParams`) and the state of one output (`Sampler`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ktx.errors import UsageError
from ktx.utils.deprecation import deprecated_members

RANGES = {  # inclusive range of each parameter
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
# How many of the most probable tokens are sorted before all are, because sorting a vocabulary takes ten milliseconds.
FIRST_TOPK, SECOND_TOPK = 256, 8192


@deprecated_members(penalises="penalizes")
@dataclass(frozen=True)
class SamplingParams:
    """How to sample; temperature 0 (the default) takes the most probable token.

    Filters apply in transformers' order: top_k, top_p, min_p, typical_p, each to the tokens that the previous one left.

    Args:
        temperature: divisor of the logits; 0: greedy.
        top_p: probability mass of the most probable tokens that stay; 1: off.
        top_k: number of the most probable tokens that stay; 0: off.
        min_p: minimum probability relative to the most probable token's; 0: off.
        typical_p: probability mass of the locally typical tokens that stay; 1: off.
        seed: seed of the random numbers; None: a random seed.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or output; 1: off.
        presence_penalty: subtracted from the logits of tokens in the output; 0: off.
        frequency_penalty: subtracted from a token's logit for each occurrence in the output; 0: off.
        logit_bias: token id -> number added to its logit.
        max_new_tokens: maximum number of output tokens.
        stop: texts that end the output.
        stop_ids: further token ids that end the output.
        ignore_eos: the model's end tokens do not end the output.
        min_tokens: nothing ends the output before it has so many tokens.
        repeat_last_n: number of latest tokens that penalties apply to; -1: all.
        hidden: token ids without text.
        include_stop: the text that ends the output is part of it.
        logprobs: number of the most probable tokens whose log-probabilities are reported with the sampled token's, from
            the model's own distribution, before any of these parameters; None: no log-probabilities.
        echo: reports the prompt's tokens with their log-probabilities too.
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
        """Raises UsageError for values out of range."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}, it must be from {low} to {high}")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise UsageError(f"seed is {self.seed}, it must fit 64 bits")
        if any(not math.isfinite(value) for value in self.logit_bias.values()):
            raise UsageError("logit_bias must contain finite numbers only")

    @property
    def penalizes(self) -> bool:
        """Whether a penalty is on."""
        changes = self.repetition_penalty != 1 or bool(self.presence_penalty) or bool(self.frequency_penalty)
        return changes and self.repeat_last_n != 0


@dataclass(frozen=True)
class SampledToken:
    """A token and, if requested, its log-probability and the most probable tokens' (id, log-probability), best
    first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Samples the tokens of one output. The same seed gives the same output whatever else is computed in the batch,
    because each token takes one random number.

    Args:
        sampling: the sampling parameters.
        prompt: token ids that the repetition penalty applies to.
    """

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int] = ()):
        """Seeds the random numbers of one output."""
        self.sampling, self.prompt = sampling, prompt
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed % (1 << 64))
        # Counters for the penalties, updated by each token; allocated when the first penalty applies.
        self.seen: torch.Tensor | None = None  # bool [vocabulary]: occurs in the prompt or the output
        self.output_counts: torch.Tensor | None = None  # f32 [vocabulary]: occurrences in the output
        self.output_ids: list[int] = []  # the output, where penalties apply to a part of it

    def sample(self, logits: torch.Tensor, mask: torch.Tensor | None = None) -> SampledToken:
        """Samples the next token from logits [vocabulary]; `mask`: bool [vocabulary] of the tokens that a grammar
        allows.
        """
        logits = logits.float()
        token = self._sample_id(self._adjust_logits(logits, mask))
        if self.output_counts is not None and self.seen is not None:
            self.output_counts[token] += 1
            self.seen[token] = True
            self.output_ids.append(token)
        return self.with_logprobs(logits, token)

    def with_logprobs(self, logits: torch.Tensor, token: int) -> SampledToken:
        """Returns a token with the requested log-probabilities of the model's own distribution."""
        if self.sampling.logprobs is None:
            return SampledToken(token)
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        return SampledToken(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _adjust_logits(self, logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Returns logits with penalties, biases and a grammar's mask applied.

        The given logits stay unchanged, because log-probabilities are those of the model's own distribution.
        """
        params = self.sampling
        if params.penalizes or params.logit_bias or mask is not None:
            logits = logits.clone()
        if params.penalizes:
            self._apply_penalties(logits)
        for token, bias in params.logit_bias.items():
            if 0 <= token < len(logits):
                logits[token] += bias
        return logits if mask is None else logits.masked_fill_(~mask, -torch.inf)

    def _apply_penalties(self, logits: torch.Tensor) -> None:
        """Applies the penalties in place. The repetition penalty includes the prompt (Keskar et al. 2019, arXiv
        1909.05858); presence and frequency penalties apply to the output alone, as OpenAI's.
        """
        params = self.sampling
        if self.seen is None or self.output_counts is None or params.repeat_last_n >= 0:
            self.seen, self.output_counts = self._count_recent(len(logits))
        if params.repetition_penalty != 1:
            values = logits[self.seen]
            logits[self.seen] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        logits -= params.frequency_penalty * self.output_counts + params.presence_penalty * (self.output_counts > 0)

    def _count_recent(self, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns which tokens occur among the latest `repeat_last_n`, bool [vocabulary], and the output's occurrences
        in them, f32 [vocabulary].
        """
        last_n = self.sampling.repeat_last_n
        output_ids = self.output_ids[-last_n:] if last_n >= 0 else self.output_ids
        prompt = list(self.prompt)
        if last_n >= 0:
            prompt = prompt[len(prompt) - min(len(prompt), last_n - len(output_ids)) :]
        seen = torch.zeros(vocabulary, dtype=torch.bool)
        seen[torch.tensor([*prompt, *output_ids], dtype=torch.int64)] = True
        return seen, torch.bincount(torch.tensor(output_ids, dtype=torch.int64), minlength=vocabulary).float()

    def _sample_id(self, logits: torch.Tensor) -> int:
        """Samples a token id from logits [vocabulary]: inverse transform sampling, one random number per token."""
        params = self.sampling
        if params.temperature == 0:
            return int(logits.argmax())
        values, ids = self._filter_candidates(logits / params.temperature)
        weights = (values - values.max()).double().exp()
        index = torch.searchsorted(
            weights.cumsum(0), torch.rand((), generator=self.generator, dtype=torch.float64) * weights.sum()
        )
        position = int(index.clamp(max=len(weights) - 1))
        return position if ids is None else int(ids[position])

    def _filter_candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns logits and ids of the tokens that the filters leave, most probable first; without filters all logits
        in vocabulary order, and None.
        """
        params = self.sampling
        if not (params.top_k or params.top_p < 1 or params.min_p or params.typical_p < 1):
            return logits, None
        values, ids = self._take_most_probable(logits)
        probabilities = values.softmax(-1)
        if params.top_p < 1:
            # After top_k: among the tokens that it left. Otherwise among all tokens, of which `values` may be only the
            # most probable ones.
            model_probabilities = probabilities if params.top_k else (values - logits.logsumexp(-1)).exp()
            values = values[: _num_kept(model_probabilities.cumsum(-1) - model_probabilities < params.top_p)]
        if params.min_p:
            values = values[: _num_kept((values - values[0]).exp() >= params.min_p)]
        if params.typical_p < 1:
            values, ids = _filter_typical(values, ids[: len(values)], params.typical_p)
        return values, ids[: len(values)]

    def _take_most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits and ids of the most probable tokens, in order: at least all that the filters can leave.

        Sorting the whole vocabulary is slow, so a few are taken first; they suffice when the filters would cut even
        the last of them.
        """
        params, log_total = self.sampling, logits.logsumexp(-1)
        if params.top_k:
            return logits.topk(min(params.top_k, len(logits)))
        for count in (FIRST_TOPK, SECOND_TOPK):
            if count >= len(logits) or params.typical_p < 1:
                break
            values, ids = logits.topk(count)
            if params.top_p < 1 and float((values - log_total).exp().sum()) >= params.top_p:
                return values, ids
            if params.min_p and float((values[-1] - values[0]).exp()) < params.min_p:
                return values, ids
        return logits.sort(descending=True)  # type: ignore[return-value]


def _num_kept(keep: torch.Tensor) -> int:
    """Returns how many tokens of an ordered list a filter leaves, at least the first."""
    return max(1, int(keep.sum()))


def _filter_typical(values: torch.Tensor, ids: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens whose surprisal is nearest to the entropy, up to a probability mass of `mass` (Meister et al.
    2022, arXiv 2202.00666).

    Args:
        values: logits, most probable first.
        ids: their token ids.
        mass: the `typical_p` of the request.

    Returns:
        Logits and ids of the tokens that stay, in the given order.
    """
    probabilities = values.softmax(-1)
    surprisal = -probabilities.log()
    entropy = (probabilities * surprisal.nan_to_num(0.0, posinf=0.0)).sum()
    by_distance = (surprisal - entropy).abs().argsort()
    kept_positions = (
        by_distance[: _num_kept(probabilities[by_distance].cumsum(-1) - probabilities[by_distance] < mass)]
        .sort()
        .values
    )
    return values[kept_positions], ids[kept_positions]
