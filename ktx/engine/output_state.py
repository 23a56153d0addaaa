"""One request's answer while it grows: choosing, detokenising, stopping."""

from __future__ import annotations

import time
from typing import Any

import torch

from ktx.engine.detokenizer import Detokenizer, StopChecker
from ktx.engine.request import Finished, PromptLogprobs, Reason, Request, TokenEvent
from ktx.engine.sampler import SampledToken, Sampler
from ktx.engine.scheduler import ScheduledChunk


class OutputState:
    """What the engine keeps of a request beside its place in the queue."""

    def __init__(self, request: Request, tokenizer: Any, stop_ids: frozenset[int], context: int):
        self.request, self.context = request, context
        self.chooser = Sampler(request.sampling, request.prompt)
        self.words = Detokenizer(tokenizer, request.sampling.hidden)
        self.finder = StopChecker(request.sampling.stop, request.sampling.include_stop)
        self.tail = ""  # the text of the token that ended the answer, where it is part of it
        own = frozenset(request.sampling.stop_ids)
        self.stop_ids = own if request.sampling.ignore_eos else stop_ids | own
        self.stopped_by: str | int | None = None
        self.last: SampledToken | None = None  # the token that ended the answer
        self.prompt_choices: list[SampledToken] = [SampledToken(request.prompt[0])] if request.sampling.echo else []
        self.prompt_sent = False
        self.done: Reason | None = None

    def process_logits(self, part: ScheduledChunk, logits: torch.Tensor) -> tuple[int, Reason | None]:
        """What follows from a part's logits: how many of its tokens stay in the cache, and why the answer ends if it does."""
        request = self.request
        if request.sampling.echo and part.start < len(request.prompt):
            self._tell_prompt(part, logits)
            logits = logits[-1:]
        if part.start + part.count < len(request.ids):
            return part.count, None
        if not request.sampling.max_new_tokens:
            return part.count, "length"
        drafted, request.draft = request.draft, []
        kept = part.count - len(drafted)
        for i, row in enumerate(logits):
            choice = self.chooser.sample(row, self._allowed(len(row)))
            self.done = self._append_token(choice)
            if self.done or i >= len(drafted) or choice.token != drafted[i]:
                break
            kept += 1
        request.drafted += len(drafted)
        request.accepted += kept - (part.count - len(drafted))
        return kept, self.done

    def _allowed(self, vocabulary: int) -> torch.Tensor | None:
        """bool [vocabulary] of what may come next, by the grammar and because the answer is too short to end. None: anything."""
        constraint = self.request.constraint
        mask = None if constraint is None else constraint.mask()
        if self.request.num_output >= self.request.sampling.min_tokens:
            return mask
        longer = torch.ones(vocabulary, dtype=torch.bool) if mask is None else mask.clone()
        longer[[token for token in self.stop_ids if token < vocabulary]] = False
        return longer if longer.any() else mask  # a grammar that allows nothing but the end has the last word

    def _tell_prompt(self, part: ScheduledChunk, logits: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens: a row speaks of the token that follows it. Those of a part that is computed again are known."""
        prompt, known = self.request.prompt, len(self.prompt_choices)
        if known == len(prompt) and self.prompt_sent:
            return
        at = known - 1 - part.start  # the row that speaks of the first token not known yet
        self.prompt_choices += [
            self.chooser.with_logprobs(row, token) for row, token in zip(logits[at:], prompt[known:], strict=False)
        ]
        if part.start + part.count >= len(prompt):
            self.prompt_sent = True
            self.request.on_event(PromptLogprobs(self.prompt_choices))

    def _append_token(self, choice: SampledToken) -> Reason | None:
        """Adds a token to the answer and tells of it; why the answer ends, if it does."""
        request, token = self.request, choice.token
        if request.first_token is None:
            request.first_token = time.perf_counter()
        if token in self.stop_ids:
            self.stopped_by, self.last = token, choice
            self.tail = self.words.feed(token) if request.sampling.include_stop else ""
            return "stop"
        request.ids.append(token)
        if request.constraint is not None:
            request.constraint.accept(token)
        text = self.words.feed(token)
        if request.num_output >= request.sampling.min_tokens:  # before, no text ends it
            text = self.finder.feed(text)
        request.on_event(TokenEvent(text, choice))
        if self.finder.found is not None:
            self.stopped_by = self.finder.found
            return "stop"
        if request.constraint is not None and request.constraint.ended:
            return "stop"
        full = request.num_output >= request.sampling.max_new_tokens or len(request.ids) >= self.context
        return "length" if full else None

    def finish(self, reason: Reason, error: str = "", refused: bool = False) -> Finished:
        """Tells what was held back, and that this was all."""
        text = ""
        if self.finder.found is None:
            text = self.finder.feed(self.words.flush()) + self.finder.flush() + self.tail
        if self.finder.found is not None and reason == "length":
            reason, self.stopped_by = "stop", self.finder.found
        request = self.request
        ids, usage = request.ids[len(request.prompt) :], request.usage()
        finished = Finished(reason, text, ids, usage, self.stopped_by, error, self.last, refused)
        request.on_event(finished)
        return finished
