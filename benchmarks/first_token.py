"""Time to first token (TTFT) of a long prompt in `ktx serve`, alone and during decode of others, and their stall.

    python benchmarks/first_token.py --model DIR [--weights FILE] [--checkout DIR] [--checkout OTHER]

Each checkout (default: this one) runs its own server; they alternate request by request, so that all run under the
same conditions. In seconds, medians over the rounds:

    alone     TTFT of the long prompt with no other request
    beside    TTFT while other requests are decoding
    gap       the longest inter-token latency of those others meanwhile
    usual     their median inter-token latency before the prompt
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402

from ktx.cli.arguments import positive  # noqa: E402
from ktx.cli.bench_child import ServerProcess  # noqa: E402
from ktx.cli.bench_clients import Load, Prompts, Timing, prompts_for, send_request  # noqa: E402
from ktx.cli.bench_serve import first_model  # noqa: E402
from ktx.errors import KtxError  # noqa: E402

MIN_DECODED_TOKENS = 4  # tokens that each of the other requests has when the prompt is sent
SHORT_PROMPT_TOKENS = 24  # prompt tokens of the other requests
MAX_ANSWER_TOKENS = 4096  # their max output tokens; they are cancelled when the prompt has its first token
POLL_INTERVAL_S = 0.002
FIGURES = ("alone", "beside", "gap", "usual")


class Server:
    """The running server of a checkout, and its measurements."""

    def __init__(self, name: str, http: httpx.AsyncClient, model: str, prompts: Prompts, args: argparse.Namespace):
        self.name, self.http, self.model, self.prompts, self.args = name, http, model, prompts, args
        self.measurements: dict[str, list[float]] = {figure: [] for figure in FIGURES}
        self.num_requests = 0

    def body(self, tokens: int, max_tokens: int) -> dict[str, Any]:
        """Returns the body of a request with a new prompt."""
        load = Load(self.model, tokens, max_tokens)
        self.num_requests += 1
        return load.body(self.prompts.make(load, 1, self.num_requests)[0], self.num_requests)

    async def first(self) -> Timing:
        """Sends the long prompt and returns its timing, with one token."""
        timing = await send_request(self.http, self.body(self.args.prompt, 1))
        if timing.error:
            raise KtxError(f"{self.name}: {timing.error}")
        return timing

    async def round(self, is_counted: bool) -> None:
        """Measures every figure once.

        The first round does not count: it warms up caches, and the server measures its prefill rate.
        """
        alone = await self.first()
        timings = [Timing(0.0) for _ in range(self.args.answers)]
        others = [asyncio.create_task(self._answer(timing)) for timing in timings]
        try:
            while not all(len(timing.chunks) >= MIN_DECODED_TOKENS for timing in timings):
                if ended := next((task for task in others if task.done()), None):
                    raise KtxError(
                        f"{self.name}: an answer ended before the prompt was sent: {ended.exception() or 'too short'}"
                    )
                await asyncio.sleep(POLL_INTERVAL_S)
            beside = await self.first()
            num_before = [len(timing.chunks) for timing in timings]
            while any(len(t.chunks) <= n for t, n in zip(timings, num_before, strict=True)) and not any(
                t.done() for t in others
            ):
                await asyncio.sleep(POLL_INTERVAL_S)  # include the token that waits for the prompt's last step
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        if not is_counted:
            return
        gaps = [gap for timing in timings for gap in gaps_of(timing)]
        self.measurements["alone"].append(alone.ttft_s)
        self.measurements["beside"].append(beside.ttft_s)
        self.measurements["gap"].append(max(seconds for end, seconds in gaps if end > beside.start))
        self.measurements["usual"].append(statistics.median(seconds for end, seconds in gaps if end <= beside.start))

    async def _answer(self, timing: Timing) -> None:
        """Runs one of the other requests until it is cancelled, and records its tokens in `timing`."""
        async with self.http.stream(
            "POST", "/v1/completions", json=self.body(SHORT_PROMPT_TOKENS, self.args.longest)
        ) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                timing.read(line, asyncio.get_running_loop().time())

    def line(self) -> dict[str, Any]:
        """Returns the medians and the spread of each figure."""
        medians = {figure: statistics.median(values) for figure, values in self.measurements.items()}
        spread = {f"{figure}_spread": [min(values), max(values)] for figure, values in self.measurements.items()}
        return {"checkout": self.name, "prompt": self.args.prompt, "answers": self.args.answers, **medians, **spread}


def gaps_of(timing: Timing) -> list[tuple[float, float]]:
    """Returns the arrival time of each token but the first, and the seconds since the token before it."""
    times = [moment for moment, _ in timing.chunks]
    return [(now, now - before) for before, now in pairwise(times)]


async def measure(bases: Sequence[tuple[str, str]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the servers, given by name and base URL, in alternation; returns a line per server."""
    async with AsyncExitStack() as stack:
        servers = []
        for name, base in bases:
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=None))
            model = await first_model(http)
            prompts = await prompts_for(http, Load(model, args.prompt, 1), args.seed)
            servers.append(Server(name, http, model, prompts, args))
        for round_index in range(args.repeat + 1):
            for server in servers:
                await server.round(is_counted=round_index > 0)
        return [server.line() for server in servers]


def main() -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder or GGUF file")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    parser.add_argument(
        "--checkout", action="append", metavar="DIR", help="built checkout of ktx to measure; may be repeated"
    )
    parser.add_argument(
        "-p", "--prompt", type=positive, default=2048, metavar="N", help="tokens of the long prompt (default 2048)"
    )
    parser.add_argument("--answers", type=positive, default=3, metavar="N", help="number of other requests (default 3)")
    parser.add_argument(
        "--longest",
        type=positive,
        default=MAX_ANSWER_TOKENS,
        metavar="N",
        help=f"their max output tokens (default {MAX_ANSWER_TOKENS})",
    )
    parser.add_argument(
        "-r", "--repeat", type=positive, default=3, metavar="N", help="rounds; the median is reported (default 3)"
    )
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="threads of each server (default: usable physical cores)"
    )
    parser.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="WORD",
        help="further argument of ktx serve, such as --serve=--max-itl-ms=200; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the random prompts (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args()
    arguments = ["--model", args.model, "--max-batch-size", str(args.answers + 1), *args.serve]
    arguments += ["--weights", args.weights] if args.weights else []
    arguments += ["--threads", str(args.threads)] if args.threads else []
    with ExitStack() as stack:
        roots = [Path(folder).resolve() for folder in args.checkout or [ROOT]]
        lines = asyncio.run(
            measure([(root.name, stack.enter_context(ServerProcess(arguments, root))) for root in roots], args)
        )
    if args.json:
        print(*map(json.dumps, lines), sep="\n")
        return 0
    print(
        f"TTFT of {args.prompt} prompt tokens, alone and beside {args.answers} decoding requests;"
        f" seconds, medians of {args.repeat}"
    )
    print(f"{'checkout':20}" + "".join(f"{name:>10}{'ratio':>8}" for name in FIGURES))
    for line in lines:
        print(
            f"{line['checkout']:20}"
            + "".join(f"{line[name]:>10.3f}{lines[0][name] / line[name]:>7.2f}x" for name in FIGURES)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
