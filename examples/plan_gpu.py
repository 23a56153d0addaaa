"""Plans a model for a GPU that this machine does not have: which modules fit into its memory, and how many bytes.

    python examples/plan_gpu.py [--model DIR --weights FILE] [--vram 24] [--ram 64]

Without --model it uses the bundled demo model. Only headers are read, no weights are loaded.
"""

from __future__ import annotations

import argparse
import sys

import ktx.demo
from ktx.errors import DoesNotFit
from ktx.hardware import format_bytes
from ktx.loader.build import measure_footprint
from ktx.placement.solver import Budget
from ktx.placement.suggest import fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ktx.demo.path()), metavar="DIR", help="model folder (default: demo)")
    parser.add_argument("--weights", metavar="FILE", help="GGUF or safetensors (default: those in --model)")
    parser.add_argument("--vram", type=float, default=24.0, metavar="GB", help="memory of the GPU (default 24)")
    parser.add_argument("--ram", type=float, default=64.0, metavar="GB", help="memory of the CPU (default 64)")
    args = parser.parse_args()
    demo = args.model == str(ktx.demo.path())
    footprint, _ = measure_footprint(args.model, args.weights or (ktx.demo.gguf() if demo else None))
    budget = Budget(vram=(int(args.vram * 1e9),), ram=int(args.ram * 1e9), context=8192)
    try:
        placement = fit(footprint, budget)
    except DoesNotFit as error:
        sys.exit(str(error))
    for device in placement.device_names:
        used = format_bytes(placement.total_bytes(device))
        print(f"{device}: {used} of {format_bytes(budget.bytes_of(device))}")
    for modules, device in placement.device_map().items():
        print(f"{modules} -> {device}")


if __name__ == "__main__":
    main()
