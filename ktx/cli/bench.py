"""ktx bench: prefill and decode speed, beside a peer and the machine's own limits, alternating in one run."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ktx.cli import bench_serve
from ktx.cli.arguments import (
    Inner,
    debug_option,
    flag,
    gguf_in,
    load_options,
    lora_option,
    model_options,
    natural,
    options_of,
    positive,
    refuse,
    require_model,
)
from ktx.errors import KtxError, UsageError
from ktx.weights.gguf_files import is_gguf

SUMMARY = "measure prefill and decode speed, or one layer, beside llama.cpp, ik_llama.cpp, kt-kernel or ftllm"
REPACKERS = (
    "llama.cpp",
    "ik_llama.cpp",
)  # run with repacking on and off, and with each of UBATCHES, whichever is better
UBATCHES = (512, 2048)  # tokens that they compute at once; the second for prompts that are longer than the first
PEERS = (*REPACKERS, "kt-kernel", "ftllm")
SLACK = 1 << 30  # memory that is left alone when both engines are loaded
OF_LAYERS = ("layer", "formats", "prompt", "threads", "repeat", "peer", "record")  # options that --layer reads
LONGEST = 1 << 24  # tokens: more than any model has a context for
PAUSE = 0.3  # seconds before a measurement, until the other engine's threads have gone to sleep
LOADING = ("isa", "load_seconds", "load_gb_s", "cat_gb_s", "pack_gb_s", "fresh_gb_s", "peak_rss", "rss_bound")
PROBED = {"probe_bytes": "read", "cache_bytes": "last-level cache"}  # what the read limit was measured on
Rounds = dict[str, dict[str, list[dict[str, Any]]]]  # test -> engine -> one measurement a round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    lora_option(parser, "their sum is computed")
    for names, default, what in (
        (("-p", "--prompt"), 512, "prompt lengths"),
        (("-n", "--tokens"), 32, "tokens to generate"),
    ):
        parser.add_argument(
            *names, type=lengths, default=[default], metavar="N[,N]", help=f"{what} (default {default}; 0: none)"
        )
    parser.add_argument(
        "-d", "--depth", type=lengths, default=[0], metavar="N[,N]", help="tokens that lie before each test (default 0)"
    )
    parser.add_argument("-t", "--threads", type=positive, metavar="N", help="of every engine (default: usable cores)")
    parser.add_argument("-r", "--repeat", type=positive, default=3, metavar="N", help="rounds; medians are shown")
    parser.add_argument(
        "--peer",
        choices=PEERS,
        help="runs beside ktx in turns: llama.cpp or ik_llama.cpp on the same file (best of its repack on and off, and of -ub 512 and 2048), ftllm on a model or a layer, kt-kernel on a layer",
    )
    parser.add_argument(
        "--layer",
        metavar="E,K,H,W",
        help="no model: one layer of E experts, K a token, H hidden columns, W rows, for each of --prompt tokens, with errors",
    )
    parser.add_argument(
        "--formats", metavar="F[,F]", help="with --layer: ktx's formats to measure (default: all that the peer has)"
    )
    flag(parser, "--json", help="one JSON object a line")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to this file")
    inner = parser.add_subparsers(dest="bench", metavar="COMMAND", action=Inner, parser_class=type(parser))
    serve = inner.add_parser(
        "serve", help=bench_serve.SUMMARY, description=(bench_serve.__doc__ or "").partition(": ")[2]
    )
    bench_serve.add_arguments(serve)
    debug_option(serve)


class Engine:
    """An engine in a process of its own, started when it is first needed. It speaks JSON lines: a test, its figures. `more_than`: tokens of a prompt that it is for."""

    def __init__(self, name: str, module: str, words: list[str], more_than: int = 0):
        self.name, self.command, self.more_than = name, [sys.executable, "-m", module, *words], more_than
        self.process: subprocess.Popen[str] | None = None
        self.facts: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """Loads the model; what the engine says of itself."""
        if self.process is None:
            own = str(Path(__file__).resolve().parents[2])
            path = [own, os.environ.get("PYTHONPATH"), os.environ.get("KTX_PEER_PATH")]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, env=environment)
            self.facts = self._answer()
        return self.facts

    def measure(self, test: str | dict[str, Any]) -> dict[str, Any]:
        self.start()
        time.sleep(PAUSE)
        assert self.process and self.process.stdin
        self.process.stdin.write(json.dumps({"test": test}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process, so that its memory is free again."""
        if self.process:
            self.process.communicate()
        self.process = None

    def _answer(self) -> dict[str, Any]:
        assert self.process and self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.process = None
            raise KtxError(f"{self.name} ended without an answer (exit status {status}); was there enough memory?")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = KtxError(answer["error"])
            error.exit_code = answer["exit"]
            raise error
        return answer


def run(args: argparse.Namespace) -> int:
    """Measures and prints; with --peer the engines take turns so that both see the same machine."""
    from ktx.hardware import default_threads

    if args.bench == "serve":
        return bench_serve.run(args)
    if args.layer:
        from ktx.cli import bench_layer

        others = {name: action for name, action in options_of(add_arguments).items() if name not in OF_LAYERS}
        refuse(args, others, "goes with a model, not with --layer")
        try:
            args.layer = bench_layer.Layer.read(args.layer)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--layer {error}") from None
        args.threads = args.threads or default_threads()
        return bench_layer.run(args)
    refuse(args, {"formats": options_of(add_arguments)["formats"]}, "goes with --layer")
    if args.peer == "kt-kernel":
        raise UsageError("--peer kt-kernel runs no whole models on a CPU: give --layer, e.g. --layer 64,8,2048,1536")
    require_model(args)
    if args.lora and args.peer:
        raise UsageError(f"--lora: {args.peer} would compute the model without it; leave --peer out")
    args.threads = args.threads or default_threads()
    kinds = [f"pp{n}" for n in args.prompt if n] + [f"tg{n}" for n in args.tokens if n]
    if not kinds:
        raise UsageError("-p 0 and -n 0 leave nothing to measure: give one of them a number of tokens")
    tests = [f"{kind}@d{depth}" if depth else kind for kind in kinds for depth in args.depth]
    mine = Engine("ktx", "ktx.cli.bench_ktx", _ktx_words(args))
    engines, alone = _best_peers(args, tests) if args.peer else ({None: tests}, {})
    rounds: Rounds = {}
    facts = mine.start()
    together, room = _room(args) if args.peer else (True, "")
    try:
        for peer, its_tests in engines.items():
            rounds |= alternate([mine, peer] if peer else [mine], its_tests, args.repeat, together)
            if peer:
                peer.stop()
    finally:
        mine.stop()
    lines = [line for test in tests for line in _lines(test, rounds[test], alone, args, facts)]
    if not args.json:
        _table(lines, facts, room)
    for line in lines if args.json else ():
        print(json.dumps(line))
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return 0


def alternate(engines: list[Engine], tests: list[str], repeat: int, together: bool) -> Rounds:
    """Rounds of every test on every engine: test by test when all fit in memory, else one engine at a time."""
    turns = [(e, t) for t in tests for e in engines] if together else [(e, t) for e in engines for t in tests]
    found: Rounds = {test: {engine.name: [] for engine in engines} for test in tests}
    for _ in range(repeat):
        for engine, test in turns:
            for other in engines:
                if other is not engine and not together:
                    other.stop()
            found[test][engine.name].append(engine.measure(test))
    return found


def lengths(text: str) -> list[int]:
    """One or several numbers of tokens, each once, of which 0 may be one: 0,8192."""
    found = [natural(part) for part in text.split(",")]
    if max(found) > LONGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LONGEST} tokens, found {max(found)}")
    return list(dict.fromkeys(found))


def parts(test: str) -> tuple[str, int, int]:
    """Kind, tokens and depth of a test: "tg32@d8192" is ("tg", 32, 8192)."""
    kind, _, depth = test.partition("@d")
    return kind[:2], int(kind[2:]), int(depth or 0)


def token_ids(count: int, vocabulary: int) -> list[int]:
    """What every engine reads: the same random ids, so that its routers see the same variety."""
    source = random.Random(1)
    return [source.randrange(3, vocabulary) for _ in range(count)]


def _ktx_words(args: argparse.Namespace) -> list[str]:
    words = ["--model", str(args.model), "--threads", str(args.threads)]
    words += ["--weights", str(args.weights)] if args.weights else []
    words += ["--rules", str(args.rules)] if args.rules else []
    return [*words, "--options", json.dumps(load_options(args))]


def _gguf(args: argparse.Namespace) -> Path:
    """The file a peer can read."""
    path = gguf_in(Path(args.weights or args.model).expanduser())
    if args.peer == "ftllm" and path.is_dir():
        return path
    if not is_gguf(path) or not path.exists():
        raise UsageError(f"{path}: {args.peer} reads GGUF files only; give one to --weights, or leave --peer out")
    return path


def _peer(args: argparse.Namespace, tests: list[str], repack: int, ubatch: int) -> Engine:
    context = max(count + depth for _, count, depth in map(parts, tests)) + 16
    words = [
        "--engine",
        args.peer,
        "--weights",
        str(_gguf(args)),
        "--threads",
        str(args.threads),
        "--repack",
        str(repack),
        "--ubatch",
        str(ubatch),
        "--context",
        str(context),
    ]
    name = f"{args.peer} (repack {'on' if repack else 'off'}, -ub {ubatch})"
    return Engine(name, "ktx.cli.bench_llama_cpp", words, more_than=0 if ubatch == UBATCHES[0] else UBATCHES[0])


def _peers(args: argparse.Namespace, tests: list[str]) -> list[Engine]:
    """The forms in which a peer may run."""
    if args.peer in REPACKERS:
        return [_peer(args, tests, repack, ubatch) for ubatch in UBATCHES for repack in (1, 0)]
    path = _gguf(args)
    folder = Path(args.model).expanduser()
    if not (folder / "config.json").exists():
        raise UsageError(f"{args.model}: ftllm needs the model's folder (config.json, tokenizer) in --model")
    return [
        Engine(
            "ftllm",
            "ktx.cli.bench_ftllm",
            ["--weights", str(path), "--model", str(folder), "--threads", str(args.threads)],
        )
    ]


def _best_peers(args: argparse.Namespace, tests: list[str]) -> tuple[dict[Engine | None, list[str]], dict[str, float]]:
    """The peer in each of its forms, each alone in memory: the better one for each test, and its figure."""
    alone: dict[Engine, dict[str, float]] = {}
    for engine in _peers(args, tests):
        own = [test for test in tests if not engine.more_than or _is_prompt(test, engine.more_than)]
        alone[engine] = {test: max(engine.measure(test)["tok_s"] for _ in range(2)) for test in own}
        engine.stop()
    best: dict[Engine | None, list[str]] = {}
    for test in tests:
        best.setdefault(max(alone, key=lambda engine: alone[engine].get(test, 0.0)), []).append(test)
    return best, {test: max(figures.get(test, 0.0) for figures in alone.values()) for test in tests}


def _is_prompt(test: str, more_than: int) -> bool:
    kind, count, _ = parts(test)
    return kind == "pp" and count > more_than


def _room(args: argparse.Namespace) -> tuple[bool, str]:
    """Whether a peer fits beside the loaded ktx (repacking moves weights, it does not double them), in words too."""
    from ktx.hardware import memory

    path = _gguf(args)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size
    need, free = size + SLACK, memory()[1]
    if need <= free:
        return True, "both engines in memory, taking turns test by test"
    return False, f"one engine in memory at a time: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed for a second"


def _lines(
    test: str,
    found: dict[str, list[dict[str, Any]]],
    alone: dict[str, float],
    args: argparse.Namespace,
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """The records of one test: ktx's, then the peer's."""
    common = (
        {"test": test}
        | stamp()
        | {"threads": args.threads, "rounds": args.repeat, "model": str(args.weights or args.model)}
    )
    lines = []
    for engine, rows in found.items():
        speeds = [row["tok_s"] for row in rows]
        middle = {key: statistics.median(row[key] for row in rows) for key in ("limit", "share") if key in rows[0]}
        lines.append(
            common
            | {"engine": engine, "tok_s": statistics.median(speeds), "spread": [min(speeds), max(speeds)]}
            | middle
        )
    lines[0] |= {key: facts[key] for key in (*LOADING, *PROBED)}
    errors = facts["errors"][test[:2]]
    lines[0] |= {"errors": errors, "relative_error": max(errors.values(), default=0.0)}
    lines[0]["limit_unit"] = "GOPS int8" if test.startswith("pp") else "GB/s read"
    for peer in lines[1:]:
        peer |= {"best_alone": alone[test], "isa": found[peer["engine"]][0]["isa"]}
        lines[0]["ratio"] = lines[0]["tok_s"] / peer["tok_s"]
    return lines


def stamp() -> dict[str, str]:
    """When, where and on what a figure was measured."""
    from ktx.hardware import machine

    m = machine()
    return {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": f"{m.cpu}, {m.cores} cores"}


def commit() -> str:
    """The checkout's commit, with -dirty when files differ from it, or the version of an installed wheel."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    import ktx

    return done.stdout.strip() or ktx.__version__


def _table(lines: list[dict[str, Any]], facts: dict[str, Any], room: str) -> None:
    threads, gb = f"{facts['threads']} threads", {key: facts[key] / 1e9 for key in ("bytes", "peak_rss", "rss_bound")}
    print(f"{lines[0]['machine']}: {facts['isa']} kernels, {threads}; {gb['bytes']:.2f} GB packed")
    limits = f"cat {facts['cat_gb_s']:.2f}, packing {facts['pack_gb_s']:.2f}, new memory {facts['fresh_gb_s']:.2f} GB/s"
    print(f"loaded in {facts['load_seconds']:.1f} s, {facts['load_gb_s']:.2f} GB/s; alone on {threads}: {limits}")
    print(f"peak RSS {gb['peak_rss']:.2f} GB, bound {gb['rss_bound']:.2f} GB")
    sizes = ", ".join(f"{what} {facts[key] >> 20} MiB" for key, what in PROBED.items())
    print(f"read bandwidth, the limit of tg, is measured before each round: {sizes}")
    print(*filter(None, [room]), sep="\n", end="\n" if room else "")
    width = max(len(line["engine"]) for line in lines) + 2
    first = max(8, *(len(line["test"]) + 2 for line in lines))
    worst = {kind: max(found.items(), key=lambda item: item[1]) for kind, found in facts["errors"].items() if found}
    told = ", ".join(f"{kind} {value:.2%} ({name})" for kind, (name, value) in worst.items())
    print(f"error of a matrix against float64 on the same weights, worst type: {told}")
    print(f"{'test':{first}}{'engine':{width}}{'tok/s':>9}{'spread':>18}{'ratio':>8}{'error':>8}  limit")
    for line in lines:
        spread = f"{line['spread'][0]:.2f}-{line['spread'][1]:.2f}"
        ratio = f"{line['ratio']:.2f}x" if "ratio" in line else ""
        limit = (
            f"{line['share']:.0%} of {line['limit']:.1f} {line['limit_unit']}"
            if "share" in line
            else f"alone {line['best_alone']:.2f}"
        )
        wrong = f"{line['relative_error']:.2%}" if "relative_error" in line else ""
        print(
            f"{line['test']:{first}}{line['engine']:{width}}{line['tok_s']:>9.2f}{spread:>18}{ratio:>8}{wrong:>8}  {limit}"
        )
