"""python compile_sm90.py [HEADS]: compiles kernels for an H100, on a machine that has none, and prints what came out as
JSON.

That of MLA for so many heads, or without a number the others with all that can be asked of them: the interpreter knows
no types.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from ktx.kernels.gpu import mla_decode, norm, paged_attention, reduce_splits, rope_and_cache
from ktx.kernels.gpu.split_kv import AttentionSchedule, AttentionShape, tiles_for


class Hopper(DriverBase):
    """As much of a driver as compiling asks for."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class Compiled:
    """A kernel that is compiled where it would be launched; `found` are its name, rows, shared memory, layouts of
    products and copies.
    """

    def __init__(self, module: Any, name: str, found: list[dict[str, Any]]):
        self.kernel, self.name, self.found = getattr(module, name), name, found
        setattr(module, name, self)

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, **options: Any) -> None:
        made = self.kernel.warmup(*args, grid=(1, 1, 1), **options)
        text = made.asm["ttgir"]
        found = {"name": self.name, "rows": options.get("ROWS"), "shared": made.metadata.shared}
        found["layouts"] = re.findall(r"nvidia_mma<.*?warpsPerCTA = \[(.*?)\]", text)
        self.found.append(found | {"copies": text.count("ttg.async_copy_global_to_local")})


def blank(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape).to(dtype)


def attend_to_latent(heads: int) -> None:
    work = AttentionSchedule([1], AttentionShape(heads, 1, 512, 512, latent=True), "cpu", num_sms=132)
    plan = work.plan(torch.tensor([[0, 1, 100]]), torch.zeros(1, 32, dtype=torch.int32))
    q, q_rope = blank(1, heads, 1, 512), blank(1, heads, 1, 64)
    mla_decode.mla_attention(q, q_rope, blank(2, 64, 512), blank(2, 64, 64), plan, 1.0)


def in_f32() -> None:
    for shape, wide in ((AttentionShape(8, 2, 128, 128), 0), (AttentionShape(16, 1, 512, 512, latent=True), 64)):
        tiles = tiles_for(shape.key_columns, shape.latent, f32=True)
        work = AttentionSchedule([300], shape, "cpu", num_sms=132, tiles=tiles)
        plan = work.plan(torch.tensor([[0, 300, 300]]), torch.zeros(1, 32, dtype=torch.int32))
        q, pool = (
            blank(*size, dtype=torch.float32)
            for size in ((1, shape.heads, 300, shape.key_columns), (2, shape.kv_heads, 64, shape.key_columns))
        )
        turned = {
            "q_rope": blank(1, shape.heads, 300, wide, dtype=torch.float32),
            "k_rope": blank(2, 1, 64, wide, dtype=torch.float32),
        }
        paged_attention.attention(q, pool, pool, plan, 1.0, **(turned if wide else {}))
    norm.rms_norm(blank(300, 7168), torch.zeros(7168), 1e-6)


def everything_else() -> None:
    eight, slots = torch.float8_e4m3fn, torch.zeros(5, dtype=torch.int64)
    work = AttentionSchedule([1, 300], AttentionShape(9, 3, 80, 72), "cpu", num_sms=132)
    plan = work.plan(torch.tensor([[0, 1, 100], [1, 300, 300]]), torch.zeros(2, 32, dtype=torch.int32), 100)
    for page, stored in ((48, torch.bfloat16), (64, eight)):
        pools = (blank(2, 3, page, columns, dtype=stored) for columns in (80, 72))
        paged_attention.attention(blank(1, 9, 301, 80), *pools, plan, 1.0, torch.zeros(9), 30.0)
    in_f32()
    tables = blank(1, 5, 64), blank(1, 5, 64)
    heads = blank(1, 20, 5, 128), blank(1, 3, 5, 128), blank(1, 3, 5, 64)
    rope_and_cache.rope_and_cache_kv(
        *heads, *tables, slots, *(blank(4, 3, 64, d, dtype=eight) for d in (128, 64)), True
    )
    latent = blank(1, 5, 512), blank(1, 5, 64), blank(1, 128, 5, 64)
    rope_and_cache.rope_and_cache_mla(
        *latent, *tables, slots, *(blank(4, 64, d, dtype=eight) for d in (512, 64)), blank(512)
    )


def main(heads: str = "") -> None:
    driver.set_active(Hopper())
    found: list[dict[str, Any]] = []
    for module, name in ((paged_attention, "_attend"), (reduce_splits, "_merge")):
        Compiled(module, name, found)
    Compiled(norm, "_rms_norm", found)
    for name in ("_store_heads", "_store_latent"):
        Compiled(rope_and_cache, name, found)
    if heads:
        attend_to_latent(int(heads))
    else:
        everything_else()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
