"""Names of devices, and GPUs that a machine pretends to have."""

from __future__ import annotations

import pytest
import torch

from ktx.devices import CPU, gpus, parse_device
from ktx.errors import UsageError


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("KTX_GPU", "fake:2")


def test_pretended_gpus_lie_in_memory(two):
    first, second = gpus()
    assert (first.name, str(second)) == ("cuda:0", "cuda:1") and first.gpu and first.torch == torch.device("cpu")
    assert (
        parse_device("cuda") == first and parse_device("cuda:1", "x.yaml:3") == second and parse_device(" cpu") is CPU
    )
    assert first.memory[0] >= first.memory[1] > 0


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "meta", "mps", "", "cpu:0"])
def test_a_word_that_is_no_device(two, name):
    with pytest.raises(UsageError, match="x.yaml:3: .*is not a device; use cpu, cuda or cuda:N"):
        parse_device(name, "x.yaml:3")


def test_a_gpu_that_is_not_there(two, monkeypatch):
    with pytest.raises(UsageError, match="cuda:2: this machine has 2 GPUs, cuda:0 to cuda:1"):
        parse_device("cuda:2")
    monkeypatch.setenv("KTX_GPU", "fake:1")
    with pytest.raises(UsageError, match="has one GPU, cuda:0"):
        parse_device("cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(monkeypatch):
    monkeypatch.delenv("KTX_GPU", raising=False)
    assert gpus() == []
    with pytest.raises(UsageError, match="no GPU that torch can use"):
        parse_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_one_gpu_taken_for_several(monkeypatch):
    monkeypatch.setenv("KTX_GPU", "split:3")
    assert [str(gpu) for gpu in gpus()] == ["cuda:0", "cuda:1", "cuda:2"]
    assert {gpu.torch for gpu in gpus()} == {torch.device("cuda", 0)} and not any(gpu.fake for gpu in gpus())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_cannot_be_taken_for_several(monkeypatch):
    monkeypatch.setenv("KTX_GPU", "split:2")
    with pytest.raises(UsageError, match="split:2: set"):
        gpus()


@pytest.mark.parametrize("wish", ["fake", "fake:0", "fake:1000", "split", "2", "real"])
def test_a_pretence_that_cannot_be_meant(monkeypatch, wish):
    monkeypatch.setenv("KTX_GPU", wish)
    with pytest.raises(UsageError, match=f"KTX_GPU={wish}: set fake:N"):
        gpus()
