"""Where modules can be: on the CPU or on a GPU.

A machine without a GPU can pretend to have some, for plans and tests: `KTX_GPU=fake:2` makes cuda:0 and cuda:1. Their tensors lie in the CPU's
memory, and Triton's interpreter runs their kernels (TRITON_INTERPRET=1 has to be set before they are imported). A machine with one GPU can
take it for several: with `KTX_GPU=split:2` cuda:0 and cuda:1 are both the first one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from ktx.errors import UsageError

PRETEND = "KTX_GPU"
MEMORY = 80 << 30  # bytes of a pretended GPU


@dataclass(frozen=True)
class Device:
    """A place for modules: `name` is cpu or cuda:N, `torch` where its tensors lie; `gpu` says that its kernels are Triton's."""

    name: str
    torch: torch.device
    gpu: bool = False
    pretended: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes in all, and bytes that are free, of a GPU."""
        if self.pretended:
            return MEMORY, MEMORY
        free, total = torch.cuda.mem_get_info(self.torch)
        return total, free


CPU = Device("cpu", torch.device("cpu"))


def gpus() -> list[Device]:
    """The GPUs of this machine, or those that it pretends to have. UsageError for a KTX_GPU that cannot be meant."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wish := os.environ.get(PRETEND, ""):
        known = re.fullmatch(r"(fake|split):([1-9]\d?)", wish)
        if known is None or (known[1] == "split" and not there):
            raise UsageError(
                f"{PRETEND}={wish}: give fake:N with N pretended GPUs, split:N to take the one there is for N, or leave it out"
            )
        fake = known[1] == "fake"
        where = torch.device("cpu") if fake else torch.device("cuda", 0)
        return [Device(f"cuda:{i}", where, True, fake) for i in range(int(known[2]))]
    return [Device(f"cuda:{i}", torch.device("cuda", i), True) for i in range(there)]


def device_of(name: str, where: str = "") -> Device:
    """The device that a rule or an option names: cpu, cuda or cuda:N. UsageError for one that does not exist here; `where` begins its message."""
    at = f"{where}: " if where else ""
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name.strip())
    if found is None:
        raise UsageError(f"{at}{name!r} is no device; write cpu, cuda or cuda:N")
    if name.strip() == "cpu":
        return CPU
    there = gpus()
    if int(found[1] or 0) >= len(there):
        many = f"{len(there)} GPUs, cuda:0 to cuda:{len(there) - 1}" if len(there) > 1 else "one GPU, cuda:0"
        raise UsageError(f"{at}{name}: this machine has {many if there else 'no GPU that torch can use'}")
    return there[int(found[1] or 0)]
