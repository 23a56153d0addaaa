"""/machine and the machine's part of /metrics."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import ktx
from ktx.server.auth import AccessPolicy
from ktx.server.metrics import imbalance
from ktx.server.state import ServerSettings
from tests.server.conftest import NAME, scripted, serving
from tests.support.tiny_chat_model import write_model

KEYS = {"model", "cpu", "isa", "threads", "nodes", "uptime_seconds", "modules"} | {
    "memory",
    "cache",
    "experts",
    "bandwidth",
    "requests",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("chat") / "m", "deepseek_v3", num_hidden_layers=3)
    return ktx.load(folder, folder / "model.gguf", progress=False)[0]


@pytest.fixture(scope="module")
def running(model):
    with serving(model.ktx.engine(kv_cache_tokens=2048)) as (base, served):
        yield base, served


def ask(base, text, tokens=8):
    body = {"model": NAME, "prompt": text, "max_tokens": tokens, "ignore_eos": True}
    answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]


def metrics(base):
    """By name, pairs of labels (without the model's name) and value."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{base}/metrics").text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            found.setdefault(sample.name, []).append((labels, sample.value))
    return found


def test_what_is_told_of_a_model(running, model):
    base, served = running
    before = httpx.get(f"{base}/machine").json()
    usage = ask(base, "x" * 100)
    told = httpx.get(f"{base}/machine").json()
    assert told.keys() == KEYS and told["model"] == NAME and told["isa"] == model.ktx.isa
    assert told["threads"] >= 1 and told["nodes"] == len(told["experts"]["seconds"]) and told["cpu"]
    assert told["uptime_seconds"] >= before["uptime_seconds"] > 0
    experts = told["experts"]
    assert (experts["layers"], experts["count"], experts["top"]) == ([1, 2], 16, 3)
    grown = [
        sum(row) - sum(old) for row, old in zip(experts["activations"], before["experts"]["activations"], strict=True)
    ]
    assert grown == [3 * (usage["prompt_tokens"] + usage["completion_tokens"] - 1)] * 2
    assert all(len(row) == 16 for row in experts["activations"])
    read = told["bandwidth"]
    assert read["measured_gbps"] is None and read["bytes"] > read["expert_bytes"] > 0
    assert read["seconds"] > read["expert_seconds"] >= max(experts["seconds"]) > 0
    assert told["requests"]["running"] == told["requests"]["waiting"] == 0
    assert told["requests"]["answer_tokens"] - before["requests"]["answer_tokens"] == 8
    assert told["requests"]["prompt_tokens"] - before["requests"]["prompt_tokens"] == 100
    cache, memory = told["cache"], told["memory"]
    assert (cache["pages"], cache["page_tokens"], cache["used"]) == (32, 64, 0) and 0 < cache["idle"] <= 32
    assert cache["queries"] - before["cache"]["queries"] == 100 and cache["hits"] >= 0
    assert memory["weights_bytes"] == model.ktx.nbytes and memory["cache_bytes"] == served.engine.runner.nbytes()
    assert memory["weights_bytes"] < memory["rss_bytes"] < memory["total_bytes"] >= memory["free_bytes"] > 0


def test_every_module_with_weights_is_told(running, model):
    told = httpx.get(f"{running[0]}/machine").json()["modules"]
    by_name = {one["name"]: one for one in told}
    assert len(by_name) == len(told) and sum(one["bytes"] for one in told) == model.ktx.nbytes
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert by_name["model.layers.1.mlp.experts"] == {
        "name": "model.layers.1.mlp.experts",
        "layer": 1,
        "operator": "Experts",
        "device": "cpu",
        "types": "/".join(dict.fromkeys(w.qtype.name for w in experts.weights.values())),
        "bytes": experts.weight_bytes()[0],
    }
    assert by_name["lm_head"]["layer"] is None and by_name["lm_head"]["operator"] == "Linear"
    assert {step.path for step in model.ktx.plan if step.nbytes} <= by_name.keys()


def test_modules_that_were_left_alone_are_told(tmp_path):
    folder = write_model(tmp_path / "m", "llama")
    kept = ktx.load(folder, folder / "model.gguf", rules=[], progress=False)[0]
    with serving(kept.ktx.engine(kv_cache_tokens=512)) as (base, _):
        ask(base, "hello")
        told = httpx.get(f"{base}/machine").json()
        assert told["experts"] is None and told["bandwidth"]["bytes"] > 0 and told["bandwidth"]["expert_bytes"] == 0
        modules = {one["name"]: one for one in told["modules"]}
        assert modules["model.layers.0.self_attn.q_proj"]["operator"] == "Linear"
        assert modules["model.norm"] == {
            "name": "model.norm", "layer": None, "operator": "LlamaRMSNorm", "device": "cpu", "types": "F32",
            "bytes": 1024,
        }  # fmt: skip
        assert sum(one["bytes"] for one in told["modules"]) == kept.ktx.nbytes


def test_a_script_has_no_experts_and_no_weights(server):
    told = httpx.get(f"{server}/machine").json()
    assert told.keys() == KEYS and told["experts"] is None and told["modules"] == []
    assert told["memory"]["weights_bytes"] == 0 and told["bandwidth"]["measured_gbps"] is None
    assert told["bandwidth"]["bytes"] == 0 and told["cache"]["pages"] > 0
    names = metrics(server)
    assert names["ktx:gpu_wait_seconds_total"] == [({}, 0.0)] and "ktx:bandwidth_used_ratio" not in names
    assert "ktx:expert_activations_total" not in names


def test_the_machine_is_told_to_those_with_a_key_only(tmp_path_factory):
    with serving(scripted(tmp_path_factory), AccessPolicy(("secret",)), ServerSettings()) as (base, _):
        assert httpx.get(f"{base}/machine").status_code == 401
        assert httpx.get(f"{base}/machine", headers={"authorization": "Bearer secret"}).status_code == 200


def test_while_loading_it_says_so():
    with serving() as (base, served):
        served.progress.total, served.progress.done = 100, 40
        answer = httpx.get(f"{base}/machine")
        assert answer.status_code == 503 and "40 %" in answer.json()["error"]["message"]


def test_metrics_are_what_the_machine_says(running):
    base, served = running
    ask(base, "y" * 30)
    served.bandwidth = 20.0
    try:
        metrics(base)
        ask(base, "z" * 30)
        told, names = httpx.get(f"{base}/machine").json(), metrics(base)
        assert told["bandwidth"]["measured_gbps"] == 20.0
        experts, read = told["experts"], told["bandwidth"]
        activations = {labels["layer"]: value for labels, value in names["ktx:expert_activations_total"]}
        assert activations == {"1": sum(experts["activations"][0]), "2": sum(experts["activations"][1])}
        imbalances = {labels["layer"]: value for labels, value in names["ktx:expert_imbalance"]}
        assert imbalances["1"] == pytest.approx(imbalance(experts["activations"][0])) and 1 < imbalances["1"] <= 16 / 3
        assert names["ktx:expert_seconds_total"] == [({"node": "0"}, pytest.approx(experts["seconds"][0]))]
        assert names["ktx:weight_bytes_read_total"] == [({}, read["bytes"])]
        assert names["ktx:expert_bytes_read_total"] == [({}, read["expert_bytes"])]
        assert names["ktx:forward_seconds_total"] == [({}, pytest.approx(read["seconds"]))]
        assert names["ktx:bandwidth_measured_bytes_per_second"] == [({}, 20e9)]
        ((_, share),) = names["ktx:bandwidth_used_ratio"]
        assert 0 < share < 50
        assert metrics(base)["ktx:bandwidth_used_ratio"] == [({}, 0.0)]  # nothing has run since
        assert names["ktx:kv_cache_bytes"] == [({}, told["memory"]["cache_bytes"])]
        assert names["process_resident_memory_bytes"][0][1] > 0
    finally:
        served.bandwidth = None


def test_metrics_say_how_much_of_a_prompt_a_step_may_compute_and_how_fast_it_was(running):
    base, served = running
    ask(base, "p" * 200)
    talking = threading.Thread(target=ask, args=(base, "talk", 450))
    talking.start()
    while not any(request.num_output for request in served.engine.scheduler.running):
        assert talking.is_alive()
        time.sleep(0.002)
    budget = served.engine.budget
    for letter in "qrstuv":  # beside the answer
        if True not in budget.latest:
            ask(base, letter * 200, 1)
    talking.join()
    names = metrics(base)
    assert names["ktx:max_itl_seconds"] == [({}, 0.5)]
    allowed = {labels["answers"]: value for labels, value in names["ktx:max_num_batched_tokens"]}
    assert allowed == {"none": budget.max_prompt_tokens(), "some": budget.max_prompt_tokens(decoding=True)}
    assert allowed["some"] >= 64
    for name in ("prefill_tokens_per_second", "prefill_step_seconds"):
        found = {labels["answers"]: value for labels, value in names[f"ktx:{name}"]}
        assert found.keys() == {"none", "some"} and min(found.values()) > 0


def test_imbalance_is_the_most_over_the_mean():
    assert imbalance([2, 2, 2]) == 1 and imbalance([0, 0]) == 1 and imbalance([6, 0, 0]) == 3


def test_it_answers_and_grows_while_answers_are_made(running):
    base, _ = running
    askers = [threading.Thread(target=ask, args=(base, chr(98 + i) * 40, 40)) for i in range(4)]
    for asker in askers:
        asker.start()
    seen = []
    with httpx.Client(base_url=base) as client:
        while any(asker.is_alive() for asker in askers):
            seen.append(client.get("/machine").json())
            assert client.get("/metrics").status_code == 200
    for asker in askers:
        asker.join()
    assert max(told["requests"]["running"] for told in seen) > 1
    tokens = [told["requests"]["answer_tokens"] for told in seen]
    assert tokens == sorted(tokens) and len(set(tokens)) > 2
    read = [told["bandwidth"]["bytes"] for told in seen]
    assert read == sorted(read)
