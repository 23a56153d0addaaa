"""ktx bench serve: measure latencies and throughput of a server by number of concurrent clients."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ktx.cli.arguments import flag, int_list, model_options, positive
from ktx.cli.serve import engine_options
from ktx.errors import KtxError, UsageError

if TYPE_CHECKING:
    from ktx.cli.bench_clients import Load, Prompts, Timing

SUMMARY = "measure a server under load: any OpenAI-compatible one at --url, or ktx serve with the given options"
Line = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktx bench serve` to its parser."""
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        "-c",
        type=int_list,
        default=[1, 2, 4, 8],
        metavar="N[,N]",
        help="levels to measure: numbers of concurrent clients (default 1,2,4,8)",
    )
    load.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        help="requests per level (default: twice its number of clients, at least 8)",
    )
    for name, default, what in (("prompt", 256, "tokens of each prompt"), ("answer", 64, "tokens of each answer")):
        load.add_argument(
            f"--{name}-tokens", type=positive, default=default, metavar="N", help=f"{what} (default {default})"
        )
    load.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="make the first N tokens of all prompts equal (default 0)",
    )
    flag(
        load,
        "--same",
        help="send the same prompt and seed in all requests, so that the tokens of a batch use the same experts",
    )
    load.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature of the requests, each of which has a seed (default 0)",
    )
    load.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the random prompts (default: a new one per run, so that the server has none of them cached)",
    )
    load.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="timeout of one request (default 600)"
    )
    other = parser.add_argument_group("another server")
    other.add_argument(
        "--url",
        metavar="URL",
        help="measure the server at URL, such as http://host:8000 (default: start ktx serve with the options below)",
    )
    other.add_argument(
        "--api-key", metavar="KEY", help="API key of that server (default: the environment variable KTX_API_KEY)"
    )
    other.add_argument(
        "--served-model", metavar="NAME", help="model to request from that server (default: the first of /v1/models)"
    )
    model_options(parser)
    engine_options(parser, batch="the largest number of clients")
    output = parser.add_argument_group("output")
    flag(output, "--json", help="print JSON lines instead of a table")
    output.add_argument("--record", metavar="FILE", help="append the JSON lines to FILE")
    output.add_argument("--plot", metavar="PNG", help="plot latency against throughput to PNG (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measures a server (--url, or a `ktx serve` started for it) with each number of clients in turn, and reports.

    Exit status 1 when all requests of one number of clients failed.
    """
    _check_arguments(args)
    import asyncio

    from ktx.cli.bench_child import ServerProcess, serve_arguments

    if args.url:
        lines = asyncio.run(measure(args.url.rstrip("/").removesuffix("/v1"), args))
    else:
        args.max_batch_size = args.max_batch_size or max(args.concurrency)
        with ServerProcess(serve_arguments(args)) as base:
            lines = asyncio.run(measure(base, args))
    report(lines, args)
    return 1 if any(line["errors"] == line["requests"] for line in lines) else 0


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for contradicting options or missing packages, before a model is loaded."""
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
    """Measures the server at `base` with each number of clients, after a warm-up request.

    Returns:
        A record per number of clients (a level), with its speed relative to the first one's.

    Raises:
        KtxError: no OpenAI-compatible server answers at `base`.
    """
    import httpx

    from ktx.cli.bench_clients import Load, prompts_for, send_request

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
        await send_request(http, load.body(prompts.make(load, 1, -1)[0], 0))  # warm-up: the first request is slower
        lines = [await measure_level(http, load, prompts, level, args) for level in range(len(args.concurrency))]
    for name, speed in (("ratio", "tok_s"), ("decode_ratio", "decode_tok_s")):
        for line in lines:  # relative to the first level
            if lines[0][speed] and line[speed]:
                line[name] = line[speed] / lines[0][speed]
    return lines


async def measure_level(http: Any, load: Load, prompts: Prompts, level: int, args: argparse.Namespace) -> Line:
    """Runs the requests of one number of clients (`level` is its index) and returns parameters and results."""
    from ktx.cli.bench_clients import run_level
    from ktx.cli.bench_process import run_metadata

    concurrency = args.concurrency[level]
    count = args.requests or max(8, 2 * concurrency)
    timings = await run_level(http, load, prompts.make(load, count, level), concurrency)
    return {
        "test": f"serve p{load.prompt_tokens} n{load.answer_tokens} c{concurrency}",
        **run_metadata(),
        "server": args.url or "ktx serve",
        "model": load.model,
        "shared_prefix": load.shared_prefix,
        "same": load.same,
        "temperature": load.temperature,
        **summarize(timings, concurrency),
    }


async def first_model(http: Any) -> str:
    """Returns the name of the server's first model; raises KtxError with the server's message if it refuses."""
    from ktx.cli.bench_clients import error_text

    response = await http.get("/v1/models")
    if response.status_code != 200:
        raise KtxError(f"{response.url}: {response.status_code} {error_text(response)}")
    names = [model.get("id") for model in response.json().get("data") or ()]
    if not names:
        raise KtxError(f"{response.url}: lists no model; give --served-model")
    return str(names[0])


def summarize(timings: list[Timing], concurrency: int) -> Line:
    """Returns the results of one number of clients for its record: quantiles of latencies, and speeds.

    Failed requests are only counted. Latencies are in seconds, speeds in tokens per second of the level's total time.
    """
    succeeded = [timing for timing in timings if not timing.error]
    total_s = max(timing.end for timing in timings) - min(timing.start for timing in timings)
    prompt_tokens, answer_tokens = (
        sum(timing.prompt for timing in succeeded),
        sum(timing.answer for timing in succeeded),
    )
    samples = {
        "ttft": [timing.ttft_s for timing in succeeded],
        "itl": [gap for timing in succeeded for gap in timing.inter_token_s],
        "latency": [timing.end - timing.start for timing in succeeded],
    }
    quantiles = {f"{name}_p{q}": quantile(values, q) for name, values in samples.items() for q in (50, 99)}
    speeds = {
        "prompt_tok_s": prompt_tokens / total_s,
        "answer_tok_s": answer_tokens / total_s,
        "tok_s": (prompt_tokens + answer_tokens) / total_s,
    }
    return {
        "concurrency": concurrency,
        "requests": len(timings),
        "errors": len(timings) - len(succeeded),
        "error": next((timing.error for timing in timings if timing.error), ""),
        "seconds": total_s,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(timing.cached for timing in succeeded),
        "answer_tokens": answer_tokens,
        **quantiles,
        **speeds,
        "decode_tok_s": compute_decode_speed(succeeded, min(concurrency, len(timings))),
    }


def quantile(values: list[float], percent: int) -> float | None:
    """Returns the smallest value that at least `percent` of the values do not exceed; None if there are none."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def compute_decode_speed(timings: list[Timing], clients: int) -> float | None:
    """Returns tokens per second over the time in which all clients were decoding.

    Unlike the total speed it contains no prefill, so it can be compared with a decode benchmark. A client is decoding
    between the first and the last token of an answer. None when they never all were.
    """
    # (time, +1 or -1): a client begins or ends to decode
    changes = [(timing.chunks[0][0], 1) for timing in timings] + [(timing.chunks[-1][0], -1) for timing in timings]
    num_decoding, seconds, intervals = 0, 0.0, list[tuple[float, float]]()
    changes.sort()
    for (start, change), (end, _) in pairwise(changes):
        num_decoding += change
        if num_decoding == clients and end > start:
            intervals.append((start, end))
            seconds += end - start
    chunks = [chunk for timing in timings for chunk in timing.chunks]
    tokens = sum(count for time_s, count in chunks if any(start < time_s <= end for start, end in intervals))
    return tokens / seconds if tokens else None


def report(lines: list[Line], args: argparse.Namespace) -> None:
    """Prints the results as a table or JSON; appends them to --record and plots them to --plot, if given."""
    if args.json:
        print(*map(json.dumps, lines), sep="\n")
    else:
        print_table(lines)
    for line in lines:
        if line["errors"]:
            print(f"ktx: {line['errors']} errors in {line['test']}, the first: {line['error']}", file=sys.stderr)
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    if args.plot:
        from ktx.cli.bench_plot import draw

        draw(lines, args.plot)


def print_table(lines: list[Line]) -> None:
    """Prints the lines as a table, a row per number of clients."""
    first = lines[0]
    print(f"{first['machine']}: {first['server']}, {first['model']}")
    print(
        "clients  requests  errors  TTFT ms p50 / p99  ITL ms p50 / p99  latency s p50 / p99"
        "  tok/s prompt  answer   total  ratio  decode  ratio  cached"
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
            f"{line['concurrency']:>7}{line['requests']:>10}{line['errors']:>8}"
            f"{pairs['ttft']:>19}{pairs['itl']:>18}{pairs['latency']:>21}"
            f"{line['prompt_tok_s']:>14.1f}{line['answer_tok_s']:>8.1f}{line['tok_s']:>8.1f}"
            f"{ratios[0]:>7}{decode:>8}{ratios[1]:>7}{cached:>8}"
        )
