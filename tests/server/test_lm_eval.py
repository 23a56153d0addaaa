"""lm-evaluation-harness finds the same through the server as with plain transformers.

Its tasks are in lm_eval/; nothing is fetched.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ktx
from ktx import demo
from tests.server.conftest import NAME, serving

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

SCORED, WRITTEN = ["ktx_choices", "ktx_heldout"], ["ktx_answers"]
ITEMS = 20  # of each task


@pytest.fixture(scope="module")
def evaluate():
    tasks = TaskManager(include_path=str(Path(__file__).parent / "lm_eval"), include_defaults=False)

    def run(kind, names, **options):
        common = {"limit": ITEMS, "log_samples": True, "bootstrap_iters": 0, "task_manager": tasks}
        return simple_evaluate(model=kind, model_args=options, tasks=names, **common)

    return run


@pytest.fixture(scope="module")
def stock(evaluate):
    """What plain transformers gives in float32."""
    options = {"pretrained": str(demo.path()), "dtype": "float32", "device": "cpu", "batch_size": 16}
    return evaluate("hf", SCORED, add_bos_token=False, **options)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A server of the same weights in float32."""
    folder = tmp_path_factory.mktemp("f32")
    for file in demo.path().glob("*.json"):
        shutil.copy(file, folder)
    weights = load_file(demo.path() / "model.safetensors")
    save_file({name: weight.float() for name, weight in weights.items()}, folder / "model.safetensors")
    model, _ = ktx.load(folder, kv_dtype="f32", progress=False)
    with serving(model.ktx.engine()) as (base, _):
        yield base


@pytest.fixture(scope="module")
def quantised():
    model, _ = ktx.load(demo.path(), weights=demo.gguf(), progress=False)
    with serving(model.ktx.engine()) as (base, _):
        yield base


def through(evaluate, base, **options):
    begin = {"custom_prefix_token_id": 0}  # lm-eval takes a begin mark that is token 0 for none
    return evaluate(
        "local-completions", SCORED + WRITTEN, model=NAME, base_url=f"{base}/v1/completions", **(begin | options)
    )


def likelihoods(found, task):
    """Of every choice of every document, or of every document."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    assert len(samples) == ITEMS
    rows = [resp for sample in samples for resp in sample["filtered_resps"]]
    return torch.tensor([row[0] if isinstance(row, tuple | list) else row for row in rows], dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer_backend": "remote"},
        {"tokenizer_backend": "huggingface", "tokenizer": str(demo.path()), "num_concurrent": 3, "batch_size": 5},
    ],
    ids=["one by one, the server's tokenizer", "batches at once"],
)
def test_float32_gives_what_transformers_gives(evaluate, stock, exact, options):
    found = through(evaluate, exact, **options)
    for task in SCORED:
        difference = (likelihoods(found, task) - likelihoods(stock, task)).abs()
        assert difference.mean() <= 0.01, f"{task}: {difference}"
    for metric in ("acc,none", "acc_norm,none"):
        assert found["results"]["ktx_choices"][metric] == stock["results"]["ktx_choices"][metric]
    assert found["results"]["ktx_answers"]["exact_match,none"] == 1.0


def test_a_quantised_model_chooses_as_its_original_does(evaluate, stock, quantised):
    """Within what Q4_K_M costs: 1 % of the perplexity."""
    found = through(evaluate, quantised, tokenizer_backend="auto")
    assert found["results"]["ktx_choices"]["acc,none"] == stock["results"]["ktx_choices"]["acc,none"]
    assert found["results"]["ktx_answers"]["exact_match,none"] == 1.0
    bits = [side["results"]["ktx_heldout"]["bits_per_byte,none"] for side in (found, stock)]
    assert bits[0] == pytest.approx(bits[1], rel=0.02)
