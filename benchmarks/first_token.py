"""Time to the first token of a long prompt through `ktx serve`, alone and beside answers being written, and how long these wait.

    python benchmarks/first_token.py --model DIR [--weights FILE] [--checkout DIR] [--checkout OTHER]

Each checkout (default: this one) has a server of its own; they take turns, one request at a time, so that all see the same machine. Seconds,
medians over the rounds:

    alone     from the request to its first token, where nobody else asks
    beside    the same while others are answered
    gap       the slowest token of those others meanwhile, and `usual`, their median token without the prompt
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402

from ktx.cli.arguments import positive  # noqa: E402
from ktx.cli.bench_child import Child  # noqa: E402
from ktx.cli.bench_clients import Load, Prompts, Timing, ask, prompts_for  # noqa: E402
from ktx.cli.bench_serve import first_model  # noqa: E402
from ktx.errors import KtxError  # noqa: E402

BEGUN = 4  # tokens that each of the others has when the prompt comes
SHORT = 24  # tokens of their prompts
LONGEST = 4096  # tokens of their answers, which end when the prompt has its token
WAIT = 0.002
FIGURES = ("alone", "beside", "gap", "usual")


class Server:
    """A running server of a checkout, and what was measured of it."""

    def __init__(self, name: str, http: httpx.AsyncClient, model: str, prompts: Prompts, args: argparse.Namespace):
        self.name, self.http, self.model, self.prompts, self.args = name, http, model, prompts, args
        self.found: dict[str, list[float]] = {figure: [] for figure in FIGURES}
        self.asked = 0

    def body(self, tokens: int, answer: int) -> dict[str, Any]:
        """A request with a prompt that none had before."""
        load = Load(self.model, tokens, answer)
        self.asked += 1
        return load.body(self.prompts.make(load, 1, self.asked)[0], self.asked)

    async def first(self) -> Timing:
        """The long prompt's first token."""
        timing = await ask(self.http, self.body(self.args.prompt, 1))
        if timing.error:
            raise KtxError(f"{self.name}: {timing.error}")
        return timing

    async def round(self, counts: bool) -> None:
        """Every figure once; the first round, which is not counted, warms caches and lets the server learn its rate."""
        alone = await self.first()
        timings = [Timing(0.0) for _ in range(self.args.answers)]
        others = [asyncio.create_task(self._answer(timing)) for timing in timings]
        try:
            while not all(len(timing.pieces) >= BEGUN for timing in timings):
                if ended := next((task for task in others if task.done()), None):
                    raise KtxError(
                        f"{self.name}: an answer ended before the prompt came: {ended.exception() or 'too short'}"
                    )
                await asyncio.sleep(WAIT)
            beside = await self.first()
            seen = [len(timing.pieces) for timing in timings]
            while any(len(t.pieces) <= n for t, n in zip(timings, seen, strict=True)) and not any(
                t.done() for t in others
            ):
                await asyncio.sleep(WAIT)  # the token that waits for the prompt's last step counts too
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        if not counts:
            return
        gaps = [gap for timing in timings for gap in gaps_of(timing)]
        self.found["alone"].append(alone.first)
        self.found["beside"].append(beside.first)
        self.found["gap"].append(max(seconds for end, seconds in gaps if end > beside.start))
        self.found["usual"].append(statistics.median(seconds for end, seconds in gaps if end <= beside.start))

    async def _answer(self, timing: Timing) -> None:
        """One of the others: its pieces as they come, until it is cancelled."""
        async with self.http.stream("POST", "/v1/completions", json=self.body(SHORT, self.args.longest)) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                timing.read(line, asyncio.get_running_loop().time())

    def line(self) -> dict[str, Any]:
        medians = {figure: statistics.median(values) for figure, values in self.found.items()}
        spread = {f"{figure}_spread": [min(values), max(values)] for figure, values in self.found.items()}
        return {"checkout": self.name, "prompt": self.args.prompt, "answers": self.args.answers, **medians, **spread}


def gaps_of(timing: Timing) -> list[tuple[float, float]]:
    """When each token but the first came, and seconds since the one before."""
    moments = [moment for moment, _ in timing.pieces]
    return [(now, now - before) for before, now in zip(moments, moments[1:], strict=False)]


async def measure(bases: Sequence[tuple[str, str]], args: argparse.Namespace) -> list[dict[str, Any]]:
    async with AsyncExitStack() as stack:
        servers = []
        for name, base in bases:
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=None))
            model = await first_model(http)
            prompts = await prompts_for(http, Load(model, args.prompt, 1), args.seed)
            servers.append(Server(name, http, model, prompts, args))
        for turn in range(args.repeat + 1):
            for server in servers:
                await server.round(counts=turn > 0)
        return [server.line() for server in servers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--weights", metavar="FILE")
    parser.add_argument("--checkout", action="append", metavar="DIR", help="of ktx, built; several take turns")
    parser.add_argument("-p", "--prompt", type=positive, default=2048, metavar="N", help="tokens (default 2048)")
    parser.add_argument("--answers", type=positive, default=3, metavar="N", help="beside the prompt (default 3)")
    parser.add_argument(
        "--longest", type=positive, default=LONGEST, metavar="N", help=f"their tokens at most (default {LONGEST})"
    )
    parser.add_argument(
        "-r", "--repeat", type=positive, default=3, metavar="N", help="rounds; medians are shown (default 3)"
    )
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="WORD",
        help="one more word for ktx serve: --serve=--max-itl-ms=200",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    words = ["--model", args.model, "--max-batch-size", str(args.answers + 1), *args.serve]
    words += ["--weights", args.weights] if args.weights else []
    words += ["--threads", str(args.threads)] if args.threads else []
    with ExitStack() as stack:
        roots = [Path(folder).resolve() for folder in args.checkout or [ROOT]]
        lines = asyncio.run(measure([(root.name, stack.enter_context(Child(words, root))) for root in roots], args))
    if args.json:
        print(*map(json.dumps, lines), sep="\n")
        return 0
    print(
        f"first token of {args.prompt} tokens, alone and beside {args.answers} answers; seconds, medians of {args.repeat}"
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
