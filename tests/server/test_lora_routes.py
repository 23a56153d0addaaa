"""Adapters that requests load and unload while others are answered."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import shutil
import threading
import time

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model

from ktx.engine.sampler import SamplingParams
from ktx.server.openai import completions
from ktx.server.state import ServerSettings
from tests.families.test_families import load
from tests.server.conftest import NAME, serving
from tests.support.gguf_writer import write_gguf_lora
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny

PROMPT = "The quick brown fox jumps over the lazy dog. " * 4  # more than two pages
KINDS = {"one": 0, "two": 3}  # seeds


def base_model():
    return tiny("llama", tie_word_embeddings=False)


def adapter(folder, seed, **more):
    config = LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 18,
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "init_lora_weights": False,
            **more,
        }
    )
    model = base_model()
    torch.manual_seed(seed)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Adapters one and two, two once more as a file, and an adapter outside."""
    made = tmp_path_factory.mktemp("served")
    base_model().save_pretrained(made / "model")
    (made / "adapters").mkdir()
    for name, seed in KINDS.items():
        adapter(made / "adapters" / name, seed)
    write_gguf_lora(made / "adapters" / "two.gguf", made / "adapters" / "two", base_model())
    adapter(made / "outside", 5)
    return made / "adapters"


@pytest.fixture(scope="module")
def expected(root):
    """Greedy answers to PROMPT, of 300 tokens, by the model and by each adapter.

    A server without runtime loading gives the same.
    """
    model = load(root.parent / "model", None, lora=[root / name for name in KINDS])
    model.ktx.use_lora()
    model.ktx.tokenizer = tokenizer()
    found = {}
    with model.ktx.engine(max_batch_size=4, kv_cache_tokens=4096) as engine:
        for name in (NAME, *KINDS):
            sampling = SamplingParams(max_new_tokens=300, ignore_eos=True)
            events = engine.generate([PROMPT], sampling, () if name == NAME else name)
            found[name] = "".join(event.text for _, event in events if hasattr(event, "text"))
    assert len({text[:6] for text in found.values()}) == 3
    return found


@pytest.fixture(scope="module")
def engine(root):
    model = load(root.parent / "model", None)
    model.ktx.tokenizer = tokenizer()
    with model.ktx.engine(max_batch_size=8, kv_cache_tokens=8192) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine, root):
    with serving(engine, names=(NAME, "alias"), settings=ServerSettings(keepalive_s=0.2, lora_dir=root)) as made:
        yield made


@pytest.fixture
def client(server):
    """Of a server whose adapters are gone when the test is over."""
    base, served = server
    with httpx.Client(base_url=base, timeout=120) as made:
        made.served = served
        yield made
        for name in list(served.names.adapters):
            assert made.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
    engine, deadline = served.engine, time.monotonic() + 20
    while engine.runner.adapters.known and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engine.runner.adapters.known and not engine.runner.adapters.loras and not engine.unloading_adapters
    engine.check_integrity()
    served.names.adapter_ids = itertools.count()


def loaded(client, name, path, **more):
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})
    assert answer.status_code == 200, answer.text
    assert answer.text == f"Success: LoRA adapter '{name}' added successfully."


def unloaded(client, name):
    answer = client.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert answer.status_code == 200, answer.text
    assert answer.text == f"Success: LoRA adapter '{name}' removed successfully."


def asked(name, tokens=12, **more):
    return {
        "model": name,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": True,
        **more,
    }


def said(client, name, tokens=12):
    answer = client.post("/v1/completions", json=asked(name, tokens))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def refused(client, status, words, **body):
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": "new", **body})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"], answer.text
    assert "new" not in [model["id"] for model in client.get("/v1/models").json()["data"]]


def test_a_server_without_a_folder_offers_nothing():
    with serving() as (base, _):
        for route in ("load", "unload"):
            body = {"lora_name": "one"} | ({"lora_path": "/tmp"} if route == "load" else {})
            answer = httpx.post(f"{base}/v1/{route}_lora_adapter", json=body)
            assert answer.status_code == 404 and "--lora-dir" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path, kind", [("one", "one"), ("two.gguf", "two"), ("one/adapter_model.safetensors", "one")])
@pytest.mark.parametrize("absolute", [True, False])
def test_an_adapter_comes_and_goes(client, root, expected, path, kind, absolute):
    missing = client.post("/v1/completions", json=asked("style"))
    assert missing.status_code == 404
    loaded(client, "style", root / path if absolute else path)
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert list(models) == [NAME, "alias", "style"]
    assert models["style"]["parent"] == NAME and models["style"]["root"] == str(root / path)
    assert models[NAME]["parent"] is None and models[NAME]["root"] == NAME
    assert expected[kind].startswith(said(client, "style")) and expected[NAME].startswith(said(client, NAME))
    unloaded(client, "style")
    gone = client.post("/v1/completions", json=asked("style"))
    assert gone.status_code == 404 and gone.json() == missing.json()
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME, "alias"]
    assert expected[NAME].startswith(said(client, NAME))


def test_another_adapter_by_the_same_name_shares_no_pages(client, root, expected):
    def cached(name):
        answer = client.post("/v1/completions", json=asked(name)).json()
        assert expected[kind].startswith(answer["choices"][0]["text"])
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    client.served.engine.reset_prefix_cache()
    for kind, seen in (("one", False), ("two", False), ("one", True)):
        loaded(client, "style", root / kind)
        assert bool(cached("style")) is seen, "what another adapter has computed, or not what the same one has"
        assert cached("style") >= 128
        unloaded(client, "style")


def test_a_name_that_is_taken(client, root, expected):
    loaded(client, "style", "one")
    again = client.post("/v1/load_lora_adapter", json={"lora_name": "style", "lora_path": "two"})
    assert again.status_code == 400 and "has already been loaded" in again.json()["error"]["message"]
    assert expected["one"].startswith(said(client, "style"))
    loaded(client, "style", "two", load_inplace=True)
    assert expected["two"].startswith(said(client, "style")) and list(client.served.names.adapters) == ["style"]
    loaded(client, "other", "one", load_inplace=True)
    assert expected["one"].startswith(said(client, "other"))


@pytest.mark.parametrize("name", [NAME, "alias", "", " ", "x:latest", "a\nb", "n" * 300, "a\0b", None, 3])
def test_names_that_no_adapter_can_have(client, name):
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "one"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert not client.served.names.adapters


def test_what_is_not_there(client):
    answer = client.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"})
    assert answer.status_code == 404 and "cannot be found" in answer.json()["error"]["message"]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": NAME}).status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={}).status_code == 400
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "x"}).status_code == 400
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "one", "y": 1}).status_code == 400


@pytest.mark.parametrize(
    "path, status",
    [
        ("../outside", 400),
        ("/etc/passwd", 400),
        ("/nothing/at/all", 400),
        ("one/../../outside", 400),
        ("../link_in.gguf", 400),
        ("~/one", 404),
        ("nothing", 404),
        ("one/nothing.safetensors", 404),
        ("link_out", 400),
        ("weights_out", 400),
        ("config_out", 400),
        ("weights_out/adapter_model.safetensors", 400),
        ("file_out.gguf", 400),
        ("gguf_out", 400),
        ("ring", 404),
        ("a\0b", 400),
        ("x" * 4000, 400),
        ("pickled", 400),
        ("pipe.gguf", 400),
        ("piped", 400),
        ("other_model", 400),
        ("one/adapter_config.json", 400),
        (".", 400),
        ("broken.gguf", 400),
    ],
)
def test_paths_of_requests_are_not_trusted(client, root, path, status):
    odd = {
        "../link_in.gguf": lambda p: p.symlink_to(root / "two.gguf"),
        "link_out": lambda p: p.symlink_to(root.parent / "outside"),
        "weights_out": lambda p: linked(p, root.parent / "outside", "adapter_model.safetensors"),
        "config_out": lambda p: linked(p, root.parent / "outside", "adapter_config.json"),
        "file_out.gguf": lambda p: p.symlink_to(outside_file(root)),
        "gguf_out": lambda p: (p.mkdir(), (p / "a.gguf").symlink_to(outside_file(root))),
        "ring": lambda p: p.symlink_to(p),
        "pickled": lambda p: (
            shutil.copytree(root / "one", p),
            (p / "adapter_model.safetensors").rename(p / "adapter_model.bin"),
        ),
        "pipe.gguf": os.mkfifo,
        "piped": lambda p: (
            shutil.copytree(root / "one", p),
            (p / "adapter_model.safetensors").unlink(),
            os.mkfifo(p / "adapter_model.safetensors"),
        ),
        "other_model": lambda p: wrong_shape(root / "one", p),
        "broken.gguf": lambda p: p.write_bytes((root / "two.gguf").read_bytes()[:500]),
    }
    for name, make in odd.items():
        if not (root / name).is_symlink() and not (root / name).exists():
            make(root / name)
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": path}, timeout=10)
    assert answer.status_code == status, answer.text
    assert not client.served.names.adapters and not client.served.engine.runner.adapters.known


def linked(folder, outside, name):
    shutil.copytree(outside, folder)
    (folder / name).unlink()
    (folder / name).symlink_to(outside / name)


def outside_file(root):
    path = root.parent / "outside.gguf"
    if not path.exists():
        write_gguf_lora(path, root.parent / "outside", base_model())
    return path


def wrong_shape(one, folder):
    shutil.copytree(one, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))


def test_links_inside_the_folder_are_followed(client, root, expected):
    """As the hub's cache has them."""
    folder = root / "snapshot"
    if not folder.exists():
        (root / "blobs").mkdir()
        folder.mkdir()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(root / "two" / name, root / "blobs" / name[::-1])
            (folder / name).symlink_to(f"../blobs/{name[::-1]}")
    loaded(client, "style", folder)
    assert expected["two"].startswith(said(client, "style"))


def test_an_adapter_that_does_not_fit(client, root, monkeypatch):
    monkeypatch.setattr("ktx.model.lora.memory", lambda: (1 << 34, 100))
    refused(client, 503, "of memory", lora_path="one")


def test_requests_that_run_are_answered_to_their_end(client, root, expected):
    """By the adapter that they began with, though its name is another one's by then."""
    loaded(client, "style", "one")
    with client.stream("POST", "/v1/completions", json=asked("style", 300, stream=True)) as stream:
        lines = stream.iter_lines()
        first = next(line for line in lines if line.startswith("data: {"))
        unloaded(client, "style")
        assert client.post("/v1/completions", json=asked("style")).status_code == 404
        loaded(client, "style", "two")
        assert expected["two"].startswith(said(client, "style"))
        assert client.served.engine.unloading_adapters, "the first answer was over too soon to show anything"
        rest = [line for line in lines if line.startswith("data: {")]
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in [first, *rest])
    assert text == expected["one"]
    assert expected["two"].startswith(said(client, "style"))


def test_an_adapter_unloaded_before_its_request_is_queued(client, monkeypatch):
    """The model without the adapter must not answer."""
    loaded(client, "style", "one")
    names, tokenize = client.served.names, completions._tokenize_prompts
    adapters = names.adapters

    def unloading(tokenizer, fields):
        names.remove_adapter("style")
        return tokenize(tokenizer, fields)

    monkeypatch.setattr(completions, "_tokenize_prompts", unloading)
    answer = client.post("/v1/completions", json=asked("style"))
    names.adapters = adapters
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_answers_of_others_stay_the_same_meanwhile(client, root, expected):
    over, wrong = threading.Event(), []

    def ask():
        while not over.is_set():
            if said(client, NAME, 40) != usual:
                wrong.append("base")

    usual = said(client, NAME, 40)
    assert len(usual) > 30 and expected[NAME].startswith(usual)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(ask) for _ in range(2)]
        try:
            for i in range(6):
                kind = list(KINDS)[i % 2]
                loaded(client, f"style{i % 3}", ("one", "two.gguf")[i % 2])
                if not expected[kind].startswith(said(client, f"style{i % 3}")):
                    wrong.append(kind)
                unloaded(client, f"style{i % 3}")
        finally:
            over.set()
        for each in running:
            each.result()
    assert not wrong


def test_every_route_has_them(client, root):
    loaded(client, "style", "two.gguf")
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8},
        "/v1/messages": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8},
        "/v1/responses": {"input": PROMPT, "max_output_tokens": 16},
        "/api/generate": {"prompt": PROMPT, "stream": False, "options": {"num_predict": 8, "temperature": 0}},
    }
    for route, body in bodies.items():
        sampling = {} if route.startswith("/api") else {"temperature": 0}
        answers = [client.post(route, json={"model": name, **body, **sampling}) for name in (NAME, "style")]
        assert [answer.status_code for answer in answers] == [200, 200], route
        found = [answer.json() for answer in answers]
        texts = [
            json.dumps(one.get("choices") or one.get("content") or one.get("output") or one.get("response"))
            for one in found
        ]
        assert texts[0] != texts[1], route
    shown = client.post("/api/show", json={"model": "style"}).json()
    assert shown["details"]["parent_model"] == NAME
    assert client.post("/api/show", json={"model": NAME}).json()["details"]["parent_model"] == ""
    tags = {model["name"]: model for model in client.get("/api/tags").json()["models"]}
    assert tags["style:latest"]["details"]["parent_model"] == NAME
    assert tags["style:latest"]["digest"] != tags[f"{NAME}:latest"]["digest"] == tags["alias:latest"]["digest"]


def test_llama_cpps_list(client, root, expected):
    assert client.get("/lora-adapters").json() == []
    loaded(client, "gone", "one")
    loaded(client, "style", "two.gguf")
    unloaded(client, "gone")
    (listed,) = client.get("/lora-adapters").json()
    assert listed["id"] == 1 and listed["path"] == str(root / "two.gguf") and listed["scale"] == 0.0

    def scaled(lora, **more):
        return client.post("/v1/completions", json=asked(NAME, lora=lora, **more))

    def text(*lora):
        return scaled(list(lora)).json()["choices"][0]["text"]

    assert expected["two"].startswith(text({"id": 1, "scale": 1.0}))
    assert expected["two"].startswith(text({"id": 1, "scale": 3}, {"id": 1, "scale": 1}))
    assert expected[NAME].startswith(text()) and expected[NAME].startswith(text({"id": 1, "scale": 0}))
    half = text({"id": 1, "scale": 0.5})
    assert not expected[NAME].startswith(half) and not expected["two"].startswith(half)
    chat = {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0}
    answers = [
        client.post("/v1/chat/completions", json=chat | more).json()["choices"][0]["message"]["content"]
        for more in ({}, {"lora": [{"id": 1, "scale": 1}]}, {"model": "style"})
    ]
    assert answers[1] == answers[2] != answers[0]
    for lora, words in (([{"id": 0, "scale": 1}], "id 0"), ([{"id": 7, "scale": 1}], "id 7"), ([{"id": 1}], "scale")):
        assert scaled(lora).status_code == 400 and words in scaled(lora).json()["error"]["message"]
    for lora in ("one", [1], [{"id": -1, "scale": 1}], [{"id": 1, "scale": 1e9}], [{"id": 1, "scale": 1, "x": 2}]):
        assert scaled(lora).status_code == 400
    assert scaled([{"id": 1, "scale": 1}], model="style").status_code == 400
    messages = {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
    elsewhere = client.post("/v1/messages", json=messages | {"lora": [{"id": 1, "scale": 1}]})
    assert elsewhere.status_code == 400 and "lora" in elsewhere.json()["error"]["message"]
    answer = client.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}])
    assert answer.status_code == 501 and "request's model" in answer.json()["error"]["message"]
