"""Selects the runner of a model: by its modules, and for an unknown model family by a trial on a few tokens.

A forward over several sequences has many requirements: attention reads the paged cache, no other module uses the mask
or has a state, rotary embeddings use the positions. A model that violates one may raise an error, or compute wrong
logits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ktx.cache.kv import GrowingLayer, KVCache
from ktx.engine.request import Request
from ktx.engine.runner import ModelRunner, SequentialRunner
from ktx.engine.sampler import SamplingParams
from ktx.engine.scheduler import ScheduledChunk
from ktx.errors import UsageError
from ktx.families import RULE_FILES
from ktx.model.self_test import MAX_DISTANCE_HALF, CachedForward, Fault, check, judge, relative_distance, restore_state
from ktx.ops.recurrent import Recurrent
from ktx.utils.torch_defaults import torch_defaults

if TYPE_CHECKING:
    from ktx.model.loaded import LoadedModel

log = logging.getLogger("ktx.engine")
CHUNKS = ((4, 1), (3, 8), (1, 1))  # tokens of two sequences in each of three forwards


@torch_defaults()
def select_runner(model: LoadedModel, pages: int, max_captured_requests: int = 0) -> ModelRunner:
    """Returns the runner that the model's modules allow. ModelRunner, which batches sequences, requires that all layers
    use the paged cache and, in an unknown family, that a trial gives the right logits; otherwise a SequentialRunner.

    Args:
        model: a model loaded by ktx.
        pages: pages of the KV cache.
        max_captured_requests: see ModelRunner.

    Raises:
        UsageError: the model cannot continue from a cache.
        SelfTestFailed: the model computes wrong logits on pages.
    """
    known_family = model.config.model_type in RULE_FILES
    # the trial computes two sequences, the self-test one, each on a page of its own
    reason = _find_unsupported_layer(model) or ("" if known_family else _find_mismatch(ModelRunner(model, 2)))
    if known_family and not reason and model.ktx.self_test:
        check(model, PagedForward(ModelRunner(model, 1)))
    elif model.ktx.self_test == "engine":  # `ktx.load` has left the self-test to the engine
        check(model)
    if not reason:
        return ModelRunner(model, pages, max_captured_requests)
    runner = SequentialRunner(model, pages) if known_family else _make_sequential_runner(model, pages)
    runner.sequential_reason = reason
    return runner


def _make_sequential_runner(model: LoadedModel, pages: int) -> SequentialRunner:
    """Returns a SequentialRunner for an unknown model family, with chunked prompts if the model's logits allow it.

    Raises:
        UsageError: not even decode steps after a prompt in one forward give the logits of the complete sequence.
    """
    runner = SequentialRunner(model, pages)
    for in_chunks in (True, False):
        runner.in_chunks = in_chunks
        reason = _find_mismatch(runner)
        if not reason:
            return runner
        log.info("chunked prompts: %s" if in_chunks else "decoding: %s", reason)
    raise UsageError(
        f"an engine cannot serve this {model.config.model_type}: {reason}; "
        "model.generate computes it as transformers does"
    )


def _find_unsupported_layer(model: LoadedModel) -> str:
    """Returns a description of a module or layer that does not use the paged cache; empty if all do."""
    for path, module in model.named_modules():
        is_attention = "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx")
        if is_attention and not isinstance(module, Recurrent) and not getattr(module, "uses_ktx_kernel", False):
            return f"{path} is transformers' own {type(module).__name__}"
    layers = KVCache(model.config).layers
    recurrent = {module.layer_idx for module in model.modules() if isinstance(module, Recurrent)}
    unsupported = [i for i, layer in enumerate(layers) if not isinstance(layer, GrowingLayer) and i not in recurrent]
    return f"layer {unsupported[0]} has a cache of type {type(layers[unsupported[0]]).__name__}" if unsupported else ""


@torch.inference_mode()
def _find_mismatch(runner: ModelRunner) -> str:
    """Returns what is wrong with the logits of two sequences whose tokens are computed in CHUNKS; empty if they equal
    those of whole sequences.
    """
    with restore_state(runner.model):
        return judge(lambda number: _run_trial(runner, number))


def _run_trial(runner: ModelRunner, number: int) -> Fault | None:
    """Computes two sequences in CHUNKS and compares their logits; returns the fault, None if there is none.

    `number` is the number of the trial; each trial has other token ids.
    """
    size = runner.model.config.vocab_size
    lora = runner.adapters.in_use
    requests = [Request([], SamplingParams(), lambda event: None, id=-1 - i, pages=[i], lora=lora) for i in range(2)]
    for i, request in enumerate(requests):
        # arbitrary ids, other ones in each sequence and trial; the last of CHUNKS computes an output token
        request.prompt = [
            (7 * i + 5 * j + 3 + 11 * number) % size for j in range(sum(chunk[i] for chunk in CHUNKS[:2]))
        ]
        request.ids = list(request.prompt)
    try:
        return _compare(runner, requests)
    except Exception as error:  # code of an unknown family may fail in any way
        return Fault(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}", certain=True)
    finally:
        for request in requests:
            runner.free(request)


def _compare(runner: ModelRunner, requests: Sequence[Request]) -> Fault | None:
    """Returns a fault if the chunked logits differ from those of the whole sequence.

    The last of CHUNKS is a decode step, so each sequence gets one output token before it.
    """
    for step, counts in enumerate(CHUNKS):
        if step == len(CHUNKS) - 1:
            for request in requests:
                request.ids.append(request.prompt[0])
        chunks = [
            ScheduledChunk(request, request.num_computed, count)
            for request, count in zip(requests, counts, strict=True)
        ]
        logits = runner.run(chunks)
        for chunk in chunks:
            chunk.request.num_computed += chunk.count
    for request in requests:
        # with a cache of the same type, whose rounding is no fault
        expected = CachedForward(runner.model)(request.ids, 0)[-1]
        rel_error = relative_distance(logits[request][-1], expected)
        # The past of another sequence changes all of the logits; small errors were checked when the model was loaded.
        if not rel_error <= MAX_DISTANCE_HALF:
            return Fault(f"logits are {rel_error:.1%} away from those of the whole sequence")
    return None


class PagedForward:
    """Forwards of one sequence on a runner's pages, in the form that ktx.model.self_test calls."""

    def __init__(self, runner: ModelRunner):
        self.runner = runner

    def __call__(self, ids: list[int], past: int) -> torch.Tensor:
        """Returns the logits of `ids` after the first `past` of them, which are already in the cache. The self-test
        compares them with expected ones.
        """
        lora, logits_of_all = self.runner.adapters.in_use, SamplingParams(echo=True)
        request = Request(ids, logits_of_all, lambda event: None, id=-1, pages=[0], lora=lora)
        if past and self.runner.recurrent:  # the recurrent state includes later tokens, so it is recomputed
            self.runner.run([ScheduledChunk(request, 0, past)])
        try:
            return self.runner.run([ScheduledChunk(request, past, len(ids) - past)])[request]
        finally:
            self.runner.free(request)
