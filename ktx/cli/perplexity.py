"""`ktx verify --perplexity FILE`: how well a model predicts a text, and how far its probabilities are from another's."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ktx.cli.arguments import load_options, lora_option, model_options, named_model, options_of, refuse
from ktx.errors import BadFile, UsageError

MOST_REFERENCE = 1 << 33  # bytes of log-probabilities that are kept of the model compared against


def run(args: argparse.Namespace) -> int:
    """One line a model: the one that is named, or the demo model in every format that can be made here."""
    text = read_text(args.perplexity)
    if args.window < 2:
        raise UsageError(f"--window {args.window}: a window needs at least 2 tokens")
    if not named_model(args):
        if args.against:
            raise UsageError(
                "--against needs --model or --weights; the demo model is compared with its own BF16 weights"
            )
        refuse(
            args,
            options_of(model_options, adapters_option),
            "needs --model or --weights; the demo model is measured in every format as it is",
        )
        _demo(args, text)
        return 0
    import ktx

    def load(weights: str | None) -> tuple[Any, Any]:
        return ktx.load(args.model, weights, args.rules, **load_options(args))

    reference = None
    if args.against:
        reference = Reference(*load(args.against), text, args)
    model, tokenizer = load(args.weights)
    _show(args, [score(str(args.weights or args.model), model, tokenizer, text, args, reference)])
    return 0


def adapters_option(parser: argparse.ArgumentParser) -> None:
    lora_option(parser, "their sum counts with --perplexity")


def read_text(path: str) -> str:
    """BadFile when it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: no UTF-8 text, byte {error.start} is {error.object[error.start]:#04x}") from error


def windows(tokenizer: Any, text: str, args: argparse.Namespace) -> Iterator[list[int]]:
    """Token ids in pieces that each begin with the begin mark, if the tokenizer has one; UsageError for a text of no tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: args.tokens or None]
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if len(ids) + len(first) < 2:
        raise UsageError(f"{args.perplexity}: {len(ids)} tokens are no text to be predicted")
    step = args.window - len(first)
    for at in range(0, len(ids), step):
        piece = first + ids[at : at + step]
        if len(piece) > 1:
            yield piece


def log_probabilities(model: Any, ids: list[int]) -> Any:
    """f32 [len(ids) - 1, vocabulary]: what the model says about each token after the first."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


class Reference:
    """Another model's log-probabilities of the same windows, in f16, and its likeliest tokens."""

    def __init__(self, model: Any, tokenizer: Any, text: str, args: argparse.Namespace):
        pieces = list(windows(tokenizer, text, args))
        need = 2 * model.config.vocab_size * sum(len(piece) - 1 for piece in pieces)
        if need > MOST_REFERENCE:
            raise UsageError(
                f"{need / 1e9:.1f} GB of probabilities would have to be kept to compare with {args.against};"
                f" give --tokens {int(args.tokens or MOST_REFERENCE / 2 / model.config.vocab_size)} or fewer"
            )
        self.kept, self.likeliest = [], []
        for piece in pieces:
            found = log_probabilities(model, piece)
            self.kept.append(found.half())
            self.likeliest.append(found.argmax(-1))


def score(
    name: str, model: Any, tokenizer: Any, text: str, args: argparse.Namespace, reference: Reference | None
) -> dict[str, Any]:
    """Perplexity with its standard error; mean KL divergence from the reference and how often both say the same token."""
    import torch

    losses: list[Any] = []
    divergence: list[Any] = []
    same: list[Any] = []
    start = time.perf_counter()
    for i, piece in enumerate(windows(tokenizer, text, args)):
        mine = log_probabilities(model, piece)
        losses.append(-mine.gather(1, torch.tensor(piece[1:])[:, None])[:, 0])
        if reference is not None:
            theirs = reference.kept[i].float()
            divergence.append((theirs.exp() * (theirs - mine)).sum(-1))
            same.append((reference.likeliest[i] == mine.argmax(-1)).float())
    loss = torch.cat(losses)
    found = {
        "model": name,
        "perplexity": math.exp(loss.mean().item()),
        "standard_error": math.exp(loss.mean().item()) * loss.std().item() / math.sqrt(len(loss)),
        "tokens": len(loss),
        "seconds": time.perf_counter() - start,
    }
    if reference is not None:
        found |= {
            "kl_divergence": max(0.0, torch.cat(divergence).mean().item()),
            "same_token": torch.cat(same).mean().item(),
        }
    return found


def _demo(args: argparse.Namespace, text: str) -> None:
    """The demo model in every format: written as GGUF or made on loading, against its own BF16 weights in transformers."""
    from ktx import demo
    from ktx.demo.evaluate import stock

    folder = demo.path()
    reference = Reference(*stock(folder), text, args)
    rows = []
    for name, load in formats(folder):
        model, tokenizer = load()
        bits = 8 * model.ktx.bytes_per_token / active_weights(model)
        rows.append(score(name, model, tokenizer, text, args, reference) | {"bits": bits})
    _show(args, rows)


def formats(folder: Path) -> Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]:
    """Names and loaders of the formats that can be made here: all but those that need an importance matrix."""
    import torch

    import ktx
    from ktx.demo.export import write_gguf
    from ktx.quant.quantize import quantize
    from ktx.quant.types import QTYPES

    def written(mix: str) -> tuple[Any, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            write_gguf(folder, Path(scratch) / "demo.gguf", mix)
            return ktx.load(str(folder), weights=str(Path(scratch) / "demo.gguf"), progress=False)

    def made(word: str) -> tuple[Any, Any]:
        return ktx.load(str(folder), str(folder / "model.safetensors"), weight_dtype=word, progress=False)

    for name, qtype in QTYPES.items():
        if name == "F8_E4M3" or qtype.code >= 1000:
            continue
        try:
            quantize(torch.zeros(1, 256), qtype)
        except UsageError:
            continue
        yield name, lambda name=name: written(name)  # type: ignore[misc]
    yield "Q4_K_M", lambda: written("Q4_K_M")
    for word in ("int8", "int4g32", "int4g64", "int4g128"):
        yield word, lambda word=word: made(word)  # type: ignore[misc]


def active_weights(model: Any) -> int:
    """Weights that a token is multiplied with, the output layer's too."""
    from ktx.cli.bench_ktx import active_params

    return active_params(model) + model.lm_head.in_features * model.lm_head.out_features


def _show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return
    compared, bits = "kl_divergence" in rows[0], "bits" in rows[0]
    width = max(8, *(len(row["model"]) for row in rows))
    head = (
        f"{'format' if bits else 'weights':{width}}" + (f"{'bits':>8}" if bits else "") + f"{'perplexity':>14}{'':10}"
    )
    print(head + (f"{'KL divergence':>15}{'same token':>12}" if compared else ""))
    for row in rows:
        line = f"{row['model']:{width}}" + (f"{row['bits']:8.2f}" if bits else "")
        line += f"{row['perplexity']:14.3f} ± {row['standard_error']:<7.3f}"
        print(line + (f"{row['kl_divergence']:15.5f}{row['same_token']:12.1%}" if compared else ""))
    tokens, taken = rows[0]["tokens"], sum(row["seconds"] for row in rows)
    print(f"{tokens} tokens of {args.perplexity} in windows of {args.window}, {tokens * len(rows) / taken:.0f} tok/s")
