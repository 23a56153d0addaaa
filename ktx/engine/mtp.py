"""Draft tokens from the model's own layer for multi-token prediction (MTP), see ktx.ops.mtp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.engine.request import Request
from ktx.engine.runner import ModelRunner
from ktx.engine.scheduler import ScheduledChunk
from ktx.transformers_compat import cache_argument


class MTPDrafter:
    """Runs the MTP layer after every forward, so that the layer has keys and values of all tokens that the model has
    computed.

    They are on the requests' own pages. On a shared page, the entry of its last token was computed with another
    sequence's next token: that may make draft tokens worse, but never changes outputs.
    """

    def __init__(self, runner: ModelRunner):
        self.model, self.cache = runner.model, runner.cache
        self.body = self.model.get_decoder()
        self.hidden = torch.empty(0, dtype=torch.float32)
        self.hook = self.body.register_forward_hook(self._save_hidden)

    def _save_hidden(self, module: Any, args: Any, output: Any) -> None:
        """Forward hook: stores the decoder's hidden states."""
        self.hidden = output[0]

    def close(self) -> None:
        """Removes the forward hook."""
        self.hook.remove()

    @torch.inference_mode()
    def draft(
        self, results: Sequence[tuple[ScheduledChunk, int]], max_drafts: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        """Runs the MTP layer on the tokens that verification left in the KV cache, because it needs keys and values of
        all of them, and returns up to `max_drafts[request]` draft tokens for each request.

        `results`: the computed chunks, each with the number of its tokens that stay in the cache (`Drafter.draft`).
        """
        # The MTP layer reads, for each token that stays in the cache, the decoder's hidden state and the id of the next
        # token. Where the last token has no next one, the request has ended, so its chunk is skipped.
        rows, ids, spans, first_row = [], list[int](), [], 0
        for chunk, num_kept in results:
            request, end = chunk.request, chunk.start + num_kept
            if num_kept and len(request.ids) > end:
                rows.append(self.hidden[0, first_row : first_row + num_kept])
                ids += request.ids[chunk.start + 1 : end + 1]
                num_prompt_tokens = max(0, min(num_kept, len(request.prompt) - chunk.start))
                spans.append(
                    (request, SequenceSpan(request.id, chunk.start, num_kept, request.pages, num_prompt_tokens))
                )
            first_row += chunk.count
        if not spans:
            return {}
        states = self._run_layer(torch.cat(rows), ids, [span for _, span in spans])
        last_states, end_row = {}, 0  # request -> the state of its last computed token
        for request, span in spans:
            end_row += span.count
            if max_drafts.get(request):
                last_states[request] = states[end_row - 1]
        return self._draft_tokens(last_states, max_drafts)

    def _draft_tokens(
        self, last_states: dict[Request, torch.Tensor], max_drafts: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        """Drafts autoregressively, one token per round for all requests; a request leaves when its draft has its
        maximum length or its pages are full.

        Args:
            last_states: the MTP layer's state of each request's last computed token.
            max_drafts: the maximum number of draft tokens of each request.
        """
        drafts: dict[Request, list[int]] = {request: [] for request in last_states}
        while last_states:
            tokens = self.model.lm_head(torch.stack(list(last_states.values()))[None])[0].argmax(-1).tolist()
            spans, rows = [], []
            for (request, state), token_id in zip(list(last_states.items()), tokens, strict=True):
                draft = drafts[request]
                draft.append(token_id)
                position = request.num_computed + len(draft) - 1
                if len(draft) >= max_drafts[request] or position >= len(request.pages) * PAGE_TOKENS:
                    del last_states[request]
                    continue
                spans.append((request, SequenceSpan(request.id, position, 1, request.pages)))
                rows.append(state)
            if not spans:
                break
            ids = [drafts[request][-1] for request, _ in spans]
            states = self._run_layer(torch.stack(rows), ids, [span for _, span in spans])
            last_states = {request: state for (request, _), state in zip(spans, states, strict=True)}
        return drafts

    def _run_layer(self, hidden: torch.Tensor, next_ids: Sequence[int], spans: Sequence[SequenceSpan]) -> torch.Tensor:
        """Computes the MTP layer's states [tokens, D] from the decoder's hidden states [tokens, D] and, for each token,
        the id of the token that follows it.
        """
        batch = BatchMetadata(spans)
        embeds = self.body.embed_tokens(torch.tensor([next_ids]))
        with self.cache.forward(batch, batch.full_page_rows()):
            states = self.model.mtp(
                embeds,
                hidden[None].to(embeds.dtype),
                position_ids=batch.position_ids,
                position_embeddings=self.body.rotary_emb(embeds, batch.position_ids),
                **cache_argument(self.model.mtp.layer, self.cache),
                attention_mask=None,
                use_cache=True,
            )
        token_states: torch.Tensor = states[0]
        return token_states
