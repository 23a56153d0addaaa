"""The environment variables ktx reads, in one table."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from ktx.errors import UsageError, nearest
from ktx.hardware import ISAS


@dataclass(frozen=True)
class Variable:
    """One KTX_* variable: its type, its value when unset, what it does, and a regular expression that its values match."""

    name: str
    kind: type
    default: object
    help: str
    values: str = ".*"


THREADS = r"0*(\d{1,3}|10[01]\d|102[0-4])"
VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("KTX_ISA", str, "", f"lowers the instruction set of the kernels: {', '.join(ISAS)}", "|".join(ISAS)),
        Variable(
            "KTX_GEMM",
            str,
            "exact",
            "exact or fast: many tokens on weights requantised to one scale for 256 (AVX-512), faster and less exact",
            "exact|fast",
        ),
        Variable("KTX_THREADS", int, 0, "size of the kernels' team, 1 to 1024; 0: the usable cores", THREADS),
        Variable(
            "KTX_NUMA",
            str,
            "auto",
            "memory nodes that weights are split over: auto, off, or fake:N, which pretends N nodes, 1 to 8",
            "auto|off|fake:[1-8]",
        ),
        Variable(
            "KTX_GPU",
            str,
            "",
            "fake:N pretends N GPUs, in the CPU's memory, for plans and tests; split:N takes the one there is for N",
            r"(fake|split):[1-9]\d?",
        ),
        Variable("KTX_API_KEY", str, "", "keys of `ktx serve`, or the key of a server that `ktx bench serve` asks"),
        Variable(
            "KTX_PEER_PATH", str, "", "folder that is put on PYTHONPATH of the peer process of `ktx bench --peer`"
        ),
    )
}


def environment(name: str, environ: Mapping[str, str] = os.environ) -> object:
    """The value of a variable of the table; UsageError for one that it cannot have."""
    variable = VARIABLES[name]
    text = environ.get(name, "")
    if not text:
        return variable.default
    if not re.fullmatch(variable.values, text, re.S):
        raise UsageError(f"{name}={text} is not known: {variable.help}")
    return variable.kind(text)


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """UsageError for a variable of the table with a value that means nothing; a warning for a KTX_* variable that nobody reads: it is misspelt."""
    for name in environ:
        if name in VARIABLES:
            environment(name, environ)
        elif name.startswith("KTX_"):
            warnings.warn(f"the environment variable {name} is not known{nearest(name, VARIABLES)}", stacklevel=2)
