"""The kernels are tested with a team, also where each worker has one core."""

from __future__ import annotations

import pytest

from ktx.kernels import cpu


@pytest.fixture(autouse=True, scope="package")
def _a_team_of_two():
    before = cpu.ops.threads()
    cpu.ops.set_threads(max(2, before))
    yield
    cpu.ops.set_threads(before)
