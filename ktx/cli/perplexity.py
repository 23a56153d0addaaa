"""`ktx verify --perplexity FILE`: perplexity of a model on a text, and its KL divergence from a reference."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ktx.cli.arguments import infer_model, load_arguments, lora_option, model_options, options_of, reject_options
from ktx.errors import BadFile, UsageError

MAX_REFERENCE_BYTES = 1 << 33  # of the reference model's log-probabilities, which stay in memory


def run(args: argparse.Namespace) -> int:
    """Measures perplexity on the text: of the given model, or without one of the demo model in every format."""
    text = read_text(args.perplexity)
    if args.window < 2:
        raise UsageError(f"--window {args.window}: a window needs at least 2 tokens")
    if not infer_model(args):
        if args.against:
            raise UsageError(
                "--against needs --model or --weights; the demo model is always compared with its own BF16 weights"
            )
        reject_options(
            args,
            options_of(model_options, adapters_option),
            "needs --model or --weights; the demo model is measured in every format without other options",
        )
        _measure_demo(args, text)
        return 0
    import ktx

    def load(weights: str | None) -> tuple[Any, Any]:
        return ktx.load(args.model, weights, args.rules, **load_arguments(args))

    reference = None
    if args.against:
        reference = Reference(*load(args.against), text, args)
    model, tokenizer = load(args.weights)
    _print_rows(args, [score(str(args.weights or args.model), model, tokenizer, text, args, reference)])
    return 0


def adapters_option(parser: argparse.ArgumentParser) -> None:
    """Adds the --lora option of `ktx verify`."""
    lora_option(parser, "the sum of all adapters is applied, with --perplexity only")


def read_text(path: str) -> str:
    """Reads a text file; raises BadFile if it cannot be read or is not valid UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: not valid UTF-8, byte {error.start} is {error.object[error.start]:#04x}") from error


def split_windows(tokenizer: Any, text: str, args: argparse.Namespace) -> Iterator[list[int]]:
    """Yields the text's token ids in windows of one forward each, which begin with the BOS token if there is one.

    Raises:
        UsageError: the text has too few tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: args.tokens or None]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if len(ids) + len(bos) < 2:
        raise UsageError(f"{args.perplexity}: too short to measure perplexity, it has {len(ids)} tokens")
    step = args.window - len(bos)
    for start in range(0, len(ids), step):
        window = bos + ids[start : start + step]
        if len(window) > 1:
            yield window


def compute_log_probabilities(model: Any, ids: list[int]) -> Any:
    """Returns the log-probabilities of each token after the first: f32 [len(ids) - 1, vocabulary]."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


class Reference:
    """The reference model's log-probabilities on the same windows, in f16, and its most probable tokens."""

    def __init__(self, model: Any, tokenizer: Any, text: str, args: argparse.Namespace):
        """Computes the reference model's log-probabilities of all windows, with which `score` compares another model's.

        Raises UsageError if they would need too much memory.
        """
        all_windows = list(split_windows(tokenizer, text, args))
        needed_bytes = 2 * model.config.vocab_size * sum(len(window) - 1 for window in all_windows)  # in f16
        if needed_bytes > MAX_REFERENCE_BYTES:
            raise UsageError(
                f"{needed_bytes / 1e9:.1f} GB of log-probabilities would have to be stored to compare with"
                f" {args.against}; give --tokens"
                f" {int(args.tokens or MAX_REFERENCE_BYTES / 2 / model.config.vocab_size)} or fewer"
            )
        self.log_probs, self.top_tokens = [], []
        for window in all_windows:
            log_probs = compute_log_probabilities(model, window)
            self.log_probs.append(log_probs.half())
            self.top_tokens.append(log_probs.argmax(-1))


def score(
    name: str, model: Any, tokenizer: Any, text: str, args: argparse.Namespace, reference: Reference | None
) -> dict[str, Any]:
    """Measures a model on the text.

    Returns:
        Perplexity and its standard error; with a reference also the mean KL divergence from it, and how often both
        models' most probable token is the same (`same_token`).
    """
    import torch

    losses: list[Any] = []
    divergences: list[Any] = []
    same_token: list[Any] = []
    start = time.perf_counter()
    for i, window in enumerate(split_windows(tokenizer, text, args)):
        log_probs = compute_log_probabilities(model, window)
        losses.append(-log_probs.gather(1, torch.tensor(window[1:])[:, None])[:, 0])
        if reference is not None:
            reference_log_probs = reference.log_probs[i].float()
            divergences.append((reference_log_probs.exp() * (reference_log_probs - log_probs)).sum(-1))
            same_token.append((reference.top_tokens[i] == log_probs.argmax(-1)).float())
    loss = torch.cat(losses)
    row = {
        "model": name,
        "perplexity": math.exp(loss.mean().item()),
        "standard_error": math.exp(loss.mean().item()) * loss.std().item() / math.sqrt(len(loss)),
        "tokens": len(loss),
        "seconds": time.perf_counter() - start,
    }
    if reference is not None:
        row |= {
            "kl_divergence": max(0.0, torch.cat(divergences).mean().item()),
            "same_token": torch.cat(same_token).mean().item(),
        }
    return row


def _measure_demo(args: argparse.Namespace, text: str) -> None:
    """Measures the demo model in every format, written as GGUF or quantized on loading.

    The reference is the model's BF16 weights in transformers.
    """
    from ktx import demo
    from ktx.demo.evaluate import load_reference

    folder = demo.path()
    reference = Reference(*load_reference(folder), text, args)
    rows = []
    for name, load in list_formats(folder):
        model, tokenizer = load()
        bits = 8 * model.ktx.bytes_per_token / active_weights(model)
        rows.append(score(name, model, tokenizer, text, args, reference) | {"bits": bits})
    _print_rows(args, rows)


def list_formats(folder: Path) -> Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]:
    """Yields name and loader of each format in which the demo model is measured.

    These are the GGUF types that need no importance matrix, Q4_K_M, and the integer types of `quantize=`.
    """
    import torch

    import ktx
    from ktx.demo.gguf_writer import write_gguf
    from ktx.quant.types import F8_CODE, QTYPES

    def load_written(mix: str) -> tuple[Any, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            write_gguf(folder, Path(scratch) / "demo.gguf", mix)
            return ktx.load(str(folder), weights=str(Path(scratch) / "demo.gguf"), progress=False)

    def load_quantized(dtype: str) -> tuple[Any, Any]:
        return ktx.load(str(folder), str(folder / "model.safetensors"), quantize=dtype, progress=False)

    for name, qtype in QTYPES.items():
        if qtype.code >= F8_CODE:  # ktx's own types: not in GGUF
            continue
        try:
            qtype.quantize(torch.zeros(1, 256))  # 256: a multiple of every block size
        except UsageError:  # needs an importance matrix
            continue
        yield name, lambda name=name: load_written(name)  # type: ignore[misc]
    yield "Q4_K_M", lambda: load_written("Q4_K_M")
    for dtype in ("int8", "int4g32", "int4g64", "int4g128"):
        yield dtype, lambda dtype=dtype: load_quantized(dtype)  # type: ignore[misc]


def active_weights(model: Any) -> int:
    """Returns the number of weights that one token is multiplied with, including the output layer's."""
    from ktx.cli.bench_ktx import active_params

    return active_params(model) + model.lm_head.in_features * model.lm_head.out_features


def _print_rows(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Prints a row per model as a table, or as JSON lines with --json."""
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return
    compared, bits = "kl_divergence" in rows[0], "bits" in rows[0]
    width = max(8, *(len(row["model"]) for row in rows))
    header = (
        f"{'format' if bits else 'weights':{width}}" + (f"{'bits':>8}" if bits else "") + f"{'perplexity':>14}{'':10}"
    )
    print(header + (f"{'KL divergence':>15}{'same token':>12}" if compared else ""))
    for row in rows:
        line = f"{row['model']:{width}}" + (f"{row['bits']:8.2f}" if bits else "")
        line += f"{row['perplexity']:14.3f} ± {row['standard_error']:<7.3f}"
        print(line + (f"{row['kl_divergence']:15.5f}{row['same_token']:12.1%}" if compared else ""))
    tokens, total_s = rows[0]["tokens"], sum(row["seconds"] for row in rows)
    print(f"{tokens} tokens of {args.perplexity} in windows of {args.window}, {tokens * len(rows) / total_s:.0f} tok/s")
