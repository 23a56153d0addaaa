"""Choosing the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ktx.errors import UsageError

LIMITS = {  # inclusive range of each setting
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1 << 30),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "max_new_tokens": (1, 1 << 30),
}


@dataclass
class Sampling:
    """How to choose; temperature 0 (the default) takes the likeliest token. `top_k` 0 and `top_p` 1 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = 1000
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}, it must be from {low} to {high}")

    def generator(self) -> torch.Generator:
        """The random source of one answer: the same seed gives the same answer."""
        source = torch.Generator()
        if self.seed is None:
            source.seed()
        else:
            source.manual_seed(self.seed)
        return source

    def choose(self, logits: torch.Tensor, seen: Sequence[int], source: torch.Generator) -> int:
        """A token id from f32 logits [vocabulary], given the ids produced or read so far."""
        logits = self._penalised(logits.float(), seen)
        if self.temperature == 0:
            return int(logits.argmax())
        share = self._cut((logits / self.temperature).softmax(-1))
        return int(torch.multinomial(share, 1, generator=source))

    def _penalised(self, logits: torch.Tensor, seen: Sequence[int]) -> torch.Tensor:
        if not seen or (self.repetition_penalty == 1 and not self.presence_penalty and not self.frequency_penalty):
            return logits
        ids, counts = torch.tensor(list(seen)).unique(return_counts=True)
        values = logits[ids]
        values = torch.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
        logits = logits.clone()
        logits[ids] = values - self.presence_penalty - self.frequency_penalty * counts
        return logits

    def _cut(self, share: torch.Tensor) -> torch.Tensor:
        """Shares of the tokens that top_k, top_p and min_p leave, in that order; the likeliest always stays."""
        ordered, ids = share.sort(descending=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_k:
            keep[self.top_k :] = False
        if self.top_p < 1:
            keep &= ordered.cumsum(-1) - ordered < self.top_p
        if self.min_p:
            keep &= ordered >= self.min_p * ordered[0]
        keep[0] = True
        return torch.zeros_like(share).scatter(0, ids, ordered * keep)
