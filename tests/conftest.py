"""During tests uninitialised memory is NaN, so an output that a kernel forgot to write fails instead of passing by
luck.
"""

from __future__ import annotations

import logging
import os

if (
    workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
) > 1:  # their teams would wait for each other's cores
    share = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("KTX_THREADS", str(share))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `import ktx` has it where it comes before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("USE_HUB_KERNELS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():  # Triton decides when a kernel is defined whether its interpreter runs it
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """A machine that is shared may stand still for seconds: what is too slow by itself is so three times."""
    for item in items:
        if item.get_closest_marker("wall_clock"):
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=3))


@pytest.fixture(autouse=True, scope="session")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_as_before():
    """A command that ran in this process sends its log to a standard error that is closed when the test is over."""
    loggers = [logging.getLogger(name) for name in ("ktx", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
