"""`ktx bench` in alternation with kt-kernel or ftllm: the same measurements, options and table.

    python benchmarks/peers/compare.py --peer kt-kernel --layer 64,8,2048,1536 -p 1,64,512
    python benchmarks/peers/compare.py --peer ftllm --model DIR --weights FILE.gguf

The environment variable KTX_PEER_PATH names a folder with the peer's library if it is not installed here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from ktx.cli import bench, bench_layer  # noqa: E402
from ktx.cli.arguments import Parser, first_gguf  # noqa: E402
from ktx.cli.bench_process import BenchProcess  # noqa: E402
from ktx.errors import KtxError, UsageError  # noqa: E402

ENGINES = {"kt-kernel": HERE / "kt_kernel_engine.py", "ftllm": HERE / "ftllm_engine.py"}
FORMATS = {  # peer -> its format -> ktx's format of as many bits
    "kt-kernel": {"AMXINT8": "int8", "AMXINT4": "int4", "RAWINT4": "int4g32", "LLAMAFILE": "Q4_K", "BF16": "BF16"},
    "ftllm": {"int8": "int8", "int4g": "int4g32"},
}


def compare(args: argparse.Namespace) -> int:
    """Measures a layer or a model on ktx and the peer in turns; returns exit status 0."""
    engine = str(ENGINES[args.peer])
    if args.layer:
        bench.read_layer(args)
        peer = BenchProcess(args.peer, engine, bench_layer.engine_arguments(args))
        return bench_layer.run(args, peer, FORMATS[args.peer])
    if args.peer == "kt-kernel":
        raise UsageError("--peer kt-kernel runs no complete model on a CPU: give --layer, e.g. --layer 64,8,2048,1536")
    tests = bench.read_tests(args)
    folder = Path(args.model).expanduser()
    if not (folder / "config.json").exists():
        raise UsageError(f"{args.model}: ftllm needs the model's folder (config.json, tokenizer) in --model")
    weights = first_gguf(Path(args.weights or args.model).expanduser())
    files = weights.glob("*.safetensors") if weights.is_dir() else [bench.gguf_path(args)]
    arguments = ["--weights", str(weights), "--model", str(folder), "--threads", str(args.threads)]
    peer = BenchProcess(args.peer, engine, arguments)
    return bench.measure_model(args, tests, [peer], sum(file.stat().st_size for file in files))


def main(argv: list[str] | None = None) -> int:
    """Parses the options and compares; a KtxError is printed as one line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=ENGINES, required=True, help="engine to measure in alternation with ktx")
    bench.measurement_options(parser)
    try:
        return compare(parser.parse_args(argv))
    except KtxError as error:
        print(f"ktx: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
