"""ktx bench: prefill and decode speed, beside a peer and the machine's own limits, alternating in one run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ktx.commands.arguments import counts, flag, model_options, positive

SUMMARY = "measure prefill and decode speed, beside llama.cpp if asked"
PEERS = ("llama.cpp",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument(
        "-p", "--prompt", type=counts, default=[512], metavar="N[,N]", help="prompt lengths (default 512)"
    )
    parser.add_argument(
        "-n", "--tokens", type=counts, default=[32], metavar="N[,N]", help="tokens to generate (default 32)"
    )
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="threads of every engine (default: usable physical cores)"
    )
    parser.add_argument(
        "-r", "--repeat", type=positive, default=3, metavar="N", help="rounds; medians are shown (default 3)"
    )
    parser.add_argument(
        "--peer", choices=PEERS, help="engine to run beside ktx on the same file, best of its repack on and off"
    )
    flag(parser, "--json", help="one JSON object a line")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to this file")


class Worker:
    """An engine in a process of its own."""

    def __init__(self, name: str, module: str, words: list[str]):
        self.name = name
        path = os.pathsep.join(
            filter(
                None,
                [
                    str(Path(__file__).resolve().parents[2]),
                    os.environ.get("PYTHONPATH"),
                    os.environ.get("KTX_PEER_PATH"),
                ],
            )
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        from ktx.errors import KtxError

        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise KtxError(
                f"{self.name} ended without an answer (exit status {self.process.wait()}); was there enough memory?"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = KtxError(answer["error"])
            error.exit_code = answer["exit"]
            raise error
        return answer

    def measure(self, test: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"test": test}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def run(args: argparse.Namespace) -> int:
    """Measures and prints; with --peer the engines take turns so that both see the same machine."""
    from ktx.hardware import default_threads

    args.threads = args.threads or default_threads()
    tests = [f"pp{n}" for n in args.prompt] + [f"tg{n}" for n in args.tokens]
    best, alone = _best_peer(args, tests) if args.peer else (None, {})
    mine = Worker("ktx", "ktx.commands.bench_ktx", _ktx_words(args))
    peer = _peer(args, tests, best) if best is not None else None
    rounds: dict[str, dict[str, list[Any]]] = {test: {"ktx": [], "peer": []} for test in tests}
    for _ in range(args.repeat):
        for test in tests:
            rounds[test]["ktx"].append(mine.measure(test))
            if peer:
                rounds[test]["peer"].append(peer.measure(test)["tok_s"])
    facts = mine.facts
    mine.stop()
    if peer:
        peer.stop()
    lines = [line for test in tests for line in _lines(test, rounds[test], alone, args, facts, best)]
    for line in lines:
        if args.json:
            print(json.dumps(line))
    if not args.json:
        _table(lines, facts, best)
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return 0


def _ktx_words(args: argparse.Namespace) -> list[str]:
    words = ["--model", str(args.model), "--threads", str(args.threads)]
    words += ["--weights", str(args.weights)] if args.weights else []
    words += ["--rules", str(args.rules)] if args.rules else []
    return words + (["--trust"] if args.trust_remote_code else [])


def _peer(args: argparse.Namespace, tests: list[str], repack: int) -> Worker:
    context = max(int(test[2:]) for test in tests) + 16
    words = [
        "--weights",
        str(args.weights or args.model),
        "--threads",
        str(args.threads),
        "--repack",
        str(repack),
        "--context",
        str(context),
    ]
    return Worker("llama.cpp", "ktx.commands.bench_llama_cpp", words)


def _best_peer(args: argparse.Namespace, tests: list[str]) -> tuple[int, dict[str, float]]:
    """The peer with repacking on and off, each alone in memory: the better at the first test, and the best figure of each test."""
    alone: dict[int, dict[str, float]] = {}
    for repack in (1, 0):
        worker = _peer(args, tests, repack)
        alone[repack] = {test: max(worker.measure(test)["tok_s"] for _ in range(2)) for test in tests}
        worker.stop()
    best = max(alone, key=lambda repack: alone[repack][tests[0]])
    return best, {test: max(alone[0][test], alone[1][test]) for test in tests}


def _lines(
    test: str,
    rounds: dict[str, list[Any]],
    alone: dict[str, float],
    args: argparse.Namespace,
    facts: dict[str, Any],
    best: int | None,
) -> list[dict[str, Any]]:
    speeds = [row["tok_s"] for row in rounds["ktx"]]
    share = statistics.median(row["share"] for row in rounds["ktx"])
    common = {
        "test": test,
        "threads": args.threads,
        "commit": commit(),
        "rounds": args.repeat,
        "model": str(args.weights or args.model),
    }
    limit = "share_of_int8_peak" if test.startswith("pp") else "share_of_read_bandwidth"
    unit = "int8_peak_gops" if test.startswith("pp") else "read_gb_s"
    mine = {
        "engine": "ktx",
        "tok_s": statistics.median(speeds),
        "spread": [min(speeds), max(speeds)],
        "isa": facts["isa"],
        limit: share,
        unit: statistics.median(row["limit"] for row in rounds["ktx"]),
        "peak_rss": facts["peak_rss"],
        "load_gb_s": facts["load_gb_s"],
    }
    if not rounds["peer"]:
        return [common | mine]
    median = statistics.median(rounds["peer"])
    theirs = {
        "engine": f"llama.cpp (repack {'on' if best else 'off'})",
        "tok_s": median,
        "spread": [min(rounds["peer"]), max(rounds["peer"])],
        "best_alone": alone[test],
        "isa": "its own choice",
    }
    mine["ratio"] = mine["tok_s"] / median
    mine["ratio_to_best_alone"] = mine["tok_s"] / max(median, alone[test])
    return [common | mine, common | theirs]


def commit() -> str:
    """The checkout's commit, or the version of an installed wheel."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    import ktx

    return done.stdout.strip() or ktx.__version__


def _table(lines: list[dict[str, Any]], facts: dict[str, Any], best: int | None) -> None:
    print(
        f"{facts['isa']} kernels, {facts['threads']} threads, {facts['bytes'] / 1e9:.2f} GB packed, loaded in {facts['load_seconds']:.1f} s ({facts['load_gb_s']:.2f} GB/s), "
        f"peak RSS {facts['peak_rss'] / 1e9:.2f} GB (bound {facts['rss_bound'] / 1e9:.2f})"
    )
    print(f"{'test':8}{'engine':26}{'tok/s':>9}{'spread':>17}{'ratio':>8}  limit")
    for line in lines:
        spread = f"{line['spread'][0]:.2f}-{line['spread'][1]:.2f}"
        ratio = f"{line['ratio']:.2f}x" if "ratio" in line else ""
        limit = ""
        if "share_of_int8_peak" in line:
            limit = f"{line['share_of_int8_peak']:.0%} of {line['int8_peak_gops']:.0f} GOPS int8"
        elif "share_of_read_bandwidth" in line:
            limit = f"{line['share_of_read_bandwidth']:.0%} of {line['read_gb_s']:.1f} GB/s read"
        elif "best_alone" in line:
            limit = f"best alone {line['best_alone']:.2f}"
        print(f"{line['test']:8}{line['engine']:26}{line['tok_s']:>9.2f}{spread:>17}{ratio:>8}  {limit}")
