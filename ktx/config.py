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
        Variable(
            "KTX_ISA",
            str,
            "",
            f"{', '.join(f'`{name}`' for name in ISAS if name != 'amxmodel')}: lowers the instruction set, never raises it; `amxmodel` is AMX's kernels on tiles in software, for tests",
        ),
        Variable("KTX_THREADS", int, 0, "size of the worker team; default the usable physical cores"),
        Variable(
            "KTX_NUMA",
            str,
            "auto",
            "`auto` (default): rows of every matrix are split over the machine's memory nodes; `off`; `fake:N` pretends N nodes, to test",
        ),
        Variable(
            "KTX_GEMM",
            str,
            "exact",
            "`exact` (default) or `fast`: many tokens on weights requantised to a scale for 256 columns (AVX-512); `make cpu-check` prints its error",
        ),
        Variable(
            "KTX_GPU",
            str,
            "",
            "`fake:N` pretends N GPUs in the CPU's memory, for plans and tests; their kernels run in Triton's interpreter (`TRITON_INTERPRET=1`). `split:N` takes the first GPU there is for N",
        ),
        Variable(
            "KTX_API_KEY", str, "", "keys of `ktx serve`, with spaces between; `ktx bench serve` asks with the first"
        ),
        Variable("KTX_PEER_PATH", str, "", "folder in which `ktx bench --peer` finds the peer's library"),
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
