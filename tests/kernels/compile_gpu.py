"""Compiles the products with packed weights for a CUDA architecture, without a device: a JSON line each with what it
takes of the card.

Usage: python tests/kernels/compile_gpu.py 90 Q4_K Q6_K   (not through the interpreter: it takes what no compiler does)
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ktx.kernels.gpu import linear, moe
from ktx.kernels.gpu.dequant import codebook_of, decode_constants
from ktx.kernels.gpu.soa_layout import SoAWeight
from ktx.quant.types import QTYPES

N, K, EXPERTS = 512, 1024, 2
WORDS = {torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"} | {
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
}  # fmt: skip


def signature(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(signature(part) for part in value)
    if isinstance(value, torch.Tensor):
        return "*" + WORDS[value.dtype]
    return "constexpr" if value is None else "fp32" if isinstance(value, float) else "i32"


def compiled(kernel: Any, arch: int, *args: Any, num_stages: int = 3, **constants: Any) -> dict[str, int]:
    """The kernel as its launch would have it, all pointers and sizes multiples of 16."""
    named = dict(zip(kernel.arg_names, args, strict=False))
    constants |= {name: None for name, value in named.items() if value is None}
    types = {name: "constexpr" if name in constants else signature(named[name]) for name in kernel.arg_names}
    places = [(i,) for i, name in enumerate(kernel.arg_names) if types[name] in ("i32", "*bf16")]
    places += [
        (i, j)
        for i, name in enumerate(kernel.arg_names)
        if isinstance(types[name], tuple)
        for j in range(len(types[name]))
    ]
    source = ASTSource(
        kernel,
        types,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for place in places},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_stages": num_stages})
    return {"shared": made.metadata.shared, "ptx": len(made.asm["ptx"])}


def matrices(name: str, count: int) -> SoAWeight:
    qtype = QTYPES[name]
    scale = torch.ones(count, N // 128, K // 128) if name == "F8_E4M3" else None
    return SoAWeight(torch.zeros(count * N * qtype.row_bytes(K), dtype=torch.uint8), qtype, N, K, count, scale)


def main() -> None:
    arch, x = int(sys.argv[1]), torch.zeros(1, K, dtype=torch.bfloat16)
    sums, choices = torch.zeros(1, N), torch.zeros(1, dtype=torch.int64)
    head = sums, choices, sums, x, choices, 0, EXPERTS, 8, N
    print(json.dumps({"kernel": "combine"} | compiled(moe._combine, arch, *head, COUNT=True, WIDTH=1024)), flush=True)
    for name in sys.argv[2:]:
        one, some = matrices(name, 1), matrices(name, EXPERTS)
        for tokens in (1, linear.MAX_GEMM_TOKENS):
            shape = linear.choose_tile(tokens, N, K)
            sizes = tokens, N, K, one.row_blocks, K
            found = compiled(
                linear._linear,
                arch,
                x,
                one.planes,
                codebook_of(one),
                None,
                x,
                *sizes,
                HAS_BIAS=False,
                **shape,
                **decode_constants(one),
            )
            print(json.dumps({"kernel": "linear", "type": name, "tokens": tokens} | found), flush=True)
            pairs = moe.MAX_GEMV_PAIRS * (1 if tokens == 1 else 16)
            ids = torch.zeros(1, dtype=torch.int64)
            head = x, x, (ids,) * 4, ids, 0, EXPERTS
            part = some.planes, codebook_of(some), None
            shape = moe.choose_tile(pairs, EXPERTS, N, K)
            words = {
                "ACT": "silu",
                "HAS_BIAS": False,
                **shape,
                **decode_constants(some, "GATE_"),
                **decode_constants(some, "UP_"),
            }
            found = compiled(
                moe._gate_up, arch, *head, 1, *part, some.row_blocks, *part, some.row_blocks, N, K, 0.0, 0.0, **words
            )
            print(json.dumps({"kernel": "gate_up", "type": name, "tokens": tokens} | found), flush=True)


if __name__ == "__main__":
    main()
