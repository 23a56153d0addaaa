"""The memory of /v1/responses."""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest

from ktx.server.auth import AccessPolicy
from ktx.server.responses.store import ResponseStore
from ktx.server.state import ServerSettings
from tests.server.conftest import NAME, scripted, sent, serving

TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def asked(http, text, **more):
    return sent(http, "/v1/responses", input=text, **more)


def texts(items):
    """Role or kind, and text, of each item."""
    return [
        (item.get("role", item["type"]), "".join(part["text"] for part in item.get("content") or ())) for item in items
    ]


def counted(http, items):
    """Tokens of a conversation that is sent whole."""
    return asked(http, items, store=False)["usage"]["input_tokens"]


# ---- going on


# The script answers by the first of its lines that the whole conversation holds: "greet" before "think" before "emoji".
def test_an_answer_goes_on_from_the_one_before_it(client):
    first = client.responses.create(model=NAME, input="emoji", instructions="Be brief.")
    assert first.store
    second = client.responses.create(model=NAME, input="think", previous_response_id=first.id)
    assert second.previous_response_id == first.id and second.output_text == "It is four."
    third = client.responses.create(model=NAME, input="greet", previous_response_id=second.id, instructions="Be long.")
    seen = client.responses.input_items.list(third.id, order="asc").data
    assert texts(item.to_dict() for item in seen) == [
        ("user", "emoji"),
        ("assistant", "a 🙂 b"),
        ("user", "think"),
        ("reasoning", "Let me see."),
        ("assistant", "It is four."),
        ("user", "greet"),
    ]


def test_what_the_model_reads_is_the_whole_conversation(http):
    first = asked(http, "greet", instructions="Be brief.")
    second = asked(http, "emoji", previous_response_id=first["id"])
    whole = [
        {"role": "user", "content": "greet"},
        {"role": "assistant", "content": "Good day, to you!"},
        {"role": "user", "content": "emoji"},
    ]
    assert second["usage"]["input_tokens"] == counted(http, whole)  # the instructions were the first request's alone
    by_id = [{"role": "user", "content": "greet"}, {"type": "item_reference", "id": first["output"][0]["id"]}, whole[2]]
    assert counted(http, by_id) == counted(http, whole)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_answered_by_its_id_alone(client, stream):
    def create(**fields):
        if not stream:
            return client.responses.create(model=NAME, tools=[TOOL], **fields)
        *_, last = client.responses.create(model=NAME, tools=[TOOL], stream=True, **fields)
        assert last.type == "response.completed"
        return last.response

    first = create(input="call the tool")
    calls = [item for item in first.output if item.type == "function_call"]
    assert len(calls) == 2
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun; greet"} for call in calls]
    second = create(input=outputs, previous_response_id=first.id)
    assert second.output_text == "Good day, to you!"
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc").data]
    assert kinds == ["message", "message", *["function_call"] * 2, *["function_call_output"] * 2]


def test_one_conversation_may_go_on_in_two_ways(http):
    first = asked(http, "greet")
    ways = [asked(http, text, previous_response_id=first["id"])["id"] for text in ("emoji", "think")]
    for way, text in zip(ways, ("emoji", "think"), strict=True):
        items = http.get(f"/v1/responses/{way}/input_items", params={"order": "asc"}).json()["data"]
        assert [said for _, said in texts(items)] == ["greet", "Good day, to you!", text]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_looked_up_is_what_was_answered(http, stream):
    body = {"model": NAME, "input": "think", "metadata": {"a": "b"}, "tools": [TOOL], "stream": stream}
    answer = http.post("/v1/responses", json=body)
    told = answer.json() if not stream else json.loads(answer.text.strip().rpartition("data: ")[2])["response"]
    assert http.get(f"/v1/responses/{told['id']}").json() == told and told["status"] == "completed"


def test_a_cut_answer_is_kept_too(http):
    told = asked(http, "long story", max_output_tokens=20)
    assert told["status"] == "incomplete"
    assert http.get(f"/v1/responses/{told['id']}").json() == told


# ---- what is not there


def test_what_is_not_kept_is_refused_with_the_reason(http):
    unkept = asked(http, "greet", store=False)
    assert unkept["store"] is False
    for name in (unkept["id"], "resp_unknown", "x" * 200):
        body = {"model": NAME, "input": "x", "previous_response_id": name}
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            told = http.post(path, json=body)
            error = told.json()["error"]
            assert told.status_code == 400 and error["code"] == "previous_response_not_found"
            assert error["param"] == "previous_response_id" and name in error["message"]
        for told in (
            http.get(f"/v1/responses/{name}"),
            http.delete(f"/v1/responses/{name}"),
            http.get(f"/v1/responses/{name}/input_items"),
            http.post(f"/v1/responses/{name}/cancel"),
        ):
            assert told.status_code == 404 and name in told.json()["error"]["message"]
    for item in ({"type": "item_reference", "id": "msg_1"}, {"type": "item_reference"}):
        told = http.post("/v1/responses", json={"model": NAME, "input": [item, {"role": "user", "content": "x"}]})
        assert told.status_code == 400 and "input[0]" in told.json()["error"]["message"]


def test_what_is_deleted_is_gone_but_not_for_those_that_went_on(client, http):
    first = client.responses.create(model=NAME, input="greet")
    second = client.responses.create(model=NAME, input="emoji", previous_response_id=first.id)
    client.responses.delete(first.id)
    assert http.delete(f"/v1/responses/{first.id}").status_code == 404
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.responses.create(model=NAME, input="x", previous_response_id=first.id)
    assert len(client.responses.input_items.list(second.id).data) == 3


def test_nothing_runs_in_the_background(http):
    name = asked(http, "greet")["id"]
    assert http.post(f"/v1/responses/{name}/cancel").status_code == 400
    assert http.get(f"/v1/responses/{name}", params={"stream": "true"}).status_code == 400
    assert http.get(f"/v1/responses/{name}", params={"stream": "false", "include": "x"}).status_code == 200


def test_an_answer_whose_client_left_is_not_kept(slow):
    base, served = slow
    before = len(served.response_store.responses)
    with httpx.Client(base_url=base, timeout=30) as http:
        with http.stream(
            "POST", "/v1/responses", json={"model": NAME, "input": "long story", "stream": True}
        ) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/responses", json={"model": NAME, "input": "long story"}, timeout=0.3)
    time.sleep(0.5)
    assert len(served.response_store.responses) == before


def test_a_server_that_keeps_nothing_says_so(tmp_path_factory):
    with (
        serving(scripted(tmp_path_factory), settings=ServerSettings(max_stored_responses=0)) as (base, _),
        httpx.Client(base_url=base, timeout=30) as http,
    ):
        told = asked(http, "greet", store=True)
        assert told["store"] is False and http.get(f"/v1/responses/{told['id']}").status_code == 404
        body = {"model": NAME, "input": "x", "previous_response_id": told["id"]}
        assert "--max_stored_responses 0" in http.post("/v1/responses", json=body).json()["error"]["message"]


def test_what_a_key_asked_no_other_finds(tmp_path_factory):
    with serving(scripted(tmp_path_factory), access=AccessPolicy(keys=("one", "two"))) as (base, _):
        mine, other = (openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) for key in ("one", "two"))
        first = mine.responses.create(model=NAME, input="greet")
        for look in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                look(first.id)
        referring = [{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "x"}]
        for more in ({"input": "x", "previous_response_id": first.id}, {"input": referring}):
            with pytest.raises(openai.BadRequestError):
                other.responses.create(model=NAME, **more)
            mine.responses.create(model=NAME, **more)
        with httpx.Client(base_url=base, headers={"x-api-key": "one"}) as http:  # the same key in another header
            assert http.get(f"/v1/responses/{first.id}").status_code == 200


# ---- lists and lengths


def test_items_come_in_pages(http):
    items = [{"role": "user", "content": f"number {i}"} for i in range(7)] + [{"role": "user", "content": "greet"}]
    name, seen, after = asked(http, items)["id"], [], {}
    for more in (True, True, False):
        page = http.get(f"/v1/responses/{name}/input_items", params={"limit": 3, "order": "asc", **after}).json()
        assert (page["object"], page["has_more"]) == ("list", more)
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        after = {"after": page["last_id"]}
        seen += page["data"]
    assert [said for _, said in texts(seen)] == [*(f"number {i}" for i in range(7)), "greet"]
    newest = http.get(f"/v1/responses/{name}/input_items").json()["data"]
    assert newest == seen[::-1] and len({item["id"] for item in seen}) == 8
    empty = http.get(f"/v1/responses/{name}/input_items", params={"order": "asc", **after}).json()
    assert empty["data"] == [] and not empty["has_more"] and empty["last_id"] is None
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_none"}, {"limit": "x"}):
        assert http.get(f"/v1/responses/{name}/input_items", params=wrong).status_code == 400


def test_tokens_are_counted_without_an_answer(client, http):
    first = client.responses.create(model=NAME, input="greet", instructions="Be brief.")
    for fields in (
        {"input": "greet", "instructions": "Be brief."},
        {"input": "emoji", "previous_response_id": first.id, "tools": [TOOL]},
        {"input": [{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "x"}]},
    ):
        told = client.responses.create(model=NAME, **fields)
        counted = client.responses.input_tokens.count(model=NAME, **fields)
        assert (counted.object, counted.input_tokens) == ("response.input_tokens", told.usage.input_tokens)
    assert http.post("/v1/responses/input_tokens", json={"input": "x", "model": "other"}).status_code == 404
    for wrong in ({}, {"input": "x", "stream": True}, {"input": []}):
        assert http.post("/v1/responses/input_tokens", json=wrong).status_code == 400


def test_ids_that_are_none_break_nothing(http):
    for name in (None, 5, [1], {"a": 1}, "", "x" * 1000):
        told = asked(http, [{"role": "user", "content": "greet", "id": name}])
        (item,) = http.get(f"/v1/responses/{told['id']}/input_items").json()["data"]
        assert item["id"].startswith("msg_") and item["id"] != name
    told = asked(http, [{"role": "user", "content": "greet", "id": "msg_mine"}])
    assert http.get(f"/v1/responses/{told['id']}/input_items").json()["data"][0]["id"] == "msg_mine"


def test_a_conversation_that_grows_by_its_own_items_is_bounded(http):
    """Each reference may stand for megabytes."""
    big = asked(http, [{"role": "user", "content": "greet", "id": "msg_big", "note": "x" * (3 << 20)}])
    assert big["status"] == "completed"
    many = [{"type": "item_reference", "id": "msg_big"}] * 9
    told = http.post("/v1/responses", json={"model": NAME, "input": many})
    assert told.status_code == 400 and "16 MB" in told.json()["error"]["message"]
    before = big["id"]
    for _ in range(8):
        item = {"role": "user", "content": "greet", "note": "x" * (3 << 20)}
        told = http.post("/v1/responses", json={"model": NAME, "input": [item], "previous_response_id": before})
        if told.status_code == 400:
            break
        before = told.json()["id"]
    assert told.status_code == 400 and "16 MB" in told.json()["error"]["message"]


# ---- the store itself


def answer(name, text="x", **more):
    return {"id": name, "output": [{"id": f"msg_{name}", "content": text}], **more}


def item(name, text="x"):
    return {"id": f"in_{name}", "content": text}


def test_the_oldest_go_first():
    kept = ResponseStore(3)
    for name in "abcde":
        kept.put(b"", answer(name), [item(name)], None)
    assert [name for name in "abcde" if kept.find(b"", name)] == ["c", "d", "e"]
    assert set(kept.items(b"", ["in_a", "in_d", "msg_e", "none"])) == {"in_d", "msg_e"}
    for name in "cde":
        assert kept.delete(b"", name)
    assert not kept.nbytes and not kept.by_item


def test_a_conversation_costs_each_turn_once():
    """A thousand turns of 1 KB, each of which goes on from the one before."""
    kept, last = ResponseStore(2000), None
    for i in range(1000):
        kept.put(b"", answer(str(i), "y" * 1000), [item(str(i), "x" * 1000)], last)
        last = kept.find(b"", str(i)).turn
    assert len(last.items()) == 2000 and 2_000_000 < kept.nbytes < 3_000_000


def test_bytes_are_bounded_whoever_holds_them():
    """One conversation, of which the newest answer holds all turns; then many that hold nothing of each other."""
    kept, last = ResponseStore(10_000, max_bytes=1 << 20), None
    for i in range(300):
        kept.put(b"", answer(str(i), "y" * 10_000), [item(str(i))], last)
        assert kept.nbytes <= 1 << 20
        found = kept.find(b"", str(i))
        last = found.turn if found else None
    for i in range(1000, 1300):
        kept.put(b"", answer(str(i), "y" * 10_000), [item(str(i))], None)
        assert kept.nbytes <= 1 << 20
    assert len(kept.responses) > 50
    for name in list(kept.responses):
        kept.delete(b"", name)
    assert not kept.nbytes and not kept.by_item


def test_who_goes_on_from_what_is_dropped_meanwhile_keeps_it():
    kept = ResponseStore(1)
    kept.put(b"", answer("a"), [item("a")], None)
    link = kept.find(b"", "a").turn
    kept.put(b"", answer("b"), [item("b")], None)
    assert kept.find(b"", "a") is None
    kept.put(b"", answer("c"), [item("c")], link)
    assert [one["id"] for one in kept.find(b"", "c").input_history()] == ["in_a", "msg_a", "in_c"]
    kept.delete(b"", "c")
    assert not kept.nbytes


def test_an_item_sent_twice_is_the_newest():
    kept = ResponseStore(10)
    kept.put(b"", answer("a"), [item("same", "old")], None)
    kept.put(b"", answer("b"), [item("same", "new")], None)
    assert kept.items(b"", ["in_same"])["in_same"]["content"] == "new"
    kept.delete(b"", "a")
    assert kept.items(b"", ["in_same"])["in_same"]["content"] == "new"
    kept.delete(b"", "b")
    assert not kept.items(b"", ["in_same"])
