"""What ktx serve refuses before it loads anything, and how files and flags make one set of options."""

from __future__ import annotations

import socket
import time

import pytest

import ktx.demo
from ktx.__main__ import build_parser, main
from ktx.cli import serve
from ktx.server import main as old_name
from ktx.server.state import ServerState


def parsed(*words):
    return build_parser().parse_args(["serve", *words])


@pytest.mark.wall_clock
@pytest.mark.parametrize(
    "words,told",
    [
        (["--host", "0.0.0.0"], "would let anyone who reaches this machine use the server"),
        (["--host", "::"], "--allow_unauthenticated"),
        (["--port", "70000"], "from 0 to 65535"),
        (["--api-key", "two words"], "printable ASCII"),
        (["--api-key-file", "/nothing/here"], "cannot be read"),
        (["--kv-cache-tokens", "8"], "at least 64"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--lora-dir", "/nothing/here"], "no such folder"),
        (["--lora-dir", "/tmp", "--ray"], "replicas (--ray) share no adapters that clients load"),
        (["--chat-template", "/nothing/here"], "cannot be read"),
        (["--host", "203.0.113.1", "--api-key", "k", "--port", "0"], "another server uses the port"),
    ],
)
def test_refused_before_loading(words, told, capsys):
    start = time.monotonic()
    assert main(["serve", *words]) in (2, 4)
    assert told in capsys.readouterr().err and time.monotonic() - start < 10


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "--port" in capsys.readouterr().err


def test_a_model_that_is_not_there_ends_the_server(capsys, monkeypatch):
    assert main(["serve", "--port", "0", "--model", "/nothing/here"]) == 4
    assert "no such folder" in capsys.readouterr().err


def test_bandwidth_is_measured_before_a_model_is_loaded(monkeypatch):
    served = ServerState(("demo",))
    args = parsed("--model", str(ktx.demo.path()), "--weights", str(ktx.demo.gguf()), "--kv-cache-tokens", "256")
    with serve.make_engine(args, served) as engine:
        assert 0.1 < served.bandwidth < 10000 and engine.stats.snapshot().nbytes == 0
    monkeypatch.setattr("ktx.kernels.microbench.memory", lambda: (1 << 34, 1 << 29))
    with serve.make_engine(args, served):
        assert served.bandwidth is None  # there was no room for it


def test_a_file_of_options(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "port: 1234\nmax-batch-size: 2\nforce_think: true\nmodel_name: [a, b]\napi_key: k\nhost: 127.0.0.2\n"
    )
    args = parsed("--port", "99", "--config", str(path), "--host", "127.0.0.3")
    assert (args.port, args.max_batch_size, args.force_think, args.model_name, args.host) == (
        99,
        2,
        True,
        ["a", "b"],
        "127.0.0.3",
    )
    assert serve.keys_of(args) == ("k",)


@pytest.mark.parametrize(
    "text,told",
    [
        ("a: 1\nprot: 3\n", "line 1: unknown option"),
        ("port: 3\nprot: 3\n", "line 2: unknown option 'prot' (did you mean 'port'?)"),
        ("port: x\n", "line 1: port"),
        ("max_batch_size: 0\n", "at least 1"),
        ("[1]", "mapping"),
        ("a: [", "is not valid YAML"),
        ("backend_type: fast\n", "must be one of"),
    ],
)
def test_a_file_of_options_with_a_fault(tmp_path, text, told, capsys):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parsed("--config", str(path))
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_the_name_that_users_of_ktransformers_know(capsys):
    with pytest.raises(SystemExit) as ended:
        old_name.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for flag in (
        "model-path",
        "gguf-path",
        "optimize-config-path",
        "cpu-infer",
        "max-new-tokens",
        "cache-lens",
        "chunk-size",
        "max-batch-size",
        "force-think",
        "chat-template",
        "api-key",
        "model-name",
        "log-prompts",
        "num-experts-per-tok",
        "packed-cache-dir",
    ):
        assert f"--{flag}" in said
    assert "backend" not in said  # it has no effect, so the help leaves it out
    assert (
        old_name.main(
            [
                "--gguf_path",
                "/nothing",
                "--kv_cache_tokens",
                "100",
                "--force_think",
                "true",
                "--backend_type",
                "ktransformers",
            ]
        )
        == 4
    )


@pytest.mark.parametrize("command", [("serve",), ("bench", "serve")])
def test_the_engine_that_ktransformers_users_choose_has_no_effect(command, capsys):
    for name in ("balance_serve", "ktransformers"):
        args, plain = (build_parser().parse_args([*command, *more]) for more in (["--backend_type", name], []))
        assert vars(args) | {"backend_type": ""} == vars(plain) | {"backend_type": ""}
    for words, told in (
        (["--backend-type", "scripted"], "invalid choice: 'scripted'"),
        (["--script", "x.json"], "unrecognized arguments: --script"),
        (["--pace", "0.1"], "unrecognized arguments: --pace"),
    ):
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args([*command, *words])
        assert ended.value.code == 2 and told in capsys.readouterr().err


def test_keys_come_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("three\n\nfour\n")
    monkeypatch.setenv("KTX_API_KEY", "five one")
    args = parsed("--api-key", "one", "--api-key", "two", "--api_key_file", str(tmp_path / "keys"))
    assert serve.keys_of(args) == ("one", "two", "three", "four", "five")
