"""A forked child computes, whatever other threads of its parent were doing, and the parent goes on as if nothing had
been.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# A process of its own: one thread forks, others compute, and each child says by its exit status what it found.
PROGRAM = """
import contextlib, json, multiprocessing, os, subprocess, sys, threading
import torch
import ktx, ktx.demo
from ktx.errors import UsageError
from ktx.kernels import cpu, microbench
from ktx.quant.types import QTYPES

torch.set_grad_enabled(False)
model, tokenizer = ktx.load(ktx.demo.path(), weights=ktx.demo.gguf(), progress=False)
long = torch.arange(20, 220)[None]
short = long[:, :30]
right, right_long = model(short).logits, model(long).logits
context = multiprocessing.get_context("fork")


def computes():
    assert torch.equal(model(short).logits, right)


@contextlib.contextmanager
def threads(*works):
    ended, wrong = threading.Event(), []

    def go_on(work):
        try:
            while not ended.is_set():
                with torch.no_grad():
                    work()
        except BaseException as error:
            wrong.append(repr(error))

    running = [threading.Thread(target=go_on, args=(work,)) for work in works]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in running:
            thread.join(60)
        assert not wrong, wrong
        assert not any(thread.is_alive() for thread in running)


def busy():
    assert torch.equal(model(long).logits, right_long)


def other_sizes():
    for team in (1, 2, 3):
        cpu.ops.set_threads(team)
        computes()


def children(target, count):
    for _ in range(count):
        child = context.Process(target=target)
        child.start()
        child.join(60)
        if child.is_alive():
            child.kill()
            child.join()
            return "hangs"
        if child.exitcode:
            return f"exit {child.exitcode}"
    return "ok"


def forks():
    with threads(busy):
        assert children(computes, 3) == "ok"
    computes()


def executes():
    words = [sys.executable, "-c", "from ktx.kernels import cpu, microbench; from ktx.quant.types import QTYPES; microbench.prompt_rate(QTYPES['Q8_0'])"]
    os.execv(sys.executable, words)


def spawned():
    child = multiprocessing.get_context("spawn").Process(target=microbench.prompt_rate, args=(QTYPES["Q8_0"],))
    child.start()
    child.join(100)
    return child.exitcode


def answers(engine, count):
    prompts = [long[0, i : i + 40].tolist() for i in range(count)]
    said = {i: [] for i in range(count)}
    for i, event in engine.generate(prompts):
        said[i].append((getattr(event, "text", ""), getattr(event, "reason", "")))
    return said


def leaves(engine):
    try:
        engine.submit([5, 6], None, print)
    except UsageError as error:
        assert "forked" in str(error)
    else:
        raise AssertionError
    engine.close()
    with model.ktx.engine(kv_cache_tokens=512) as own:
        assert len(answers(own, 1)) == 1


found = {"idle": children(computes, 2)}
with threads(busy):
    found["one thread"] = children(computes, 8)
with threads(busy, computes, busy):
    found["three threads"] = children(computes, 4)
with threads(other_sizes):
    found["teams that change"] = children(computes, 6)
cpu.ops.set_threads(2)
with threads(busy):
    found["of a fork"] = children(forks, 1)
if not cpu.ops.nodes() > 1:  # once is enough for what begins with new memory
    with threads(busy):
        found["exec"] = children(executes, 1)
        found["spawn"] = "ok" if spawned() == 0 else "failed"
with model.ktx.engine(kv_cache_tokens=2048) as engine:
    alone = answers(engine, 3)
    engine.reset_prefix_cache()
    with threads(lambda: answers(engine, 3) == alone or sys.exit("the engine's answers changed")):
        found["engine"] = children(computes, 4)
        found["the engine in a child"] = children(lambda: leaves(engine), 1)
computes()
print(json.dumps(found))
"""  # noqa: E501
FORKS = ("idle", "one thread", "three threads", "teams that change", "of a fork", "engine", "the engine in a child")


@pytest.mark.parametrize("numa, cases", [("off", (*FORKS, "exec", "spawn")), ("fake:2", FORKS)])
def test_a_forked_child_computes(numa, cases):
    env = os.environ | {"PYTHONPATH": os.getcwd(), "KTX_THREADS": "2", "OMP_NUM_THREADS": "2", "KTX_NUMA": numa}
    got = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=600)
    assert got.returncode == 0, got.stderr
    assert json.loads(got.stdout.splitlines()[-1]) == dict.fromkeys(cases, "ok")
