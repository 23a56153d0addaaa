"""Error and speed of every weight type on every instruction set of this CPU (`make cpu-check`).

Run as `python -m ktx.kernels.check`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

# Largest relative RMS errors: of a matrix, of a MoE layer, and of float weights multiplied in f32 and in bf16.
MAX_REL_ERROR_MATRIX, MAX_REL_ERROR_LAYER, MAX_REL_ERROR_FLOAT, MAX_REL_ERROR_BF16 = 8e-3, 1.8e-2, 1e-5, 5e-3
SHAPES = ((1, 33, 768), (17, 50, 768))  # tokens, rows, columns
NOT_TIMED_ISAS = ("scalar", "amxmodel")  # instruction sets whose speed is not measured

FINE_TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "MXFP4")
COARSE_TYPES = ("Q2_K", "Q3_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
# Shares of the limit that the kernels of the best instruction set should reach: for 1, 48 and 512 tokens.
MIN_PEAK_SHARES = {
    **dict.fromkeys(FINE_TYPES, (0.90, 0.42, 0.48)),
    **dict.fromkeys(COARSE_TYPES, (0.60, 0.35, 0.35)),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), (0.40, 0.35, 0.35)),
    **dict.fromkeys(("BF16", "F16", "F8_E4M3"), (0.60, 0.0, 0.60)),
}
RESULT_KEYS = (("gemv_gb_s", "gemv_share"), ("gemm_48_gops", "gemm_48_share"), ("gemm_512_gops", "gemm_512_share"))
# What limits a type that misses its floor, as measured; see benchmarks/NOTES.md.
KNOWN_LIMITS = dict.fromkeys(
    ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    "table look-ups and signs: 9 to 11 ns a thread for 512 weights, from the cache too",
)


def main() -> int:
    """Prints the tables; returns exit status 1 if an error exceeds its bound.

    With the hidden option `--worker` the process measures on the one instruction set that KTX_ISA selects, for a parent
    process that prints.
    """
    parser = argparse.ArgumentParser(prog="python -m ktx.kernels.check", description=__doc__)
    parser.add_argument(
        "--errors", action="store_true", help="check errors only, not speeds: a few seconds instead of minutes"
    )
    parser.add_argument("--threads", "-t", type=int, default=0, help="default: number of usable physical cores")
    parser.add_argument("--worker", choices=("errors", "speeds"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "errors":
        print(json.dumps(measure_errors()))
        return 0
    if args.worker == "speeds":
        return _serve_speeds(args.threads)
    from ktx.hardware import ISAS, default_threads
    from ktx.kernels.cpu import ops

    best = ops.best_isa()
    isas = list(ISAS)[list(ISAS).index(best) :: -1]
    print(f"this CPU: {best}; errors are relative RMS against float64 on the dequantized weights")
    print(
        f"bounds: {MAX_REL_ERROR_MATRIX:.1e} for a matrix, {MAX_REL_ERROR_LAYER:.1e} for a mixture-of-experts layer;"
        f" float weights {MAX_REL_ERROR_FLOAT:.0e}, in bf16 {MAX_REL_ERROR_BF16:.0e}\n"
    )
    failures = _print_errors(isas)
    if best == "amx":
        failures += _check_amx_tiles()
    if not args.errors:
        _print_speeds(
            [*isas[:1], *(isa for isa in isas[1:] if isa not in NOT_TIMED_ISAS)],
            args.threads or default_threads(),
        )
    return 1 if failures else 0


def _print_errors(isas: list[str]) -> list[str]:
    """Prints the errors of each type on each instruction set; returns those that exceed their bound.

    A process can select its instruction set only once, at start, so each is measured by a process of its own.
    """
    reports = {isa: json.loads(_run_worker(isa, "errors")) for isa in isas}
    print("type".ljust(10) + "".join(f"{isa}".rjust(29) for isa in isas))
    print(" " * 10 + "1 token 17 tokens  experts  ".rjust(29) * len(isas))
    failures = []
    for name in reports[isas[0]]["errors"]:
        cells = []
        for isa in isas:
            errors = reports[isa]["errors"][name]
            max_matrix, max_layer = reports[isa]["bounds"][name]
            # errors: of products for one and for 17 tokens, and of a mixture-of-experts layer
            too_large = max(errors[:2]) > max_matrix or errors[2] > max_layer
            failures += [f"{name} on {isa}"] if too_large else []
            cells.append(("".join(f"{e:9.1e}" for e in errors) + (" !" if too_large else "  ")).rjust(29))
        print(name.ljust(10) + "".join(cells))
    result = (
        f"over the bound: {', '.join(failures)}"
        if failures
        else f"all {len(reports[isas[0]]['errors'])} types are within their bounds"
    )
    print(f"\n{result} on {', '.join(isas)}" if not failures else f"\n{result}")
    return failures


def _check_amx_tiles() -> list[str]:
    """Compares the AMX tile instructions of this CPU with their emulation, bit for bit; returns those that differ.

    Tests on CPUs without AMX run the emulation ("amxmodel"), so their results hold for AMX only if both are equal. The
    kinds are products of signed by signed bytes, unsigned by signed bytes, and bf16.
    """
    import torch

    from ktx.kernels.cpu import ops

    mismatches = []
    for kind in ("ssd", "usd", "bf16"):
        a, b, c = (torch.randint(0, 256, (16, 64), dtype=torch.uint8) for _ in range(3))
        if kind == "bf16":
            a, b = (torch.randn(16, 32, dtype=torch.float32).bfloat16().view(torch.uint8) for _ in range(2))
            c = torch.randn(16, 16, dtype=torch.float32).view(torch.uint8)
        if not torch.equal(ops.tile_dot(kind, a, b, c, False), ops.tile_dot(kind, a, b, c, True)):
            mismatches.append(f"TDPB {kind}")
    print(
        "\nAMX tiles:"
        f" {'differ from emulation: ' + ', '.join(mismatches) if mismatches else 'equal to emulation, bit for bit'}"
    )
    return mismatches


def _print_speeds(isas: list[str], threads: int) -> None:
    """Prints GB/s of one token and GOPS of 48 and 512 tokens, with shares of the read bandwidth and of the peak.

    For the best instruction set it also prints the floors, and the types that miss them.
    """
    from ktx.quant.types import QTYPES

    print(
        f"\n{threads} threads, matrices read from memory: GB/s of one token, GOPS of 48 and 512 tokens, each with its"
        " share of the limit that was measured next to it"
    )
    print("type".ljust(10) + "".join(isa.rjust(45) for isa in isas) + "    floors")
    print(" " * 10 + f"{'1 token':>15}{'48 tokens':>15}{'512 tokens':>15}" * len(isas))
    workers = [_start_worker(isa, threads) for isa in isas]  # only one of them measures at a time
    missed: list[tuple[str, list[str]]] = []
    for name in QTYPES:
        rows = [_request_speed(worker, name) for worker in workers]
        cells = "".join(
            f"{row[rate]:>9.{1 if row[rate] < 100 else 0}f} {row[share]:>4.0%} "
            for row in rows
            for rate, share in RESULT_KEYS
        )
        print(
            name.ljust(10) + cells + "    " + " ".join(f"{floor:.0%}" for floor in MIN_PEAK_SHARES.get(name, ())),
            flush=True,
        )
        shortfalls = [
            f"{size} {rows[0][share]:.0%} of {floor:.0%}"
            for size, (_, share), floor in zip(
                ("1 token", "48 tokens", "512 tokens"), RESULT_KEYS, MIN_PEAK_SHARES.get(name, ()), strict=False
            )
            if rows[0][share] < floor
        ]
        if shortfalls:
            missed.append((name, shortfalls))
    for worker in workers:
        worker.communicate()
    print(f"\nbelow a floor on {isas[0]}:" if missed else f"\nall floors are reached on {isas[0]}")
    for name, shortfalls in missed:
        print(f"  {name}: {', '.join(shortfalls)}" + (f" ({KNOWN_LIMITS[name]})" if name in KNOWN_LIMITS else ""))


def _worker_command(worker: str, threads: int = 0) -> list[str]:
    return [sys.executable, "-m", "ktx.kernels.check", "--worker", worker, "--threads", str(threads)]


def _run_worker(isa: str, worker: str) -> str:
    """Runs a worker process on an instruction set and returns its standard output; exits if it fails."""
    done = subprocess.run(
        _worker_command(worker), env=os.environ | _isa_environment(isa), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"the check on {isa} failed with exit status {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def _isa_environment(isa: str) -> dict[str, str]:
    """Environment variables that select an instruction set."""
    return {"KTX_ISA": isa}


def _start_worker(isa: str, threads: int) -> subprocess.Popen[str]:
    """Starts a process that measures speeds on an instruction set; see `_serve_speeds`."""
    environment = os.environ | _isa_environment(isa) | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        _worker_command("speeds", threads), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _request_speed(worker: subprocess.Popen[str], name: str) -> dict[str, float]:
    """Sends the name of a weight type to a worker and returns the speeds it measures."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"the process that measures speeds ended with exit status {worker.wait()} at {name}")
    return json.loads(line)


def _serve_speeds(threads: int) -> int:
    """The `speeds` worker process: measures GEMV and GEMM of each weight type that standard input names, until it ends.

    It prints the speeds of a type as a line of JSON. There is one process per instruction set, because KTX_ISA holds
    for a whole process.
    """
    from ktx.kernels.cpu import ops
    from ktx.kernels.microbench import measure as measure_speed
    from ktx.quant.types import QTYPES

    ops.set_threads(threads)
    for line in sys.stdin:
        print(json.dumps(measure_speed(QTYPES[line.strip()], threads, repeat=3)), flush=True)
    return 0


def multiplies_in_bf16() -> bool:
    """Whether the selected instruction set multiplies the types of BF16_EXACT_TYPES in bf16.

    It then multiplies keys and values of half precision in bf16 as well.
    """
    from ktx.kernels.cpu import ops

    return ops.isa() in ("amxmodel", "avx512bf16", "amx")


def error_bounds(name: str) -> tuple[float, float]:
    """Returns the largest allowed relative errors of a type, of a matrix and of a MoE layer.

    They depend on the selected instruction set: some multiply types in bf16 that others multiply in f32.
    """
    from ktx.quant.types import BF16_EXACT_TYPES, QTYPES

    if not QTYPES[name].is_float:
        return MAX_REL_ERROR_MATRIX, MAX_REL_ERROR_LAYER
    return (
        (MAX_REL_ERROR_BF16,) * 2 if name in BF16_EXACT_TYPES and multiplies_in_bf16() else (MAX_REL_ERROR_FLOAT,) * 2
    )


def measure_errors() -> dict[str, dict[str, object]]:
    """Measures the relative errors of each type's kernels, against float64, on the instruction set of this process.

    Returns:
        "errors": for each type those of products for one and for 17 tokens, and of a small MoE layer; "bounds": those
        of `error_bounds`.
    """
    from ktx.quant.types import QTYPES

    errors = {name: [_linear_error(name, *shape) for shape in SHAPES] + [_experts_error(name)] for name in QTYPES}
    return {"errors": errors, "bounds": {name: error_bounds(name) for name in QTYPES}}  # type: ignore[dict-item]


def random_matrix(name: str, n: int, k: int, seed: int = 0):  # type: ignore[no-untyped-def]
    """Returns a random matrix of a type, in the form that a weight source returns it; tests use it too."""
    import torch

    from ktx.quant.random_blocks import random_rows
    from ktx.quant.types import QTYPES
    from ktx.weights.base import QuantizedTensor

    scale = torch.rand((n + 127) // 128, (k + 127) // 128, dtype=torch.float32) + 0.5 if name == "F8_E4M3" else None
    return QuantizedTensor(random_rows(QTYPES[name], n, k, seed), QTYPES[name], (n, k), scale)


def relative_error(a, b) -> float:  # type: ignore[no-untyped-def]
    """Returns the relative error of a with respect to b, in the Frobenius norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def _linear_error(name: str, num_tokens: int, n: int, k: int) -> float:
    """Returns the relative error of the linear kernel against float64 on dequantized weights.

    It is the larger of the errors with and without bf16, which AMX uses for full pages of a prompt.
    """
    import torch

    from ktx.kernels import cpu, reference

    weight = random_matrix(name, n, k)
    x = torch.randn(num_tokens, k, generator=torch.Generator().manual_seed(num_tokens), dtype=torch.float32)
    packed = cpu.pack(weight)
    expected = reference.linear(x.double(), weight)
    return max(relative_error(cpu.linear(x, packed, all_bf16=all_bf16), expected) for all_bf16 in (False, True))


def _experts_error(name: str) -> float:
    """Returns the relative error of the experts kernel on a small MoE layer, against float64 on dequantized weights."""
    import torch

    from ktx.kernels import cpu

    generator = torch.Generator().manual_seed(5)
    num_experts, hidden, ff, num_tokens = 4, 256, 512, 9
    matrices = [
        [random_matrix(name, rows, cols, 10 * expert + i) for expert in range(num_experts)]
        for i, (rows, cols) in enumerate(((ff, hidden), (ff, hidden), (hidden, ff)))
    ]
    x = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float32)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:2] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, 2, generator=generator, dtype=torch.float32)
    gate, up, down = (cpu.pack_experts(m) for m in matrices)
    actual = cpu.experts(x, ids, weights, gate, up, down)
    expected = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    for expert in range(num_experts):
        token, choice = torch.where(ids == expert)
        g, u, d = (m[expert].dequantize().double() for m in matrices)
        rows = x[token].double()
        y = (torch.nn.functional.silu(rows @ g.T) * (rows @ u.T)) @ d.T
        expected.index_add_(0, token, y * weights[token, choice, None].double())
    return relative_error(actual, expected)


if __name__ == "__main__":
    raise SystemExit(main())
