"""ktx bench serve: a running server under load: latencies and throughput by how many ask at once."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from ktx.cli.arguments import counts, flag, model_options, positive
from ktx.cli.serve import running_options
from ktx.errors import KtxError, UsageError

if TYPE_CHECKING:
    from ktx.cli.bench_clients import Load, Prompts, Timing

SUMMARY = "measure a server under load: any OpenAI-compatible one, or ktx serve with these options"
Line = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency", "-c", type=counts, default=[1, 2, 4, 8], metavar="N[,N]", help="clients (default 1,2,4,8)"
    )
    load.add_argument(
        "--requests", type=positive, metavar="N", help="of each level (default: twice its clients, 8 at least)"
    )
    for name, default, what in (("prompt", 256, "of each prompt"), ("answer", 64, "of each answer")):
        load.add_argument(
            f"--{name}-tokens", type=positive, default=default, metavar="N", help=f"{what} (default {default})"
        )
    load.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="the first N tokens are the same in all (default 0)"
    )
    flag(load, "--same", help="all ask the same, so that tokens of several requests go to the same experts")
    load.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of the answers, each with a seed (default 0)"
    )
    load.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the prompts (default: others each time, so that none is in the server's cache)",
    )
    load.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one request (default 600)")
    other = parser.add_argument_group("another server")
    other.add_argument("--url", metavar="URL", help="measure the server that listens there, such as http://host:8000")
    other.add_argument("--api-key", metavar="KEY", help="its key (default: the environment's KTX_API_KEY)")
    other.add_argument("--served-model", metavar="NAME", help="its model (default: the first of /v1/models)")
    model_options(parser)
    running_options(parser, batch="the most clients")
    out = parser.add_argument_group("output")
    flag(out, "--json", help="one JSON object a line")
    out.add_argument("--record", metavar="FILE", help="append the JSON lines to this file")
    out.add_argument("--plot", metavar="PNG", help="draw latencies over throughput (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measures level by level. Exit status 1 when a level had no answer at all."""
    _check(args)
    import asyncio

    from ktx.cli.bench_child import Child, serve_words

    if args.url:
        lines = asyncio.run(measure(args.url.rstrip("/").removesuffix("/v1"), args))
    else:
        args.max_batch_size = args.max_batch_size or max(args.concurrency)
        with Child(serve_words(args)) as base:
            lines = asyncio.run(measure(base, args))
    report(lines, args)
    return 1 if any(line["errors"] == line["requests"] for line in lines) else 0


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.shared_prefix <= args.prompt_tokens:
        raise UsageError(
            f"--shared-prefix {args.shared_prefix}: must be from 0 to --prompt-tokens, {args.prompt_tokens}"
        )
    if args.url and not args.url.startswith(("http://", "https://")):
        raise UsageError(f"--url {args.url}: must begin with http:// or https://")
    needed = ["httpx", *(["matplotlib"] if args.plot else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UsageError(f"ktx bench serve needs {', '.join(missing)}: pip install {' '.join(missing)}")


async def measure(base: str, args: argparse.Namespace) -> list[Line]:
    """A line a level. KtxError when nothing answers there."""
    import httpx

    from ktx.cli.bench_clients import Load, ask, prompts_for

    key = args.api_key or next(iter(os.environ.get("KTX_API_KEY", "").split()), "")
    headers = {"authorization": f"Bearer {key}"} if key and args.url else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=max(args.concurrency))
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=args.timeout, limits=limits) as http:
        try:
            name = args.served_model or await first_model(http)
            load = Load(name, args.prompt_tokens, args.answer_tokens, args.shared_prefix, args.same, args.temperature)
            prompts = await prompts_for(http, load, time.time_ns() if args.seed is None else args.seed)
        except (httpx.HTTPError, ValueError) as error:
            raise KtxError(f"{base}: no OpenAI-compatible server answers: {type(error).__name__}: {error}") from error
        await ask(http, load.body(prompts.make(load, 1, -1)[0], 0))  # what is touched for the first time costs more
        lines = [await level_line(http, load, prompts, level, args) for level in range(len(args.concurrency))]
    for name, what in (("ratio", "tok_s"), ("decode_ratio", "decode_tok_s")):
        for line in lines:
            if lines[0][what] and line[what]:
                line[name] = line[what] / lines[0][what]
    return lines


async def level_line(http: Any, load: Load, prompts: Prompts, level: int, args: argparse.Namespace) -> Line:
    """Runs a level: what was asked, and what it came to."""
    from ktx.cli.bench import stamp
    from ktx.cli.bench_clients import run_level

    concurrency = args.concurrency[level]
    count = args.requests or max(8, 2 * concurrency)
    timings = await run_level(http, load, prompts.make(load, count, level), concurrency)
    return {
        "test": f"serve p{load.prompt_tokens} n{load.answer_tokens} c{concurrency}",
        **stamp(),
        "server": args.url or "ktx serve",
        "model": load.model,
        "shared_prefix": load.shared_prefix,
        "same": load.same,
        "temperature": load.temperature,
        **figures(timings, concurrency),
    }


async def first_model(http: Any) -> str:
    """The name of the first model that the server has. KtxError with its words when it refuses."""
    from ktx.cli.bench_clients import text_of

    answer = await http.get("/v1/models")
    if answer.status_code != 200:
        raise KtxError(f"{answer.url}: {answer.status_code} {text_of(answer)}")
    found = [model.get("id") for model in answer.json().get("data") or ()]
    if not found:
        raise KtxError(f"{answer.url}: names no model; give --served-model")
    return str(found[0])


def figures(timings: list[Timing], concurrency: int) -> Line:
    """What a level came to. Latencies in seconds, speeds in tokens a second of the level's whole time, errors' requests left out."""
    good = [timing for timing in timings if not timing.error]
    wall = max(timing.end for timing in timings) - min(timing.start for timing in timings)
    prompt, answer = sum(timing.prompt for timing in good), sum(timing.answer for timing in good)
    samples = {
        "ttft": [timing.first for timing in good],
        "itl": [gap for timing in good for gap in timing.gaps],
        "latency": [timing.end - timing.start for timing in good],
    }
    quantiles = {f"{name}_p{q}": quantile(values, q) for name, values in samples.items() for q in (50, 99)}
    speeds = {"prompt_tok_s": prompt / wall, "answer_tok_s": answer / wall, "tok_s": (prompt + answer) / wall}
    return {
        "concurrency": concurrency,
        "requests": len(timings),
        "errors": len(timings) - len(good),
        "error": next((timing.error for timing in timings if timing.error), ""),
        "seconds": wall,
        "prompt_tokens": prompt,
        "cached_tokens": sum(timing.cached for timing in good),
        "answer_tokens": answer,
        **quantiles,
        **speeds,
        "decode_tok_s": decode_speed(good, min(concurrency, len(timings))),
    }


def quantile(values: list[float], percent: int) -> float | None:
    """The smallest value that so many percent do not exceed; None of nothing."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def decode_speed(timings: list[Timing], clients: int) -> float | None:
    """Tokens a second while all clients were between the first and the last token of an answer; None when they never were."""
    turns = [(timing.pieces[0][0], 1) for timing in timings] + [(timing.pieces[-1][0], -1) for timing in timings]
    answering, seconds, spans = 0, 0.0, list[tuple[float, float]]()
    turns.sort()
    for (now, change), (after, _) in zip(turns, turns[1:], strict=False):
        answering += change
        if answering == clients and after > now:
            spans.append((now, after))
            seconds += after - now
    pieces = [piece for timing in timings for piece in timing.pieces]
    tokens = sum(count for moment, count in pieces if any(begin < moment <= end for begin, end in spans))
    return tokens / seconds if tokens else None


def report(lines: list[Line], args: argparse.Namespace) -> None:
    """The table or JSON, the record, the picture."""
    if args.json:
        print(*map(json.dumps, lines), sep="\n")
    else:
        table(lines)
    for line in lines:
        if line["errors"]:
            print(f"ktx: {line['errors']} errors of {line['test']}, the first: {line['error']}", file=sys.stderr)
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    if args.plot:
        from ktx.cli.bench_plot import draw

        draw(lines, args.plot)


def table(lines: list[Line]) -> None:
    first = lines[0]
    print(f"{first['machine']}: {first['server']}, {first['model']}")
    print(
        "clients  requests  errors  TTFT ms p50 / p99  ITL ms p50 / p99  latency s p50 / p99  tok/s prompt  answer   total  ratio  decode  ratio  cached"
    )
    for line in lines:
        pairs = {
            name: " / ".join(
                "-" if line[f"{name}_p{q}"] is None else f"{scale * line[f'{name}_p{q}']:.{digits}f}" for q in (50, 99)
            )
            for name, scale, digits in (("ttft", 1000, 0), ("itl", 1000, 1), ("latency", 1, 2))
        }
        decode = f"{line['decode_tok_s']:.1f}" if line["decode_tok_s"] else "-"
        ratios = [f"{line[name]:.2f}x" if name in line else "-" for name in ("ratio", "decode_ratio")]
        cached = f"{line['cached_tokens'] / line['prompt_tokens']:.0%}" if line["prompt_tokens"] else "-"
        print(
            f"{line['concurrency']:>7}{line['requests']:>10}{line['errors']:>8}{pairs['ttft']:>19}{pairs['itl']:>18}{pairs['latency']:>21}"
            f"{line['prompt_tok_s']:>14.1f}{line['answer_tok_s']:>8.1f}{line['tok_s']:>8.1f}{ratios[0]:>7}{decode:>8}{ratios[1]:>7}{cached:>8}"
        )
