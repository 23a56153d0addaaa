"""The environment variables ktx reads, in one table."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from ktx.errors import UsageError, nearest
from ktx.hardware import ISAS


@dataclass(frozen=True)
class Variable:
    """One KTX_* variable: its type, its value when unset, and what it does."""

    name: str
    kind: type
    default: object
    help: str


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("KTX_ISA", str, "", f"lowers the instruction set of the kernels: {', '.join(ISAS)}"),
        Variable(
            "KTX_GEMM",
            str,
            "exact",
            "fast: many tokens on weights requantised to one scale for 256 (AVX-512), faster and less exact",
        ),
        Variable("KTX_THREADS", int, 0, "size of the kernels' team; 0: the usable cores"),
        Variable(
            "KTX_NUMA",
            str,
            "auto",
            "memory nodes that weights are split over: auto, off, or fake:N, which pretends N nodes",
        ),
        Variable("KTX_GPU", str, "", "fake:N pretends N GPUs, in the CPU's memory, for plans and tests"),
        Variable(
            "KTX_PEER_PATH", str, "", "folder that is put on PYTHONPATH of the peer process of `ktx bench --peer`"
        ),
    )
}


def environment(name: str, environ: Mapping[str, str] = os.environ) -> object:
    """The value of a variable of the table; UsageError when it cannot be read as its type."""
    variable = VARIABLES[name]
    text = environ.get(name, "")
    if not text:
        return variable.default
    try:
        return variable.kind(text)
    except ValueError:
        raise UsageError(f"{name}={text!r}: must be {variable.kind.__name__}; {variable.help}") from None


def warn_unknown(environ: Mapping[str, str] = os.environ) -> None:
    """A KTX_* variable that nobody reads is a misspelt one."""
    for name in environ:
        if name.startswith("KTX_") and name not in VARIABLES:
            warnings.warn(f"the environment variable {name} is not known{nearest(name, VARIABLES)}", stacklevel=2)
