"""python -m ktx.kernels.check: every weight type on every instruction set of this CPU, its error and its speed (`make cpu-check`)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

BOUND_MATRIX, BOUND_LAYER, BOUND_FLOAT, BOUND_BF16 = 8e-3, 1.8e-2, 1e-5, 5e-3
BOUND_FAST = 1.2e-2, 3e-2  # the same with KTX_GEMM=fast
IN_BF16 = ("BF16", "F8_E4M3")  # types that bf16 holds exactly: multiplied so where the CPU can
SHAPES = ((1, 33, 768), (17, 50, 768))  # tokens, rows, columns
SLOW = ("scalar", "amxmodel")  # instruction sets whose speed nobody asks for

USUAL = ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "MXFP4")
COARSE = ("Q2_K", "Q3_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
FLOORS = {  # the shares that the kernels of the best instruction set are to reach: one token, 48 and 512 tokens
    **dict.fromkeys(USUAL, (0.90, 0.42, 0.48)),
    **dict.fromkeys(COARSE, (0.60, 0.35, 0.35)),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), (0.40, 0.35, 0.35)),
    **dict.fromkeys(("BF16", "F16", "F8_E4M3"), (0.60, 0.0, 0.60)),
}
FAST_FLOORS = dict.fromkeys(USUAL, (0.0, 0.50, 0.60))
FAST = " fast"  # what follows an instruction set's name with KTX_GEMM=fast
HAVE_FAST = ("avx512bf16", "avx512vbmi", "avx512vnni")
KEYS = (("gemv_gb_s", "gemv_share"), ("gemm_48_gops", "gemm_48_share"), ("gemm_512_gops", "gemm_512_share"))
LIMITS = dict.fromkeys(  # what was measured to be in the way of a floor; benchmarks/NOTES.md tells how
    ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    "look-ups and signs: 9 to 11 ns a thread for 512 weights, from the cache too",
)


def main() -> int:
    """Prints the tables; exit status 1 when an error is over its bound."""
    parser = argparse.ArgumentParser(prog="python -m ktx.kernels.check", description=__doc__)
    parser.add_argument("--errors", action="store_true", help="no speeds: a few seconds instead of minutes")
    parser.add_argument("--threads", "-t", type=int, default=0, help="default: usable physical cores")
    parser.add_argument("--worker", choices=("errors", "speeds"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "errors":
        print(json.dumps(measure()))
        return 0
    if args.worker == "speeds":
        return _speeds(args.threads)
    from ktx.hardware import ISAS, default_threads
    from ktx.kernels.cpu import ops

    best = ops.best_isa()
    isas = list(ISAS)[list(ISAS).index(best) :: -1]
    quick = next(([isa + FAST] for isa in isas if isa in HAVE_FAST), [])
    print(f"this CPU: {best}; errors are relative RMS against float64 on the dequantised weights")
    print(
        f"bounds: {BOUND_MATRIX:.1e} a matrix, {BOUND_LAYER:.1e} a mixture-of-experts layer; float weights {BOUND_FLOAT:.0e}, in bf16 {BOUND_BF16:.0e}; KTX_GEMM=fast {BOUND_FAST[0]:.1e} and {BOUND_FAST[1]:.1e}\n"
    )
    bad = _show_errors([*isas[:1], *quick, *isas[1:]])
    if best == "amx":
        bad += _show_tiles()
    if not args.errors:
        _show_speeds(
            [*isas[:1], *quick, *(isa for isa in isas[1:] if isa not in SLOW)], args.threads or default_threads()
        )
    return 1 if bad else 0


def _show_errors(isas: list[str]) -> list[str]:
    found = {isa: json.loads(_run(isa, "errors")) for isa in isas}
    print("type".ljust(10) + "".join(f"{isa}".rjust(29) for isa in isas))
    print(" " * 10 + "1 token 17 tokens  experts  ".rjust(29) * len(isas))
    bad = []
    for name in found[isas[0]]["errors"]:
        cells = []
        for isa in isas:
            errors = found[isa]["errors"][name]
            matrix, layer = found[isa]["bounds"][name]
            over = max(errors[:2]) > matrix or errors[2] > layer
            bad += [f"{name} on {isa}"] if over else []
            cells.append(("".join(f"{e:9.1e}" for e in errors) + (" !" if over else "  ")).rjust(29))
        print(name.ljust(10) + "".join(cells))
    verdict = (
        f"over the bound: {', '.join(bad)}"
        if bad
        else f"all {len(found[isas[0]]['errors'])} types are within their bounds"
    )
    print(f"\n{verdict} on {', '.join(isas)}" if not bad else f"\n{verdict}")
    return bad


def _show_tiles() -> list[str]:
    """The tile instructions of this CPU against their model, bit for bit."""
    import torch

    from ktx.kernels.cpu import ops

    wrong = []
    for kind in ("ssd", "usd", "bf16"):
        a, b, c = (torch.randint(0, 256, (16, 64), dtype=torch.uint8) for _ in range(3))
        if kind == "bf16":
            a, b = (torch.randn(16, 32, dtype=torch.float32).bfloat16().view(torch.uint8) for _ in range(2))
            c = torch.randn(16, 16, dtype=torch.float32).view(torch.uint8)
        if not torch.equal(ops.tile_dot(kind, a, b, c, False), ops.tile_dot(kind, a, b, c, True)):
            wrong.append(f"TDPB {kind}")
    print(f"\nAMX tiles: {'differ from their model: ' + ', '.join(wrong) if wrong else 'bit for bit as their model'}")
    return wrong


def _show_speeds(isas: list[str], threads: int) -> None:
    """GB/s of one token over the read bandwidth, GOPS of 48 and 512 tokens over the peak; the best instruction set's beside its floors."""
    from ktx.quant.types import QTYPES

    print(
        f"\n{threads} threads, matrices from memory: GB/s of one token, GOPS of 48 and 512 tokens, each with its share of what was measured beside it"
    )
    print("type".ljust(10) + "".join(isa.rjust(45) for isa in isas) + "    floors")
    print(" " * 10 + f"{'1 token':>15}{'48 tokens':>15}{'512 tokens':>15}" * len(isas))
    workers = [_start(isa, threads) for isa in isas]  # one measures at a time
    missed: list[tuple[str, list[str]]] = []
    for name in QTYPES:
        rows = [_ask(worker, name) for worker in workers]
        cells = "".join(
            f"{row[rate]:>9.{1 if row[rate] < 100 else 0}f} {row[share]:>4.0%} " for row in rows for rate, share in KEYS
        )
        print(name.ljust(10) + cells + "    " + " ".join(f"{floor:.0%}" for floor in FLOORS.get(name, ())), flush=True)
        fast = [isa for isa in isas[1:2] if isa.endswith(FAST)]
        for isa, row, floors in zip([isas[0], *fast], rows, (FLOORS, FAST_FLOORS), strict=False):
            under = [
                f"{what} {row[share]:.0%} of {floor:.0%}"
                for what, (_, share), floor in zip(
                    ("1 token", "48 tokens", "512 tokens"), KEYS, floors.get(name, ()), strict=False
                )
                if row[share] < floor
            ]
            missed += [(name + isa.removeprefix(isas[0]), under)] if under else []
    for worker in workers:
        worker.communicate()
    print(f"\nunder a floor on {isas[0]}:" if missed else f"\nall floors are reached on {isas[0]}")
    for name, under in missed:
        print(f"  {name}: {', '.join(under)}" + (f" ({LIMITS[name]})" if name in LIMITS else ""))


def _command(worker: str, threads: int = 0) -> list[str]:
    return [sys.executable, "-m", "ktx.kernels.check", "--worker", worker, "--threads", str(threads)]


def _run(isa: str, worker: str) -> str:
    done = subprocess.run(_command(worker), env=os.environ | _mode(isa), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the check on {isa} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def _mode(isa: str) -> dict[str, str]:
    return {"KTX_ISA": isa.removesuffix(FAST), "KTX_GEMM": "fast" if isa.endswith(FAST) else "exact"}


def _start(isa: str, threads: int) -> subprocess.Popen[str]:
    environment = os.environ | _mode(isa) | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        _command("speeds", threads), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ask(worker: subprocess.Popen[str], name: str) -> dict[str, float]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"the process that measures speeds ended with {worker.wait()} at {name}")
    return json.loads(line)


def _speeds(threads: int) -> int:
    """Answers each type's name on standard input with its speeds."""
    from ktx.kernels.cpu import ops
    from ktx.kernels.microbench import measure as speed
    from ktx.quant.types import QTYPES

    ops.set_threads(threads)
    for line in sys.stdin:
        print(json.dumps(speed(QTYPES[line.strip()], threads, 3)), flush=True)
    return 0


def in_bf16() -> bool:
    """Whether the instruction set that is picked multiplies the types of IN_BF16 (and half precision keys and values) in bf16."""
    from ktx.kernels.cpu import ops

    return ops.isa() in ("amxmodel", "avx512bf16", "amx")


def bounds(name: str) -> tuple[float, float]:
    """The largest relative error of a matrix and of a layer of experts of a type, on the instruction set that is picked."""
    from ktx.kernels.cpu import ops
    from ktx.quant.types import QTYPES

    if not QTYPES[name].is_float:
        return BOUND_FAST if ops.fast_gemm() else (BOUND_MATRIX, BOUND_LAYER)
    return (BOUND_BF16,) * 2 if name in IN_BF16 and in_bf16() else (BOUND_FLOAT,) * 2


def measure() -> dict[str, dict[str, object]]:
    """Errors of each type in this process: linear at one and at many tokens, and a small mixture-of-experts layer."""
    from ktx.quant.types import QTYPES

    errors = {name: [_linear(name, *shape) for shape in SHAPES] + [_experts(name)] for name in QTYPES}
    return {"errors": errors, "bounds": {name: bounds(name) for name in QTYPES}}  # type: ignore[dict-item]


def sample(name: str, n: int, k: int, seed: int = 0):  # type: ignore[no-untyped-def]
    """A random matrix of a type, as a source would give it."""
    import torch

    from ktx.quant.quantize import random_rows
    from ktx.quant.types import QTYPES
    from ktx.weights.base import QuantizedTensor

    scale = torch.rand((n + 127) // 128, (k + 127) // 128, dtype=torch.float32) + 0.5 if name == "F8_E4M3" else None
    return QuantizedTensor(random_rows(QTYPES[name], n, k, seed), QTYPES[name], (n, k), scale)


def relative(a, b) -> float:  # type: ignore[no-untyped-def]
    return float((a.double() - b.double()).norm() / b.double().norm())


def _linear(name: str, tokens: int, n: int, k: int) -> float:
    import torch

    from ktx.kernels import cpu, reference

    weight = sample(name, n, k)
    x, packed = (
        torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens), dtype=torch.float32),
        cpu.pack(weight),
    )
    exact = reference.linear(x.double(), weight)
    return max(relative(cpu.linear(x, packed, wide=wide), exact) for wide in (False, True))


def _experts(name: str) -> float:
    import torch

    from ktx.kernels import cpu

    source = torch.Generator().manual_seed(5)
    count, hidden, inner, tokens = 4, 256, 512, 9
    mats = [
        [sample(name, rows, columns, 10 * e + i) for e in range(count)]
        for i, (rows, columns) in enumerate(((inner, hidden), (inner, hidden), (hidden, inner)))
    ]
    x = torch.randn(tokens, hidden, generator=source, dtype=torch.float32)
    ids = torch.stack([torch.randperm(count, generator=source)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=source, dtype=torch.float32)
    gate, up, down = (cpu.pack_experts(m) for m in mats)
    mine = cpu.experts(x, ids, weights, gate, up, down)
    out = torch.zeros(tokens, hidden, dtype=torch.float64)
    for e in range(count):
        token, choice = torch.where(ids == e)
        g, u, d = (m[e].dequantize().double() for m in mats)
        rows = x[token].double()
        y = (torch.nn.functional.silu(rows @ g.T) * (rows @ u.T)) @ d.T
        out.index_add_(0, token, y * weights[token, choice, None].double())
    return relative(mine, out)


if __name__ == "__main__":
    raise SystemExit(main())
