"""The devices that modules can be placed on: the CPU and GPUs.

Fake GPUs serve plans and tests on a machine without a GPU: `KTX_GPU=fake:2` creates cuda:0 and cuda:1. Their tensors
are in CPU memory and Triton's interpreter runs their kernels (TRITON_INTERPRET=1 must be set before they are
imported). One GPU can be presented as several: with `KTX_GPU=split:2`, cuda:0 and cuda:1 are both the first GPU.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from ktx.errors import UsageError
from ktx.utils.deprecation import deprecated_arguments, deprecated_members

GPU_VARIABLE = "KTX_GPU"
FAKE_GPU_BYTES = 80 << 30  # memory of a fake GPU


@deprecated_members(pretended="fake")
@deprecated_arguments(pretended="fake")
@dataclass(frozen=True)
class Device:
    """A device for modules.

    `name` is cpu or cuda:N. `torch` is the device of its tensors. `gpu`: its kernels are Triton's. `fake`: a fake GPU,
    which tests place modules on; its tensors are on the CPU.
    """

    name: str
    torch: torch.device
    gpu: bool = False
    fake: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def memory(self) -> tuple[int, int]:
        """(total, free) memory of a GPU in bytes."""
        if self.fake:
            return FAKE_GPU_BYTES, FAKE_GPU_BYTES
        free, total = torch.cuda.mem_get_info(self.torch)
        return total, free


CPU = Device("cpu", torch.device("cpu"))


def gpus() -> list[Device]:
    """The GPUs of this machine, or those that KTX_GPU defines. Raises UsageError for an invalid KTX_GPU."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested := os.environ.get(GPU_VARIABLE, ""):
        match = re.fullmatch(r"(fake|split):([1-9]\d?)", requested)
        if match is None or (match[1] == "split" and not num_gpus):
            raise UsageError(
                f"{GPU_VARIABLE}={requested}: set fake:N for N fake GPUs, split:N to present an existing GPU as N, or"
                " unset it"
            )
        fake = match[1] == "fake"
        device = torch.device("cpu") if fake else torch.device("cuda", 0)
        return [Device(f"cuda:{i}", device, True, fake) for i in range(int(match[2]))]  # True: gpu
    return [Device(f"cuda:{i}", torch.device("cuda", i), True) for i in range(num_gpus)]


def parse_device(name: str, location: str = "") -> Device:
    """The device that a rule or an option names.

    Args:
        name: cpu, cuda or cuda:N.
        location: the place of the name, as a prefix for messages.

    Raises:
        UsageError: the name is invalid, or this machine does not have the device.
    """
    prefix = f"{location}: " if location else ""
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name.strip())
    if match is None:
        raise UsageError(f"{prefix}{name!r} is not a device; use cpu, cuda or cuda:N")
    if name.strip() == "cpu":
        return CPU
    available = gpus()
    if int(match[1] or 0) >= len(available):
        num = f"{len(available)} GPUs, cuda:0 to cuda:{len(available) - 1}" if len(available) > 1 else "one GPU, cuda:0"
        raise UsageError(f"{prefix}{name}: this machine has {num if available else 'no GPU that torch can use'}")
    return available[int(match[1] or 0)]
