"""Two GPUs are pretended where there is none; one is taken for two."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ktx.kernels.gpu import quant_matmul


@pytest.fixture(autouse=True, scope="package")
def _two_gpus():
    with pytest.MonkeyPatch.context() as patch:
        there = torch.cuda.device_count()
        if there < 2:
            patch.setenv("KTX_GPU", "split:2" if there else "fake:2")
        yield


@pytest.fixture(autouse=True, scope="package")
def _wide_tiles():
    """Triton's interpreter needs as long for a small tile as for a wide one. What the tiles of a GPU compute is for
    tests/kernels.
    """
    with pytest.MonkeyPatch.context() as patch:
        if quant_matmul.INTERPRETED.value:
            patch.setattr(quant_matmul, "GEMV_WEIGHTS", 1 << 17)
            patch.setattr(quant_matmul, "GEMM_ROWS", 256)
        yield
