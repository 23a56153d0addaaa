"""ktx bench: measure prefill and decode speed, alternating with a peer, and compare with the machine's limits."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktx.cli import bench_serve
from ktx.cli.arguments import (
    SubCommands,
    debug_option,
    first_gguf,
    flag,
    load_arguments,
    lora_option,
    model_options,
    non_negative,
    options_of,
    positive,
    reject_options,
    require_model,
)
from ktx.cli.bench_process import BenchProcess, parse_test, run_metadata
from ktx.errors import UsageError
from ktx.weights.gguf_files import is_gguf

SUMMARY = "measure prefill and decode speed, also against llama.cpp or ik_llama.cpp, or one MoE layer"
EPILOG = (
    "A test is pp512 (prefill of 512 tokens) or tg32 (decode of 32 tokens), with @d8192 after a context of 8192."
    " Examples: ktx bench --model DIR --weights FILE.gguf --peer llama.cpp; ktx bench --layer 64,8,2048,1536 -p 1,512"
)
# run with repacking on and off and with each of UBATCHES; the better result counts
PEERS = ("llama.cpp", "ik_llama.cpp")
UBATCHES = (512, 2048)  # their micro-batch sizes in tokens; the second for prompts that are longer than the first
SCRIPT = "benchmarks/peers/compare.py"  # of a checkout, for SCRIPT_PEERS
SCRIPT_PEERS = ("kt-kernel", "ftllm")
RESERVED_BYTES = 1 << 30  # memory that stays free when both engines are loaded
LAYER_OPTIONS = ("layer", "formats", "prompt", "threads", "repeat", "peer", "record")  # options that --layer reads
MAX_TOKENS = 1 << 24  # more than the context of any model
LOAD_FIELDS = ("isa", "load_seconds", "load_gb_s", "cat_gb_s", "pack_gb_s", "fresh_gb_s", "peak_rss", "rss_bound")
PROBE_FIELDS = {"probe_bytes": "read", "cache_bytes": "last-level cache"}  # sizes of the read bandwidth's measurement
Rounds = dict[str, dict[str, list[dict[str, Any]]]]  # test -> engine -> one measurement per round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktx bench` to its parser."""
    parser.epilog = EPILOG
    measurement_options(parser)
    lora_option(parser, "the sum of all adapters is applied")
    parser.add_argument(
        "--peer",
        type=peer_name,
        choices=PEERS,
        help="engine to measure in alternation with ktx, on the same file: the best of repacking on and off and of"
        " -ub 512 and 2048",
    )
    subcommands = parser.add_subparsers(dest="bench", metavar="COMMAND", action=SubCommands, parser_class=type(parser))
    serve = subcommands.add_parser(
        "serve", help=bench_serve.SUMMARY, description=(bench_serve.__doc__ or "").partition(": ")[2]
    )
    bench_serve.add_arguments(serve)
    debug_option(serve)


def measurement_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a measurement, which `ktx bench` and benchmarks/peers/compare.py share."""
    model_options(parser)
    for names, default, what in (
        (("-p", "--prompt"), 512, "prefill tests: prompt lengths in tokens"),
        (("-n", "--tokens"), 32, "decode tests: numbers of tokens to generate"),
    ):
        parser.add_argument(
            *names, type=lengths, default=[default], metavar="N[,N]", help=f"{what} (default {default}; 0: none)"
        )
    parser.add_argument(
        "-d",
        "--depth",
        type=lengths,
        default=[0],
        metavar="N[,N]",
        help="tokens in the KV cache before each test (default 0)",
    )
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="threads of each engine (default: usable physical cores)"
    )
    parser.add_argument(
        "-r", "--repeat", type=positive, default=3, metavar="N", help="rounds; the median is reported (default 3)"
    )
    parser.add_argument(
        "--layer",
        metavar="E,K,H,W",
        help="instead of a model, measure one MoE layer of E experts, K per token, hidden size H and expert width W,"
        " with --prompt tokens per call, and its error",
    )
    parser.add_argument(
        "--formats",
        metavar="F[,F]",
        help="with --layer: formats to measure, by ktx's names (default: all)",
    )
    flag(parser, "--json", help="print JSON lines instead of a table")
    parser.add_argument("--record", metavar="FILE", help="append the JSON lines to FILE")


def run(args: argparse.Namespace) -> int:
    """Measures a model's prefill and decode, one MoE layer (--layer) or a server (`ktx bench serve`); prints a table.

    With --peer both engines take turns, so that they run under the same conditions.
    """
    if args.bench == "serve":
        return bench_serve.run(args)
    if args.layer:
        from ktx.cli import bench_layer

        if args.peer:
            raise UsageError(f"--layer does not support --peer {args.peer}: {SCRIPT} runs {' or '.join(SCRIPT_PEERS)}")
        read_layer(args)
        return bench_layer.run(args)
    tests = read_tests(args)
    if args.lora and args.peer:
        raise UsageError(f"--lora: {args.peer} would compute the model without it; leave --peer out")
    if not args.peer:
        return measure_model(args, tests)
    configurations = [_repacking_peer(args, tests, repack, ubatch) for ubatch in UBATCHES for repack in (1, 0)]
    return measure_model(args, tests, configurations, gguf_path(args).stat().st_size)


def peer_name(text: str) -> str:
    """Parses --peer; the message for a peer that a script measures names the script."""
    if text in SCRIPT_PEERS:
        raise argparse.ArgumentTypeError(f"for {text} run, in a checkout of ktx: python {SCRIPT} --peer {text}")
    return text


def read_layer(args: argparse.Namespace) -> None:
    """Parses --layer and sets the default of --threads; raises UsageError for options that --layer does not read."""
    from ktx.cli.bench_moe_layer import MoELayer
    from ktx.hardware import default_threads

    other_options = {name: action for name, action in options_of(add_arguments).items() if name not in LAYER_OPTIONS}
    reject_options(args, other_options, "has no effect with --layer, which measures no model")
    try:
        args.layer = MoELayer.read(args.layer)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--layer {error}") from None
    args.threads = args.threads or default_threads()


def read_tests(args: argparse.Namespace) -> list[str]:
    """Returns the tests of a model, such as "pp512" and "tg32@d8192", and sets the default of --threads.

    Raises:
        UsageError: no model is given, nothing is left to measure, or an option needs --layer.
    """
    from ktx.hardware import default_threads

    reject_options(args, {"formats": options_of(add_arguments)["formats"]}, "needs --layer")
    require_model(args)
    args.threads = args.threads or default_threads()
    kinds = [f"pp{n}" for n in args.prompt if n] + [f"tg{n}" for n in args.tokens if n]
    if not kinds:
        raise UsageError("-p 0 and -n 0 leave nothing to measure: give one of them a number of tokens")
    return [f"{kind}@d{depth}" if depth else kind for kind in kinds for depth in args.depth]


def measure_model(
    args: argparse.Namespace, tests: list[str], peers: Sequence[BenchProcess] = (), peer_bytes: int = 0
) -> int:
    """Measures and prints the tests of a model, alternating with the peer; returns exit status 0.

    Args:
        peers: the peer's process in each configuration to try; the best one counts for each test.
        peer_bytes: size of the weights that the peer loads.
    """
    ktx_engine = BenchProcess("ktx", "ktx.cli.bench_ktx", _ktx_arguments(args))
    peer_tests, best_alone = _best_peers(peers, tests) if peers else ({None: tests}, {})  # None: no peer
    rounds: Rounds = {}
    startup_report = ktx_engine.start()
    both_fit, memory_note = _both_fit(peer_bytes) if peers else (True, "")
    try:
        for peer, tests_of_peer in peer_tests.items():
            rounds |= alternate([ktx_engine, peer] if peer else [ktx_engine], tests_of_peer, args.repeat, both_fit)
            if peer:
                peer.stop()
    finally:
        ktx_engine.stop()
    lines = [line for test in tests for line in _make_records(test, rounds[test], best_alone, args, startup_report)]
    if not args.json:
        _print_table(lines, startup_report, memory_note)
    for line in lines if args.json else ():
        print(json.dumps(line))
    if args.record:
        with open(args.record, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return 0


def alternate(engines: list[BenchProcess], tests: list[str], repeat: int, all_fit: bool) -> Rounds:
    """Measures every test on every engine, `repeat` times; the engines take turns, to run under the same conditions.

    Args:
        all_fit: all engines fit in memory, so they alternate test by test; else one engine at a time is loaded.
    """
    # Either test by test, or engine by engine, each of which is then loaded once per round.
    order = [(e, t) for t in tests for e in engines] if all_fit else [(e, t) for e in engines for t in tests]
    rounds: Rounds = {test: {engine.name: [] for engine in engines} for test in tests}
    for _ in range(repeat):
        for engine, test in order:
            for other in engines:
                if other is not engine and not all_fit:
                    other.stop()
            rounds[test][engine.name].append(engine.measure(test))
    return rounds


def lengths(text: str) -> list[int]:
    """Parses numbers of tokens separated by commas, without duplicates; 0 is allowed: 0,8192."""
    counts = [non_negative(part) for part in text.split(",")]
    if max(counts) > MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_TOKENS} tokens, found {max(counts)}")
    return list(dict.fromkeys(counts))


def _ktx_arguments(args: argparse.Namespace) -> list[str]:
    arguments = ["--model", str(args.model), "--threads", str(args.threads)]
    arguments += ["--weights", str(args.weights)] if args.weights else []
    arguments += ["--rules", str(args.rules)] if args.rules else []
    return [*arguments, "--options", json.dumps(load_arguments(args))]


def gguf_path(args: argparse.Namespace) -> Path:
    """Returns the path of the weights for the peer; raises UsageError if they are not a GGUF file."""
    path = first_gguf(Path(args.weights or args.model).expanduser())
    if not is_gguf(path) or not path.exists():
        raise UsageError(f"{path}: {args.peer} reads GGUF files only; give one to --weights, or leave --peer out")
    return path


def _repacking_peer(args: argparse.Namespace, tests: list[str], repack: int, ubatch: int) -> BenchProcess:
    """Returns the process that runs llama.cpp or ik_llama.cpp with weights repacked or not and one micro-batch size.

    Repacked weights and larger micro-batches are each faster on some machines and tests only, so all combinations are
    tried. A larger micro-batch cannot change tests of fewer tokens: `more_than` skips those.
    """
    # 16 more, for the warm-up and for the short prompt of a decode test
    context = max(count + depth for _, count, depth in map(parse_test, tests)) + 16
    arguments = [
        "--engine",
        args.peer,
        "--weights",
        str(gguf_path(args)),
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
    return BenchProcess(
        name, "ktx.cli.bench_llama_cpp", arguments, more_than=0 if ubatch == UBATCHES[0] else UBATCHES[0]
    )


def _best_peers(
    configurations: Sequence[BenchProcess], tests: list[str]
) -> tuple[dict[BenchProcess | None, list[str]], dict[str, float]]:
    """Finds the peer's fastest configuration for each test, because ktx is compared with the peer at its best.

    Each configuration runs alone in memory; the better of two runs counts.

    Returns:
        For each configuration that was fastest in some tests these tests; and the best speed of each test in tokens/s.
    """
    speeds: dict[BenchProcess, dict[str, float]] = {}
    for engine in configurations:
        own_tests = [test for test in tests if not engine.more_than or _is_prompt(test, engine.more_than)]
        speeds[engine] = {test: max(engine.measure(test)["tok_s"] for _ in range(2)) for test in own_tests}
        engine.stop()
    best: dict[BenchProcess | None, list[str]] = {}
    for test in tests:
        best.setdefault(max(speeds, key=lambda engine: speeds[engine].get(test, 0.0)), []).append(test)
    return best, {test: max(figures.get(test, 0.0) for figures in speeds.values()) for test in tests}


def _is_prompt(test: str, more_than: int) -> bool:
    kind, count, _ = parse_test(test)
    return kind == "pp" and count > more_than


def _both_fit(peer_bytes: int) -> tuple[bool, str]:
    """Returns whether the peer with weights of `peer_bytes` fits in memory together with ktx, and a text that says so.

    If both fit, the engines alternate test by test and see the same conditions. Repacking moves the peer's weights, it
    does not double them.
    """
    from ktx.hardware import memory

    needed_bytes, free_bytes = peer_bytes + RESERVED_BYTES, memory()[1]
    if needed_bytes <= free_bytes:
        return True, "both engines in memory, alternating test by test"
    return (
        False,
        f"one engine in memory at a time: {free_bytes / 1e9:.1f} GB free,"
        f" {needed_bytes / 1e9:.1f} GB needed for a second",
    )


def _make_records(
    test: str,
    measurements: dict[str, list[dict[str, Any]]],
    best_alone: dict[str, float],
    args: argparse.Namespace,
    startup_report: dict[str, Any],
) -> list[dict[str, Any]]:
    """Returns the records of one test, for the table and --record: ktx's, with its limits and errors, then the peer's.

    ktx's speed divided by the peer's is `ratio` in ktx's record.
    """
    common = (
        {"test": test}
        | run_metadata()
        | {"threads": args.threads, "rounds": args.repeat, "model": str(args.weights or args.model)}
    )
    lines = []
    for engine, rows in measurements.items():
        speeds = [row["tok_s"] for row in rows]
        # Only ktx's process measures the limits.
        medians = {key: statistics.median(row[key] for row in rows) for key in ("limit", "share") if key in rows[0]}
        lines.append(
            common
            | {"engine": engine, "tok_s": statistics.median(speeds), "spread": [min(speeds), max(speeds)]}
            | medians
        )
    lines[0] |= {key: startup_report[key] for key in (*LOAD_FIELDS, *PROBE_FIELDS)}
    errors = startup_report["errors"][test[:2]]  # of one token per call ("tg") or of many ("pp")
    lines[0] |= {"errors": errors, "relative_error": max(errors.values(), default=0.0)}
    lines[0]["limit_unit"] = "GOPS int8" if test.startswith("pp") else "GB/s read"
    for peer in lines[1:]:
        peer |= {"best_alone": best_alone[test], "isa": measurements[peer["engine"]][0]["isa"]}
        lines[0]["ratio"] = lines[0]["tok_s"] / peer["tok_s"]
    return lines


def _print_table(lines: list[dict[str, Any]], startup_report: dict[str, Any], memory_note: str) -> None:
    """Prints the machine, the loading speed, the errors and a row per record.

    `startup_report` has the figures of loading that the ktx process measured; `memory_note` states whether both engines
    fit in memory.
    """
    threads, gb = (
        f"{startup_report['threads']} threads",
        {key: startup_report[key] / 1e9 for key in ("bytes", "peak_rss", "rss_bound")},
    )
    print(f"{lines[0]['machine']}: {startup_report['isa']} kernels, {threads}; {gb['bytes']:.2f} GB packed")
    limits = (
        f"cat {startup_report['cat_gb_s']:.2f}, packing {startup_report['pack_gb_s']:.2f},"
        f" new memory {startup_report['fresh_gb_s']:.2f} GB/s"
    )
    print(
        f"loaded in {startup_report['load_seconds']:.1f} s, {startup_report['load_gb_s']:.2f} GB/s;"
        f" alone on {threads}: {limits}"
    )
    print(f"peak RSS {gb['peak_rss']:.2f} GB, bound {gb['rss_bound']:.2f} GB")
    sizes = ", ".join(f"{what} {startup_report[key] >> 20} MiB" for key, what in PROBE_FIELDS.items())
    print(f"read bandwidth, the limit of decode (tg), is measured before each round: {sizes}")
    print(*filter(None, [memory_note]), sep="\n", end="\n" if memory_note else "")
    engine_width = max(len(line["engine"]) for line in lines) + 2
    test_width = max(8, *(len(line["test"]) + 2 for line in lines))
    worst = {
        kind: max(errors.items(), key=lambda item: item[1])
        for kind, errors in startup_report["errors"].items()
        if errors
    }
    worst_errors = ", ".join(f"{kind} {value:.2%} ({name})" for kind, (name, value) in worst.items())
    print(f"error of a matrix product against float64 on the same weights, worst type: {worst_errors}")
    print(f"{'test':{test_width}}{'engine':{engine_width}}{'tok/s':>9}{'spread':>18}{'ratio':>8}{'error':>8}  limit")
    for line in lines:
        spread = f"{line['spread'][0]:.2f}-{line['spread'][1]:.2f}"
        ratio = f"{line['ratio']:.2f}x" if "ratio" in line else ""
        limit = (
            f"{line['share']:.0%} of {line['limit']:.1f} {line['limit_unit']}"
            if "share" in line
            else f"alone {line['best_alone']:.2f}"
        )
        error = f"{line['relative_error']:.2%}" if "relative_error" in line else ""
        print(
            f"{line['test']:{test_width}}{line['engine']:{engine_width}}{line['tok_s']:>9.2f}"
            f"{spread:>18}{ratio:>8}{error:>8}  {limit}"
        )
