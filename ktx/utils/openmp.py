"""OpenMP's wait policy, set before torch is imported.

torch's OpenMP threads spin for milliseconds after their work, on the cores that ktx's worker threads need, which made
prefill 15 % slower. The OpenMP runtime reads OMP_WAIT_POLICY when torch is imported, so this only helps if ktx is
imported first; ktx.model.notes reports when it was not.
"""

from __future__ import annotations

import os
import sys

TORCH_CAME_FIRST = "torch" in sys.modules and not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
