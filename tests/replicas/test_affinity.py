"""Which replica a prompt goes to, which machine a replica, and what is refused before Ray is asked."""

from __future__ import annotations

import json
import os
import time

import pytest

from ktx.__main__ import main
from ktx.cli import serve_ray
from ktx.errors import DoesNotFit
from ktx.hardware import cpu_share
from ktx.replicas.affinity import KEY_CHARS, MAX_KEYS, UNSENT_TIMEOUT_S, Affinity, prefix_keys
from ktx.replicas.spread import Node, place_replicas


def body(*texts, **more):
    return json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": text} for text in texts], **more}
    ).encode()


def test_a_conversation_begins_as_its_earlier_turns_did():
    first, second = prefix_keys(body("a" * 1000)), prefix_keys(body("a" * 1000, "b" * 1000))
    assert len(first) == 4 and second[:4] != prefix_keys(body("b" * 1000))[:4]
    assert second[:3] == first[:3] and len(second) > 7  # the fourth piece holds the first message's end
    assert prefix_keys(body("a" * 1000, stream=True, temperature=0.3, seed=1)) == first
    assert prefix_keys(body("a" * 1000, cache_salt="x"))[0] != first[0]


def test_an_adapter_has_pages_of_its_own():
    """The model's names, and an adapter's, mean one each."""

    def keys(name):
        return prefix_keys(body("a" * 1000) if name is None else body("a" * 1000, model=name), ("style", "other"))

    plain, style, other = keys("m"), keys("style"), keys("other")
    assert len(plain) == 4 == len({plain[0], style[0], other[0], prefix_keys(body("b" * 1000))[0]})
    assert (
        keys("alias")
        == keys(None)
        == keys("style-2")
        == keys(3)
        == plain
        == prefix_keys(body("a" * 1000, model="style"))
    )
    assert keys("style:latest") == style
    affinity = Affinity(pages=100, max_imbalance=3)
    affinity.on_routed("1", "x", plain)
    affinity.on_finish("1")
    assert affinity.num_cached(style, "x") == 0
    affinity.on_routed("2", "y", style)
    affinity.on_finish("2")
    assert affinity.rank(style, ["x", "y"])[0] == "y" and affinity.rank(plain, ["x", "y"])[0] == "x"


@pytest.mark.parametrize(
    "path_body", [b"", b"no json", b"[1]", b'"x"', b"[" * 100_000, b'{"prompt": null}', body("short")]
)
def test_what_has_no_beginning_worth_a_key(path_body):
    assert prefix_keys(path_body) == []


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "x" * 600},
        {"prompt": [1] * 300},
        {"input": "x" * 600},
        {"input": [{"role": "user", "content": "x" * 600}]},
        {"system": [{"type": "text", "text": "x" * 600}], "messages": []},
        {"instructions": "x" * 600, "input": "y"},
        {"messages": [{"role": "user", "content": "\ud800" * 600}]},
    ],
)
def test_every_protocols_prompt_has_keys(asked):
    assert len(prefix_keys(json.dumps(asked).encode())) >= 2


def test_a_prompt_of_megabytes_has_few_keys():
    assert (
        len(prefix_keys(body("x" * 5_000_000))) == MAX_KEYS == len(set(prefix_keys(body("x" * KEY_CHARS * MAX_KEYS))))
    )


def test_the_replica_that_knows_the_beginning_is_first_unless_it_is_crowded():
    affinity, keys = Affinity(pages=100, max_imbalance=3), prefix_keys(body("a" * 2000))
    affinity.on_routed("1", "y", keys[:3])
    affinity.on_finish("1")
    affinity.on_routed("2", "z", keys)
    assert affinity.rank(keys, ["x", "y", "z"]) == ["z", "y", "x"]
    affinity.on_routed("3", "z", [])
    affinity.on_routed("4", "z", [])
    assert affinity.rank(keys, ["x", "y", "z"]) == ["y", "x", "z"]
    affinity.on_finish("4")
    assert affinity.rank(keys, ["x", "y", "z"])[0] == "z"


def test_what_nobody_knows_goes_where_least_is():
    affinity = Affinity(pages=100, max_imbalance=4)
    affinity.on_routed("1", "x", prefix_keys(body("a" * 2000)))
    assert affinity.rank(prefix_keys(body("b" * 2000)), ["x", "y"])[0] == "y"
    affinity.on_finish("1")
    assert affinity.rank(prefix_keys(body("b" * 2000)), ["x", "y"])[0] == "y"  # as idle, but with less in its cache


def test_a_crowd_that_comes_at_once_is_spread():
    affinity = Affinity(pages=100, max_imbalance=4)
    for number in range(12):
        keys = prefix_keys(body(f"{number}" * 2000))
        affinity.on_routed(str(number), affinity.rank(keys, ["x", "y"])[0], keys, sent=False)
    assert [request.replica for request in affinity.requests.values()].count("x") == 6
    affinity.on_routed("0", "y", [])  # it went elsewhere after all
    assert [request.replica for request in affinity.requests.values()].count("y") == 7


def test_a_request_that_reached_no_replica_is_not_counted_for_ever(monkeypatch):
    affinity = Affinity(pages=100, max_imbalance=4)
    affinity.on_routed("1", "x", [], sent=False)
    affinity.on_routed("2", "y", [])
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + UNSENT_TIMEOUT_S + 1)
    assert affinity.rank([], ["x", "y"])[0] == "x" and list(affinity.requests) == ["2"]


def test_a_replica_forgets_as_its_cache_does():
    affinity = Affinity(pages=10, max_imbalance=4)
    old, new = prefix_keys(body("a" * 2000)), prefix_keys(body("b" * 2000))
    affinity.on_routed("1", "x", old)
    affinity.on_routed("2", "x", new)
    assert affinity.num_cached(new, "x") == len(new) == 7 and affinity.num_cached(old, "x") == 3
    affinity.rank(old, ["y"])  # x has gone
    affinity.on_routed("3", "y", old)
    assert (
        affinity.rank(new, ["x", "y"])[0] == "x"
        and affinity.num_cached(new, "x") == 0
        and list(affinity.requests) == ["3"]
    )


def test_processes_share_a_machines_cores():
    usable = os.sched_getaffinity(0)
    shares = [cpu_share(number, 2) for number in range(2)]
    if len(usable) > 1:
        assert not shares[0] & shares[1] and shares[0] | shares[1] <= usable
    assert cpu_share(0, 1) == usable and cpu_share(3, 10_000) == usable == cpu_share(7, 2)


def test_copies_that_do_not_fit_are_refused_with_the_numbers():
    nodes = [Node("a", "10.0.0.1", 32.0, 16, 100 << 30), Node("b", "10.0.0.2", 24.0, 12, 60 << 30)]
    placement = place_replicas(nodes, 4, None, 20 << 30)
    assert (placement.replicas, placement.per_node, placement.threads, placement.cpus) == (4, 2, 6, 12)
    assert place_replicas(nodes, None, None, 20 << 30).replicas == 2 and place_replicas(nodes, 3, 5, 0).threads == 5
    with pytest.raises(
        DoesNotFit,
        match=r"4 replicas on 2 machines: 2 copies of the weights need 85.9 GB on 10.0.0.2, 64.4 GB are free",
    ):
        place_replicas(nodes, 4, None, 40 << 30)
    assert place_replicas([Node("a", "x", 2.0, 2, 1 << 30)], 4, None, 0).cpus == 0.5


@pytest.mark.parametrize(
    "words,told",
    [(["--replicas", "2"], "--replicas needs --ray"), (["--ray-address", "auto"], "--ray-address needs --ray")],
)
def test_options_that_need_others(words, told, capsys):
    assert main(["serve", "--port", "0", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "address,told",
    [
        ("127.0.0.1:9", "no cluster is reachable there"),
        ("ray://x:10001", "must be HOST:PORT"),
        ("somewhere", "must be HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_there(address, told, capsys, monkeypatch):
    monkeypatch.setattr(serve_ray.importlib.util, "find_spec", lambda name: object())
    assert main(["serve", "--port", "0", "--ray", "--ray-address", address]) == 2
    assert told in capsys.readouterr().err


def test_without_ray_the_command_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(serve_ray.importlib.util, "find_spec", lambda name: None if name == "ray" else object())
    assert main(["serve", "--port", "0", "--ray"]) == 2
    assert "pip install -e '.[ray]'" in capsys.readouterr().err
