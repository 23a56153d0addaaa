"""Two GPUs are pretended where there is none; one is taken for two."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True, scope="package")
def _two_gpus():
    with pytest.MonkeyPatch.context() as patch:
        there = torch.cuda.device_count()
        if there < 2:
            patch.setenv("KTX_GPU", "split:2" if there else "fake:2")
        yield
