"""Which runner serves a model: by its modules, and where nobody here has read the family by trying it on a few tokens.

A forward over several sequences asks much of a model: that its attention reads pages, that no other module looks at the mask or keeps a state,
that rotary code goes by positions. What does not keep that may raise, or answer nonsense.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ktx.cache.kv import GrowingLayer, KVCache
from ktx.engine.request import Request
from ktx.engine.runner import ModelRunner, SequentialRunner
from ktx.engine.sampler import SamplingParams
from ktx.engine.scheduler import ScheduledChunk
from ktx.errors import UsageError
from ktx.injection.rules import FILES
from ktx.model.self_test import NEAR_HALF, Cached, Fault, away, check, judged, undisturbed
from ktx.ops.recurrent import Recurrent
from ktx.utils.torch_defaults import torch_defaults

log = logging.getLogger("ktx.engine")
CHUNKS = ((4, 1), (3, 8), (1, 1))  # tokens of two sequences in three forwards


@torch_defaults()
def runner_for(model: Any, pages: int, captured: int = 0) -> ModelRunner:
    """The one that the model's modules allow; for `captured` see Runner. UsageError for a model that goes on from no past, SelfTestFailed where pages are misread."""
    known = model.config.model_type in FILES
    reason = _reads_no_pages(model) or ("" if known else _mismatch(ModelRunner(model, 2)))
    if known and not reason and model.ktx.self_test:
        check(model, OnPages(ModelRunner(model, 1)))
    elif model.ktx.self_test == "engine":
        check(model)
    if not reason:
        return ModelRunner(model, pages, captured)
    runner = SequentialRunner(model, pages) if known else _plain(model, pages)
    runner.reason = reason
    return runner


def _plain(model: Any, pages: int) -> SequentialRunner:
    runner = SequentialRunner(model, pages)
    for in_chunks in (True, False):
        runner.in_chunks = in_chunks
        reason = _mismatch(runner)
        if not reason:
            return runner
        log.info("prompts in several forwards: %s" if in_chunks else "answers: %s", reason)
    raise UsageError(
        f"an engine cannot serve this {model.config.model_type}: {reason}; model.generate computes it as transformers does"
    )


def _reads_no_pages(model: Any) -> str:
    """The module that does not read pages, in words; empty if all do."""
    for path, module in model.named_modules():
        attends = "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx")
        if attends and not isinstance(module, Recurrent) and not getattr(module, "ours", False):
            return f"{path} is transformers' own {type(module).__name__}"
    layers = KVCache(model.config).layers
    own = {module.layer_idx for module in model.modules() if isinstance(module, Recurrent)}
    odd = [i for i, layer in enumerate(layers) if not isinstance(layer, GrowingLayer) and i not in own]
    return f"layer {odd[0]} keeps a {type(layers[odd[0]]).__name__}" if odd else ""


@torch.inference_mode()
def _mismatch(runner: ModelRunner) -> str:
    """What is wrong with the logits of two sequences whose tokens come in CHUNKS; empty if they are as those of whole sequences."""
    with undisturbed(runner.model):
        return judged(lambda number: _tried(runner, number))


def _tried(runner: ModelRunner, number: int) -> Fault | None:
    size = runner.model.config.vocab_size
    lora = runner.adapters.in_use
    requests = [Request([], SamplingParams(), lambda event: None, id=-1 - i, pages=[i], lora=lora) for i in range(2)]
    for i, request in enumerate(requests):
        request.prompt = [
            (7 * i + 5 * j + 3 + 11 * number) % size for j in range(sum(chunk[i] for chunk in CHUNKS[:2]))
        ]
        request.ids = list(request.prompt)
    try:
        return _compared(runner, requests)
    except Exception as error:  # a family's own code, given what it may not expect
        return Fault(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}", True)
    finally:
        for request in requests:
            runner.forget(request)


def _compared(runner: ModelRunner, requests: Sequence[Request]) -> Fault | None:
    for step, counts in enumerate(CHUNKS):
        if step == len(CHUNKS) - 1:
            for request in requests:
                request.ids.append(request.prompt[0])
        parts = [
            ScheduledChunk(request, request.num_computed, count)
            for request, count in zip(requests, counts, strict=True)
        ]
        found = runner.run(parts)
        for part in parts:
            part.request.num_computed += part.count
    for request in requests:
        whole = Cached(runner.model)(request.ids, 0)[-1]  # from a cache of the same type: what that rounds is no fault
        far = away(found[request][-1], whole)
        if (
            not far <= NEAR_HALF
        ):  # of another sequence's past it is all of it; that it is little was seen when the model was loaded
            return Fault(f"logits are {far:.1%} away from those of the whole sequence")
    return None


class OnPages:
    """Forwards of one sequence on a runner's pages, as ktx.model.self_test asks for them."""

    def __init__(self, runner: ModelRunner):
        self.runner = runner

    def __call__(self, ids: list[int], past: int) -> torch.Tensor:
        lora, logits_of_all = self.runner.adapters.in_use, SamplingParams(echo=True)
        asked = Request(ids, logits_of_all, lambda event: None, id=-1, pages=[0], lora=lora)
        if past and self.runner.recurrent:  # its state has seen what comes now
            self.runner.run([ScheduledChunk(asked, 0, past)])
        try:
            return self.runner.run([ScheduledChunk(asked, past, len(ids) - past)])[asked]
        finally:
            self.runner.forget(asked)
