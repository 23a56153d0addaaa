"""Soak test of a server under mixed load: `python benchmarks/soak.py --seconds 1800`, or `make soak SECONDS=1800`.

A `ktx serve` of the demo model in a child process, with a KV cache so small that requests are preempted, serves many
concurrent clients in every protocol (benchmarks/soak_clients.py): complete and streamed answers, clients that
disconnect, bad requests, prompts that fill the context, grammars, forced tool calls, stored conversations. Idle
periods precede and follow the load. A table at the end has the result of each check; exit status 1 if one failed.
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

import httpx
import numpy as np
import psutil
from soak_clients import ACTIONS, FIXED, Client, Tally
from soak_protocols import CHAT, MODEL

SERVER = ["--kv-cache-tokens", "3072", "--max-batch-size", "8", "--model-name", "ktx-demo"]
# With a model this small, the prefill of a single long prompt in one step takes as long as some twenty first tokens,
# for which all other requests would wait: so prefill chunks are limited as they are while others decode.
SERVER += ["--max-num-batched-tokens", "256"]
WARMUP_S = 120.0  # load before growth counts, at most a quarter of the total time
REST_S = 70.0  # without requests; the server returns memory to the system once a minute
MAX_SETTLE_S = 30.0  # until a server without requests must be idle
MAX_GROWTH_MB = 1.0  # per 1000 requests
POOL_REQUESTS = 8  # concurrent requests of the kinds that use a thread pool, more than any pool has threads
MAX_TTFT_RATIO = 20.0  # of the longest first token to the median
TTFT_WINDOW = 200  # consecutive first tokens that are compared, because a machine has slow minutes
IDLE_METRICS = {"num_requests_running": 0.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}


@dataclass(frozen=True)
class Sample:
    """Resource usage of the server's process at one moment."""

    seconds: float
    requests: int
    megabytes: float
    files: int
    threads: int


@dataclass(frozen=True)
class Check:
    """A row of the final table."""

    name: str
    found: str
    bound: str
    good: bool


class Watch:
    """Monitors the server under load: samples its process, checks its health and prints progress."""

    def __init__(self, http: httpx.AsyncClient, process: psutil.Process, tally: Tally, every: float):
        self.http, self.process, self.tally, self.every = http, process, tally, every
        self.samples: list[Sample] = []
        self.start = time.monotonic()
        self.unhealthy: list[str] = []
        self.last_report = (self.start, 0, 0)
        self.cpu_seconds = 0.0, 0.0

    def sample(self) -> Sample:
        """Records and returns a sample of the server's process."""
        p, seconds = self.process, time.monotonic() - self.start
        megabytes = p.memory_info().rss / 1e6
        self.samples.append(Sample(seconds, self.tally.requests, megabytes, p.num_fds(), p.num_threads()))
        return self.samples[-1]

    def _read_cpu_seconds(self) -> tuple[float, float]:
        """Returns the CPU seconds of the server, and those that the host has taken from this virtual machine (steal).

        The latter tell a slow machine from a slow server.
        """
        times = self.process.cpu_times()
        return times.user + times.system, psutil.cpu_times().steal

    async def run(self) -> None:
        """Checks the server once per second, until it is cancelled."""
        self.cpu_seconds = self._read_cpu_seconds()
        while True:
            await asyncio.sleep(1)
            try:
                response = await self.http.get("/health")
                if response.status_code != 200:
                    self.unhealthy.append(f"{response.status_code} {response.text}")
            except httpx.HTTPError as error:
                self.unhealthy.append(f"{type(error).__name__}: {error}")
            if time.monotonic() - self.last_report[0] >= self.every:
                self.print_progress(self.sample())
            else:
                self.sample()

    def print_progress(self, now: Sample) -> None:
        """Prints a line of progress, with rates since the previous one."""
        last_time, requests, chunks = self.last_report
        self.last_report = (time.monotonic(), self.tally.requests, self.tally.chunks)
        elapsed_s = self.last_report[0] - last_time
        rates = (
            f"{(now.requests - requests) / elapsed_s:5.1f} requests/s"
            f" {(self.tally.chunks - chunks) / elapsed_s:6.0f} chunks/s"
        )
        before, self.cpu_seconds = self.cpu_seconds, self._read_cpu_seconds()
        server_cores, stolen_cores = (
            (now_s - before_s) / elapsed_s for now_s, before_s in zip(self.cpu_seconds, before, strict=True)
        )
        rates += f" {server_cores:4.1f} cores {stolen_cores:4.1f} stolen"
        state = f"{now.megabytes:7.1f} MB {now.files:4} files {now.threads:3} threads"
        print(
            f"{now.seconds:6.0f} s {now.requests:7} requests {rates} {state} {len(self.tally.wrong)} wrong", flush=True
        )

    async def metrics(self) -> dict[str, float]:
        """Returns the values of /metrics by name, without labels."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if line.startswith("ktx:")]
        return {name.removeprefix("ktx:").partition("{")[0]: float(value) for name, _, value in pairs}

    async def settled(self) -> dict[str, float]:
        """Returns the metrics once the server is idle, or after MAX_SETTLE_S seconds."""
        deadline = time.monotonic() + MAX_SETTLE_S
        while True:
            metrics = await self.metrics()
            if all(metrics[name] == value for name, value in IDLE_METRICS.items()) or time.monotonic() > deadline:
                return metrics
            await asyncio.sleep(0.2)


async def load(base: str, tally: Tally, clients: int, seconds: float, seed: int) -> None:
    """Runs `clients` clients for `seconds`, each with its own connections, which are closed at the end."""
    deadline = time.monotonic() + seconds

    async def run_client(index: int) -> None:
        async with httpx.AsyncClient(base_url=base, timeout=300) as http:
            client = Client(http, random.Random(seed * 1000 + index), tally)
            await client.work(lambda: time.monotonic() >= deadline)

    await asyncio.gather(*(run_client(index) for index in range(clients)))


async def fill_pools(base: str) -> None:
    """Sends enough long prompts and large schemas at once to start all threads of the server's pools.

    This happens before threads are counted. On a slow machine some requests time out waiting for a thread, with 429.
    """
    tokenize_body = {"model": MODEL, "prompt": "a rule file " * 20_000}
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer", "minimum": i} for i in range(600)}}
    chat_body = CHAT.body("Count.", 1, 1, False) | {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }
    async with httpx.AsyncClient(base_url=base, timeout=300) as http:
        responses = await asyncio.gather(
            *(
                http.post(path, json=body)
                for path, body in [("/tokenize", tokenize_body), (CHAT.path, chat_body)] * POOL_REQUESTS
            )
        )
    for response in responses:
        if response.status_code != 429:
            response.raise_for_status()


async def soak(base: str, process: psutil.Process, args: argparse.Namespace) -> tuple[Watch, list[Check]]:
    """Runs warm-up, rest, load and rest; resources at the two rests must be equal."""
    tally, warmup_s = Tally(), min(WARMUP_S, args.seconds / 4)
    limits = httpx.Limits(max_keepalive_connections=1)
    async with httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as http:
        watch = Watch(http, process, tally, args.every)
        watching = asyncio.ensure_future(watch.run())
        await fill_pools(base)
        await load(base, tally, args.clients, warmup_s, 1)
        await watch.settled()
        await asyncio.sleep(args.rest)
        before = watch.sample()
        await load(base, tally, args.clients, args.seconds - warmup_s, 2)
        metrics = await watch.settled()
        await asyncio.sleep(max(1.0, args.rest))  # until the last connections are closed
        after = watch.sample()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    return watch, checks(watch, before, after, metrics, args)


def growth(samples: list[Sample]) -> float:
    """Returns the growth of memory in MB per 1000 requests, by least squares."""
    thousands = [sample.requests / 1000 for sample in samples]
    if len(set(thousands)) < 2:
        return 0.0
    return float(np.polyfit(thousands, [sample.megabytes for sample in samples], 1)[0])


def waits(firsts: list[float]) -> tuple[float, float]:
    """Returns the longest TTFT of a window and the window's median, of the window where their ratio is worst."""
    windows = [
        firsts[start : start + TTFT_WINDOW]
        for start in range(0, max(1, len(firsts) - TTFT_WINDOW // 2), TTFT_WINDOW // 2)
    ]
    return max(
        ((max(window), statistics.median(window)) for window in windows if window),
        key=lambda pair: pair[0] / pair[1],
        default=(0.0, 0.0),
    )


def checks(
    watch: Watch, before: Sample, after: Sample, metrics: dict[str, float], args: argparse.Namespace
) -> list[Check]:
    """Returns the results of all checks.

    Args:
        before: the sample of the rest before the load.
        after: the sample of the rest after it.
        metrics: the server's metrics at the end.
    """
    tally = watch.tally
    slope_mb = growth([sample for sample in watch.samples if sample.seconds >= before.seconds])
    growth_mb = (after.megabytes - before.megabytes) / max(1, after.requests - before.requests) * 1000
    longest, median = waits(tally.firsts)
    ratio = longest / median if longest else 0.0
    server_errors = sum(count for status, count in tally.statuses.items() if status >= 500 and status != 501)
    idle = {name: metrics[name] for name in IDLE_METRICS}
    num_kinds, num_fixed = len(set(tally.done) & set(ACTIONS)), len(tally.fixed)
    rows = [
        ("answers with status 5xx", server_errors, "0", server_errors == 0),
        ("answers that were wrong", len(tally.wrong), "0", not tally.wrong),
        ("kinds of actions done", f"{num_kinds} of {len(ACTIONS)}", "all", num_kinds == len(ACTIONS)),
        (
            "fixed questions asked",
            f"{num_fixed} of {len(FIXED)}, {tally.done['fixed']} times",
            "each the same",
            num_fixed > 0,
        ),
        ("requests preempted", f"{metrics['num_preemptions_total']:.0f}", "some", metrics["num_preemptions_total"] > 0),
        (
            "first token, largest / median",
            f"{longest:.2f} / {median:.3f} s: {ratio:.1f}",
            f"{args.wait:.0f} of {TTFT_WINDOW} in a row",
            ratio <= args.wait,
        ),
        ("memory for 1000 requests", f"{growth_mb:+.3f} MB", f"{args.growth} MB", growth_mb <= args.growth),
        ("memory, rest to rest", f"{before.megabytes:.1f} -> {after.megabytes:.1f} MB", "", True),
        ("memory slope, load and rest", f"{slope_mb:+.3f} MB for 1000 requests", "", True),
        ("open files, rest to rest", f"{before.files} -> {after.files}", "the same", before.files == after.files),
        ("threads, rest to rest", f"{before.threads} -> {after.threads}", "the same", before.threads == after.threads),
        ("/health", f"{len(watch.unhealthy)} bad", "0", not watch.unhealthy),
        ("engine's restarts", f"{metrics['engine_restarts_total']:.0f}", "0", not metrics["engine_restarts_total"]),
        (
            "idle at the end",
            ", ".join(f"{value:g}" for value in idle.values()),
            "running, waiting, pages 0",
            idle == IDLE_METRICS,
        ),
    ]  # fmt: skip
    return [Check(name, str(found), bound, good) for name, found, bound, good in rows]


def report(watch: Watch, results: list[Check]) -> None:
    """Prints the requests, the errors and the table of checks."""
    tally = watch.tally
    seconds = watch.samples[-1].seconds
    print(
        f"\n{tally.requests} requests in {seconds:.0f} s: "
        + ", ".join(f"{count} {name}" for name, count in tally.done.most_common())
    )
    print("status: " + ", ".join(f"{status} {count} times" for status, count in sorted(tally.statuses.items())))
    for line in [*dict.fromkeys(tally.wrong), *dict.fromkeys(watch.unhealthy)][:20]:
        print(f"  {line}")
    widths = [max(len(getattr(row, name)) for row in results) + 2 for name in ("name", "found", "bound")]
    for row in results:
        cells = zip((row.name, row.found, row.bound), widths, strict=True)
        print("".join(f"{cell:{width}}" for cell, width in cells) + ("ok" if row.good else "FAILED"))


def main(argv: list[str] | None = None) -> int:
    """Runs the soak test. Exit status 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="duration of the load in seconds (default 1800)")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="concurrent clients (default 16)")
    parser.add_argument(
        "--every", type=float, default=10.0, metavar="SECONDS", help="interval of progress lines (default 10)"
    )
    parser.add_argument(
        "--rest",
        type=float,
        default=REST_S,
        metavar="SECONDS",
        help=f"idle time before and after the load (default {REST_S:.0f})",
    )
    parser.add_argument(
        "--growth",
        type=float,
        default=MAX_GROWTH_MB,
        metavar="MB",
        help=f"max growth of memory per 1000 requests (default {MAX_GROWTH_MB})",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=MAX_TTFT_RATIO,
        metavar="TIMES",
        help=f"max ratio of the longest first token to the median (default {MAX_TTFT_RATIO:.0f})",
    )
    args = parser.parse_args(argv)
    from ktx.cli.bench_child import ServerProcess

    server = ServerProcess(SERVER)
    with server as base:
        assert server.process
        watch, results = asyncio.run(soak(base, psutil.Process(server.process.pid), args))
    report(watch, results)
    return 0 if all(row.good for row in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
