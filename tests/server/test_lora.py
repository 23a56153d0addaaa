"""A model and its LoRA adapters behind one address, each by its name."""

from __future__ import annotations

import concurrent.futures

import httpx
import pytest
from peft import LoraConfig, get_peft_model

from ktx.cli import serve
from ktx.cli.arguments import Parser
from ktx.engine.sampler import SamplingParams
from ktx.errors import UsageError
from tests.families.test_families import load
from tests.server.conftest import NAME, serving
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny

TARGETS = ["q_proj", "v_proj", "o_proj"]
ADAPTERS = ("one", "two")
PROMPT = "abcdefgh"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    base = tiny("llama", tie_word_embeddings=False)
    base.save_pretrained(folder)
    for rank, name in enumerate(ADAPTERS, 2):
        config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=TARGETS, init_lora_weights=False)
        get_peft_model(tiny("llama", tie_word_embeddings=False), config).save_pretrained(folder / name)
    model = load(folder, None, lora=[folder / name for name in ADAPTERS])
    model.ktx.use_lora()
    model.ktx.tokenizer = tokenizer()
    with model.ktx.engine(max_batch_size=4, kv_cache_tokens=4096) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    with (
        serving(engine, names=(NAME,), adapters=ADAPTERS) as (base, _),
        httpx.Client(base_url=base, timeout=60) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def expected(engine):
    """The completion of PROMPT by the model and by each adapter."""

    def answer(lora):
        events = [event for _, event in engine.generate([PROMPT], SamplingParams(max_new_tokens=12), lora)]
        return "".join(event.text for event in events)

    found = {NAME: answer(()), **{name: answer(name) for name in ADAPTERS}}
    assert len(set(found.values())) == 3
    return found


def completed(client, name):
    body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_name_chooses_the_adapter(client, expected):
    names = [NAME, *ADAPTERS, f"{ADAPTERS[0]}:latest"] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: completed(client, name), names))
    for name, answer in zip(names, answers, strict=True):
        assert answer["choices"][0]["text"] == expected[name.removesuffix(":latest")] and answer["model"] == name


ROUTES = {
    "/v1/chat/completions": lambda answer: answer["choices"][0]["message"]["content"],
    "/v1/messages": lambda answer: answer["content"][0]["text"],
    "/v1/responses": lambda answer: answer["output"][-1]["content"][0]["text"],
    "/api/chat": lambda answer: answer["message"]["content"],
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_protocol_has_them(client, route):
    def said(name):
        messages = [{"role": "user", "content": PROMPT}]
        body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 12, "stream": False}
        if route == "/v1/responses":
            body = {"model": name, "input": PROMPT, "temperature": 0, "max_output_tokens": 16}
        if route == "/api/chat":
            body = {
                "model": name,
                "messages": messages,
                "stream": False,
                "options": {"temperature": 0, "num_predict": 12},
            }
        answer = client.post(route, json=body)
        assert answer.status_code == 200, answer.text
        return ROUTES[route](answer.json())

    assert len({said(name) for name in (NAME, *ADAPTERS)}) == 3


def test_models_are_listed_with_their_parent(client):
    listed = {model["id"]: model["parent"] for model in client.get("/v1/models").json()["data"]}
    assert listed == {NAME: None, "one": NAME, "two": NAME}
    assert client.get("/v1/models/two").json()["parent"] == NAME
    assert [model["name"] for model in client.get("/api/tags").json()["models"]] == [
        f"{name}:latest" for name in (NAME, *ADAPTERS)
    ]
    missing = client.post("/v1/completions", json={"model": "three", "prompt": "x"})
    assert missing.status_code == 404 and "two" in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    "words, told",
    [
        (["--lora", "m=somewhere"], "'m' is the model's name"),
        (["--lora", "a=x", "--lora-modules", "a=y"], "two LoRA adapters are named 'a'"),
        (["--lora", "a=x=nan"], "scale"),
    ],
)
def test_options_that_contradict_each_other(words, told):
    parser = Parser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--model-name", "m", *words])
    with pytest.raises(UsageError, match=told):
        serve.adapter_names(args, ("m",))
