"""A server under mixed load for a long time: `python benchmarks/soak.py --seconds 1800`, or `make soak SECONDS=1800`.

A `ktx serve` of the demo model in a process of its own, with a cache so small that requests give their pages up for others, is asked by many clients
at once in every protocol (benchmarks/soak_clients.py): whole answers and streams, clients that leave, bad requests, prompts that fill the context, grammars,
forced calls, conversations that the server keeps. It rests before the load and behind it. At the end a table says whether it behaved: exit status 1 when it did not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from soak_clients import ACTIONS, FIXED, Client, Tally  # noqa: E402
from soak_protocols import CHAT, MODEL  # noqa: E402

SERVER = ["--cache-lens", "3072", "--max-batch-size", "8", "--model-name", "ktx-demo"]
# A lone prompt in one step is some twenty first tokens of a model this small, and who comes meanwhile waits for it: prompts are cut as small as answers allow.
SERVER += ["--max-num-batched-tokens", "256"]
WARM = 120.0  # seconds of load before growth counts, at most a quarter of the whole
REST = 70.0  # seconds in which nobody asks; the server gives memory back once a minute
SETTLE = 30.0  # seconds until a server that nobody asks must be idle
GROWTH = 1.0  # MB for 1000 requests
POOLS = 8  # requests at once of those that go to a pool of threads, more than any has
WAIT = 20.0  # times the median that a first token may take
NEAR = 200  # of how many first tokens in a row: a machine has slow minutes
IDLE = {"num_requests_running": 0.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}


@dataclass(frozen=True)
class Sample:
    """The server's process at one moment."""

    seconds: float
    requests: int
    megabytes: float
    files: int
    threads: int


@dataclass(frozen=True)
class Check:
    """A row of the last table."""

    name: str
    found: str
    bound: str
    good: bool


class Watch:
    """Looks at the server while clients work: its process, its health, and a line for whoever waits."""

    def __init__(self, http: httpx.AsyncClient, process: psutil.Process, tally: Tally, every: float):
        self.http, self.process, self.tally, self.every = http, process, tally, every
        self.samples: list[Sample] = []
        self.start = time.monotonic()
        self.sick: list[str] = []
        self.told = (self.start, 0, 0)
        self.spent = 0.0, 0.0

    def sample(self) -> Sample:
        p, seconds = self.process, time.monotonic() - self.start
        megabytes = p.memory_info().rss / 1e6
        self.samples.append(Sample(seconds, self.tally.requests, megabytes, p.num_fds(), p.num_threads()))
        return self.samples[-1]

    def _spent(self) -> tuple[float, float]:
        """Seconds of processors that the server has had, and that other machines on the host took from this one: a slow server is told from a slow machine."""
        own = self.process.cpu_times()
        return own.user + own.system, psutil.cpu_times().steal

    async def run(self) -> None:
        """Once a second, until it is cancelled."""
        self.spent = self._spent()
        while True:
            await asyncio.sleep(1)
            try:
                answer = await self.http.get("/health")
                if answer.status_code != 200:
                    self.sick.append(f"{answer.status_code} {answer.text}")
            except httpx.HTTPError as error:
                self.sick.append(f"{type(error).__name__}: {error}")
            if time.monotonic() - self.told[0] >= self.every:
                self.tell(self.sample())
            else:
                self.sample()

    def tell(self, now: Sample) -> None:
        """A line of progress, with rates since the one before."""
        at, requests, pieces = self.told
        self.told = (time.monotonic(), self.tally.requests, self.tally.pieces)
        passed = self.told[0] - at
        rates = f"{(now.requests - requests) / passed:5.1f} requests/s {(self.tally.pieces - pieces) / passed:6.0f} pieces/s"
        before, self.spent = self.spent, self._spent()
        own, stolen = ((after - was) / passed for after, was in zip(self.spent, before, strict=True))
        rates += f" {own:4.1f} cores {stolen:4.1f} stolen"
        state = f"{now.megabytes:7.1f} MB {now.files:4} files {now.threads:3} threads"
        print(
            f"{now.seconds:6.0f} s {now.requests:7} requests {rates} {state} {len(self.tally.wrong)} wrong", flush=True
        )

    async def metrics(self) -> dict[str, float]:
        """What /metrics says, without the names of the model."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if line.startswith("ktx:")]
        return {name.removeprefix("ktx:").partition("{")[0]: float(value) for name, _, value in pairs}

    async def settled(self) -> dict[str, float]:
        """The metrics once nothing runs, or after SETTLE seconds."""
        until = time.monotonic() + SETTLE
        while True:
            found = await self.metrics()
            if all(found[name] == value for name, value in IDLE.items()) or time.monotonic() > until:
                return found
            await asyncio.sleep(0.2)


async def load(base: str, tally: Tally, clients: int, seconds: float, seed: int) -> None:
    """So many clients for so long, each with connections of its own, which are closed at the end."""
    until = time.monotonic() + seconds

    async def one(number: int) -> None:
        async with httpx.AsyncClient(base_url=base, timeout=300) as http:
            client = Client(http, random.Random(seed * 1000 + number), tally)
            await client.work(lambda: time.monotonic() >= until)

    await asyncio.gather(*(one(number) for number in range(clients)))


async def fill_pools(base: str) -> None:
    """Long prompts and large schemas, enough at once that every thread the server has for them is begun before threads are counted.

    On a slow machine some wait longer for a thread than the server lets them: 429.
    """
    words = {"model": MODEL, "prompt": "a rule file " * 20_000}
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer", "minimum": i} for i in range(600)}}
    answer = CHAT.body("Count.", 1, 1, False) | {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }
    async with httpx.AsyncClient(base_url=base, timeout=300) as http:
        done = await asyncio.gather(
            *(http.post(path, json=body) for path, body in [("/tokenize", words), (CHAT.path, answer)] * POOLS)
        )
    for one in done:
        if one.status_code != 429:
            one.raise_for_status()


async def soak(base: str, process: psutil.Process, args: argparse.Namespace) -> tuple[Watch, list[Check]]:
    """Warm-up, rest, load, rest: what is open and used at the two rests must be the same."""
    tally, warm = Tally(), min(WARM, args.seconds / 4)
    limits = httpx.Limits(max_keepalive_connections=1)
    async with httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as http:
        watch = Watch(http, process, tally, args.every)
        looking = asyncio.ensure_future(watch.run())
        await fill_pools(base)
        await load(base, tally, args.clients, warm, 1)
        await watch.settled()
        await asyncio.sleep(args.rest)
        before = watch.sample()
        await load(base, tally, args.clients, args.seconds - warm, 2)
        metrics = await watch.settled()
        await asyncio.sleep(max(1.0, args.rest))  # for the last connections to be closed
        after = watch.sample()
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    return watch, checks(watch, before, after, metrics, args)


def growth(samples: list[Sample]) -> float:
    """MB for 1000 requests, by least squares."""
    across = [sample.requests / 1000 for sample in samples]
    if len(set(across)) < 2:
        return 0.0
    return float(np.polyfit(across, [sample.megabytes for sample in samples], 1)[0])


def waits(firsts: list[float]) -> tuple[float, float]:
    """The longest first token beside the median of those around it, where that is worst."""
    rows = [firsts[at : at + NEAR] for at in range(0, max(1, len(firsts) - NEAR // 2), NEAR // 2)]
    return max(
        ((max(row), statistics.median(row)) for row in rows if row), key=lambda two: two[0] / two[1], default=(0.0, 0.0)
    )


def checks(
    watch: Watch, before: Sample, after: Sample, metrics: dict[str, float], args: argparse.Namespace
) -> list[Check]:
    """What must hold."""
    tally = watch.tally
    slope = growth([sample for sample in watch.samples if sample.seconds >= before.seconds])
    grown = (after.megabytes - before.megabytes) / max(1, after.requests - before.requests) * 1000
    longest, usual = waits(tally.firsts)
    wait = longest / usual if longest else 0.0
    broken = sum(count for status, count in tally.statuses.items() if status >= 500 and status != 501)
    idle = {name: metrics[name] for name in IDLE}
    kinds, asked = len(set(tally.done) & set(ACTIONS)), len(tally.fixed)
    rows = [
        ("answers with status 5xx", broken, "0", broken == 0),
        ("answers that were wrong", len(tally.wrong), "0", not tally.wrong),
        ("kinds of work done", f"{kinds} of {len(ACTIONS)}", "all", kinds == len(ACTIONS)),
        ("fixed questions asked", f"{asked} of {len(FIXED)}, {tally.done['fixed']} times", "each the same", asked > 0),
        ("requests that gave pages up", f"{metrics['num_preemptions_total']:.0f}", "some", metrics["num_preemptions_total"] > 0),
        ("first token, largest / median", f"{longest:.2f} / {usual:.3f} s: {wait:.1f}", f"{args.wait:.0f} of {NEAR} in a row", wait <= args.wait),
        ("memory for 1000 requests", f"{grown:+.3f} MB", f"{args.growth} MB", grown <= args.growth),
        ("memory, rest to rest", f"{before.megabytes:.1f} -> {after.megabytes:.1f} MB", "", True),
        ("its slope, load and rest", f"{slope:+.3f} MB for 1000 requests", "", True),
        ("open files, rest to rest", f"{before.files} -> {after.files}", "the same", before.files == after.files),
        ("threads, rest to rest", f"{before.threads} -> {after.threads}", "the same", before.threads == after.threads),
        ("/health", f"{len(watch.sick)} bad", "0", not watch.sick),
        ("engine's restarts", f"{metrics['engine_restarts_total']:.0f}", "0", not metrics["engine_restarts_total"]),
        ("idle at the end", ", ".join(f"{value:g}" for value in idle.values()), "running, waiting, pages 0", idle == IDLE),
    ]  # fmt: skip
    return [Check(name, str(found), bound, good) for name, found, bound, good in rows]


def report(watch: Watch, found: list[Check]) -> None:
    tally = watch.tally
    seconds = watch.samples[-1].seconds
    print(
        f"\n{tally.requests} requests in {seconds:.0f} s: "
        + ", ".join(f"{n} {name}" for name, n in tally.done.most_common())
    )
    print("status: " + ", ".join(f"{status} {count} times" for status, count in sorted(tally.statuses.items())))
    for line in [*dict.fromkeys(tally.wrong), *dict.fromkeys(watch.sick)][:20]:
        print(f"  {line}")
    widths = [max(len(getattr(row, name)) for row in found) + 2 for name in ("name", "found", "bound")]
    for row in found:
        cells = zip((row.name, row.found, row.bound), widths, strict=True)
        print("".join(f"{cell:{width}}" for cell, width in cells) + ("ok" if row.good else "FAILED"))


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of load (default 1800)")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="at once (default 16)")
    parser.add_argument(
        "--every", type=float, default=10.0, metavar="SECONDS", help="between lines of progress (default 10)"
    )
    parser.add_argument(
        "--rest",
        type=float,
        default=REST,
        metavar="SECONDS",
        help=f"before the load and behind it (default {REST:.0f})",
    )
    parser.add_argument(
        "--growth", type=float, default=GROWTH, metavar="MB", help=f"memory for 1000 requests (default {GROWTH})"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT,
        metavar="TIMES",
        help=f"the median that a first token may take (default {WAIT:.0f})",
    )
    args = parser.parse_args(argv)
    from ktx.cli.bench_child import Child

    server = Child(SERVER)
    with server as base:
        assert server.process
        watch, found = asyncio.run(soak(base, psutil.Process(server.process.pid), args))
    report(watch, found)
    return 0 if all(row.good for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
