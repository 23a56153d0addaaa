"""Two GPUs are pretended where there is none, or fewer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True, scope="package")
def _two_gpus():
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.device_count() < 2:
            patch.setenv("KTX_GPU", "fake:2")
        yield
