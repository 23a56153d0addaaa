"""python -m ktx.kernels.check: every weight type on every instruction set of this CPU, with its error (`make cpu-check`)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

BOUND_MATRIX, BOUND_LAYER, BOUND_FLOAT, BOUND_BF16 = 8e-3, 1.8e-2, 1e-5, 5e-3
IN_BF16 = ("BF16", "F8_E4M3")  # types that bf16 holds exactly: multiplied so where the CPU can
SHAPES = ((1, 33, 768), (17, 50, 768))  # tokens, rows, columns


def main() -> int:
    """Prints the table; exit status 1 when an error is over its bound."""
    parser = argparse.ArgumentParser(prog="python -m ktx.kernels.check", description=__doc__)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().worker:
        print(json.dumps(measure()))
        return 0
    from ktx.hardware import ISAS
    from ktx.kernels.cpu import ops

    best = ops.best_isa()
    isas = list(ISAS)[list(ISAS).index(best) :: -1]
    print(f"this CPU: {best}; errors are relative RMS against float64 on the dequantised weights")
    print(
        f"bounds: {BOUND_MATRIX:.1e} a matrix, {BOUND_LAYER:.1e} a mixture-of-experts layer; float weights {BOUND_FLOAT:.0e}, in bf16 {BOUND_BF16:.0e}\n"
    )
    found = {isa: _run(isa) for isa in isas}
    print("type".ljust(10) + "".join(f"{isa}: 1 token   17 tokens   experts   ".rjust(48) for isa in isas))
    bad = []
    for name in found[isas[0]]["errors"]:
        cells = []
        for isa in isas:
            errors = found[isa]["errors"][name]
            matrix, layer = found[isa]["bounds"][name]
            over = max(errors[:2]) > matrix or errors[2] > layer
            bad += [f"{name} on {isa}"] if over else []
            cells.append((" ".join(f"{e:11.1e}" for e in errors) + (" !" if over else "  ")).rjust(48))
        print(name.ljust(10) + "".join(cells))
    print(
        f"\nover the bound: {', '.join(bad)}"
        if bad
        else f"\nall {len(found[isas[0]]['errors'])} types are within their bounds on {', '.join(isas)}"
    )
    return 1 if bad else 0


def _run(isa: str) -> dict[str, dict[str, list[float]]]:
    done = subprocess.run(
        [sys.executable, "-m", "ktx.kernels.check", "--worker"],
        env=os.environ | {"KTX_ISA": isa},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"the check on {isa} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measure() -> dict[str, dict[str, object]]:
    """Errors of each type in this process: linear at one and at many tokens, and a small mixture-of-experts layer."""
    from ktx.qtypes import QTYPES

    errors = {name: [_linear(name, *shape) for shape in SHAPES] + [_experts(name)] for name in QTYPES}
    return {"errors": errors, "bounds": {name: bounds(name) for name in QTYPES}}  # type: ignore[dict-item]


def bounds(name: str) -> tuple[float, float]:
    """The largest relative error of a matrix and of a layer of experts of a type, on the instruction set that is picked."""
    from ktx.kernels.cpu import ops
    from ktx.qtypes import QTYPES

    if not QTYPES[name].is_float:
        return BOUND_MATRIX, BOUND_LAYER
    return (BOUND_BF16,) * 2 if name in IN_BF16 and ops.isa() == "avx512bf16" else (BOUND_FLOAT,) * 2


def sample(name: str, n: int, k: int, seed: int = 0):  # type: ignore[no-untyped-def]
    """A random matrix of a type, as a source would give it."""
    import torch

    from ktx.qtypes import QTYPES
    from ktx.quantize import random_rows
    from ktx.weights.source import QuantizedTensor

    scale = torch.rand((n + 127) // 128, (k + 127) // 128) + 0.5 if name == "F8_E4M3" else None
    return QuantizedTensor(random_rows(QTYPES[name], n, k, seed), QTYPES[name], (n, k), scale)


def relative(a, b) -> float:  # type: ignore[no-untyped-def]
    return float((a.double() - b.double()).norm() / b.double().norm())


def _linear(name: str, tokens: int, n: int, k: int) -> float:
    import torch

    from ktx.kernels import cpu, reference

    weight = sample(name, n, k)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens))
    return relative(cpu.linear(x, cpu.pack(weight)), reference.linear(x.double(), weight))


def _experts(name: str) -> float:
    import torch

    from ktx.kernels import cpu

    source = torch.Generator().manual_seed(5)
    count, hidden, inner, tokens = 4, 256, 512, 9
    mats = [
        [sample(name, rows, columns, 10 * e + i) for e in range(count)]
        for i, (rows, columns) in enumerate(((inner, hidden), (inner, hidden), (hidden, inner)))
    ]
    x = torch.randn(tokens, hidden, generator=source)
    ids = torch.stack([torch.randperm(count, generator=source)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=source)
    gate, up, down = (cpu.pack(m) for m in mats)
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
