"""Guesses by the model's own layer for multi-token prediction, see ktx.ops.mtp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ktx.cache.page_pool import PAGE_TOKENS
from ktx.cache.paged import BatchMetadata, SequenceSpan
from ktx.engine.request import Request
from ktx.engine.runner import ModelRunner
from ktx.engine.scheduler import ScheduledChunk
from ktx.kernels import cpu
from ktx.transformers_compat import cache_argument


class MTPDrafter:
    """Follows every forward, so that the layer has keys and values of all that the model has seen.

    They lie on the requests' own pages. On a page that is shared, those of its last token speak of another one's next token: guesses may
    be worse for it, answers are not.
    """

    def __init__(self, runner: ModelRunner):
        self.model, self.cache = runner.model, runner.cache
        self.body = self.model.get_decoder()
        self.hidden = torch.empty(0, dtype=torch.float32)
        self.hook = self.body.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        self.hidden = output[0]

    def close(self) -> None:
        self.hook.remove()

    @torch.inference_mode()
    def draft(
        self, done: Sequence[tuple[ScheduledChunk, int]], most: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        rows, ids, spans, at = [], list[int](), [], 0
        for part, kept in done:
            request, end = part.request, part.start + kept
            if kept and len(request.ids) > end:
                rows.append(self.hidden[0, at : at + kept])
                ids += request.ids[part.start + 1 : end + 1]
                prompt = max(0, min(kept, len(request.prompt) - part.start))
                spans.append((request, SequenceSpan(request.id, part.start, kept, request.pages, prompt)))
            at += part.count
        if not spans:
            return {}
        states = self._step(torch.cat(rows), ids, [span for _, span in spans])
        last, first = {}, 0
        for request, span in spans:
            first += span.count
            if most.get(request):
                last[request] = states[first - 1]
        return self._drafts(last, most)

    def _drafts(self, last: dict[Request, torch.Tensor], most: Mapping[Request, int]) -> dict[Request, list[int]]:
        """`last`: the layer's own state of each request's last computed token, from which it goes on by itself."""
        drafts: dict[Request, list[int]] = {request: [] for request in last}
        while last:
            chosen = self.model.lm_head(torch.stack(list(last.values()))[None])[0].argmax(-1).tolist()
            spans, rows = [], []
            for (request, state), token in zip(list(last.items()), chosen, strict=True):
                draft = drafts[request]
                draft.append(token)
                at = request.num_computed + len(draft) - 1
                if len(draft) >= most[request] or at >= len(request.pages) * PAGE_TOKENS:
                    del last[request]
                    continue
                spans.append((request, SequenceSpan(request.id, at, 1, request.pages)))
                rows.append(state)
            if not spans:
                break
            ids = [drafts[request][-1] for request, _ in spans]
            states = self._step(torch.stack(rows), ids, [span for _, span in spans])
            last = {request: state for (request, _), state in zip(spans, states, strict=True)}
        return drafts

    def _step(self, hidden: torch.Tensor, following: Sequence[int], spans: Sequence[SequenceSpan]) -> torch.Tensor:
        """States [tokens, D] and the ids that follow them -> the layer's states [tokens, D]."""
        batch = self.cache.batch = BatchMetadata(spans)
        embeds = self.body.embed_tokens(torch.tensor([following]))
        try:
            with cpu.bf16_rows(batch.tokens, batch.wide()):
                states = self.model.mtp(
                    embeds,
                    hidden[None].to(embeds.dtype),
                    position_ids=batch.position_ids,
                    position_embeddings=self.body.rotary_emb(embeds, batch.position_ids),
                    **cache_argument(self.model.mtp.layer, self.cache),
                    attention_mask=None,
                    use_cache=True,
                )
        finally:
            self.cache.batch = None
        return states[0]
