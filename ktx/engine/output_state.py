"""One request's output while it grows: sampling, detokenizing, stopping."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from ktx.engine.detokenizer import Detokenizer, StopChecker
from ktx.engine.request import Finished, PromptLogprobs, Reason, Request, TokenEvent
from ktx.engine.sampler import SampledToken, Sampler
from ktx.engine.scheduler import ScheduledChunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OutputState:
    """The output of one request: samples its tokens, detokenizes them, checks for its end and emits its events.

    A restart after a preemption does not touch it: recomputed tokens are neither sampled nor emitted again.
    """

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], context: int):
        """Starts an empty output. `stop_ids` are the model's end tokens, `context` is its maximum length in tokens."""
        self.request, self.context = request, context
        self.sampler = Sampler(request.sampling, request.prompt)
        self.detokenizer = Detokenizer(tokenizer, request.sampling.hidden)
        self.stop_checker = StopChecker(request.sampling.stop, request.sampling.include_stop)
        self.stop_text = ""  # text of the end token, where `include_stop` emits it
        request_stop_ids = frozenset(request.sampling.stop_ids)
        self.stop_ids = request_stop_ids if request.sampling.ignore_eos else stop_ids | request_stop_ids
        self.stopped_by: str | int | None = None
        self.end_token: SampledToken | None = None  # the token that ended the output, which is not in its ids
        # with `echo`: the prompt's tokens with log-probabilities as far as they are computed; the first one has none
        self.prompt_tokens: list[SampledToken] = [SampledToken(request.prompt[0])] if request.sampling.echo else []
        self.prompt_sent = False
        self.reason: Reason | None = None

    def process_logits(self, chunk: ScheduledChunk, logits: torch.Tensor) -> tuple[int, Reason | None]:
        """Samples from a chunk's logits.

        Args:
            chunk: the computed chunk.
            logits: [rows, vocabulary] of its last tokens, see `runner.num_logits`.

        Returns:
            How many of the chunk's tokens stay in the cache, and why the output ends, None if it continues.
        """
        request = self.request
        if request.sampling.echo and chunk.start < len(request.prompt):
            self._emit_prompt_logprobs(chunk, logits)
            logits = logits[-1:]
        if chunk.start + chunk.count < len(request.ids):  # not the end of its ids yet, so nothing is sampled
            return chunk.count, None
        if not request.sampling.max_new_tokens:  # only the prompt was requested
            return chunk.count, "length"
        # Row i gives the token after draft token i - 1. Sampling goes on while it confirms the next draft token.
        drafted, request.draft = request.draft, []
        num_kept = chunk.count - len(drafted)
        for i, row in enumerate(logits):
            sampled = self.sampler.sample(row, self._token_mask(len(row)))
            self.reason = self._append_token(sampled)
            if self.reason or i >= len(drafted) or sampled.token != drafted[i]:
                break
            num_kept += 1
        request.drafted += len(drafted)
        request.accepted += num_kept - (chunk.count - len(drafted))
        return num_kept, self.reason

    def _token_mask(self, vocabulary: int) -> torch.Tensor | None:
        """Returns a mask bool [vocabulary] of the tokens that the grammar and `min_tokens` allow; None: all."""
        constraint = self.request.constraint
        mask = None if constraint is None else constraint.mask()
        if self.request.num_output >= self.request.sampling.min_tokens:
            return mask
        without_stop = torch.ones(vocabulary, dtype=torch.bool) if mask is None else mask.clone()
        without_stop[[token for token in self.stop_ids if token < vocabulary]] = False
        return without_stop if without_stop.any() else mask  # a grammar that allows only the end overrides `min_tokens`

    def _emit_prompt_logprobs(self, chunk: ScheduledChunk, logits: torch.Tensor) -> None:
        """Computes log-probabilities of the prompt's tokens and emits them when they are complete: a row belongs to the
        token that follows it. A chunk that is recomputed adds none.
        """
        prompt, num_known = self.request.prompt, len(self.prompt_tokens)
        if num_known == len(prompt) and self.prompt_sent:
            return
        first_row = num_known - 1 - chunk.start  # the row of the first token without a log-probability
        self.prompt_tokens += [
            self.sampler.with_logprobs(row, token)
            for row, token in zip(logits[first_row:], prompt[num_known:], strict=False)
        ]
        if chunk.start + chunk.count >= len(prompt):
            self.prompt_sent = True
            self.request.on_event(PromptLogprobs(self.prompt_tokens))

    def _append_token(self, sampled: SampledToken) -> Reason | None:
        """Appends a token to the output and emits its event. Returns why the output ends, None if it continues."""
        request, token = self.request, sampled.token
        if request.first_token is None:
            request.first_token = time.perf_counter()
        if token in self.stop_ids:
            self.stopped_by, self.end_token = token, sampled
            self.stop_text = self.detokenizer.feed(token) if request.sampling.include_stop else ""
            return "stop"
        request.ids.append(token)
        if request.constraint is not None:
            request.constraint.accept(token)
        text = self.detokenizer.feed(token)
        if request.num_output >= request.sampling.min_tokens:  # until then stop strings are ignored
            text = self.stop_checker.feed(text)
        request.on_event(TokenEvent(text, sampled))
        if self.stop_checker.found is not None:
            self.stopped_by = self.stop_checker.found
            return "stop"
        if request.constraint is not None and request.constraint.ended:
            return "stop"
        full = request.num_output >= request.sampling.max_new_tokens or len(request.ids) >= self.context
        return "length" if full else None

    def finish(self, reason: Reason, error: str = "", client_error: bool = False) -> Finished:
        """Emits and returns the request's last event, which has the text that was held back until now."""
        text = ""
        if self.stop_checker.found is None:
            text = self.stop_checker.feed(self.detokenizer.flush()) + self.stop_checker.flush() + self.stop_text
        if self.stop_checker.found is not None and reason == "length":  # the held-back text completes a stop string
            reason, self.stopped_by = "stop", self.stop_checker.found
        request = self.request
        finished = Finished(
            reason=reason,
            text=text,
            ids=request.ids[len(request.prompt) :],
            usage=request.usage(),
            stop=self.stopped_by,
            error=error,
            end_token=self.end_token,
            client_error=client_error,
        )
        request.on_event(finished)
        return finished
