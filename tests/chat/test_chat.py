"""The chat as a person meets it: pipes, a terminal, commands, Ctrl-C, errors."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.support import preloaded_process
from tests.support.tiny_chat_model import write_model

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    "TERM": "xterm",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat") / "m")


def chat(folder, *words, text="", module="ktx.local_chat", **more):
    command = [module, *(["chat"] if module == "ktx" else []), "--model_path", folder]
    command += ["--gguf_path", folder / "model.gguf", "--max_new_tokens", "6", *words]
    return preloaded_process.run(*command, text=text, timeout=120, env=ENV | more)


def test_one_shot_prints_the_answer_alone(folder):
    done = chat(folder, "-p", "hello")
    assert done.returncode == 0 and done.stdout.strip() and "\x1b" not in done.stdout
    assert (
        re.search(r"prompt \d+ tok .*first token .*cached 0.*context left \d+", done.stderr)
        and "kernels" in done.stderr
    )


def test_piped_lines_are_turns_and_quotes_make_blocks(folder):
    done = chat(folder, text='one\n"""\ntwo\nlines\n"""\n\nthree\n')
    assert done.returncode == 0 and done.stderr.count("first token") == 3
    cached = [int(n) for n in re.findall(r"cached (\d+)", done.stderr)]
    assert cached[0] == 0 and cached[1] > 0 and cached[2] > cached[1]


def test_commands_on_a_pipe(folder, tmp_path):
    (tmp_path / "q.txt").write_text("a question from a file")
    save = tmp_path / "chat.json"
    lines = [
        "/help",
        "/system be brief",
        "hello",
        "/stats",
        "/set temperature 0.5",
        "/set",
        "/sett x",
        "/set temperatur 1",
        "/set top_p 7",
        "/retry",
        "/undo",
        f"/read {tmp_path / 'q.txt'}",
        f"/save {save}",
        "/clear",
        "/undo",
        f"/load {save}",
        "/load /no/such",
        "/fold",
        "/nonsense",
        "/exit",
        "never sent",
    ]
    done = chat(folder, text="\n".join(lines) + "\n")
    told = done.stderr
    assert done.returncode == 0
    for words in (
        "/retry",
        "system: be brief",
        "temperature = 0.5",
        "unknown command /sett (did you mean '/set'?)",
        "did you mean 'temperature'?",
        "top_p is 7",
        "removed: hello",
        "saved 2 messages",
        "nothing to undo",
        "loaded 2 messages",
        "! /no/such: cannot be read",
        "reasoning is folded",
        "unknown command /nonsense",
    ):
        assert words in told, words
    turns = json.loads(save.read_text())
    assert turns["system"] == "be brief" and [t["role"] for t in turns["turns"]] == ["user", "assistant"]
    assert "never sent" not in told


def test_prompt_file_on_an_empty_line(folder, tmp_path):
    (tmp_path / "p.txt").write_text("from the file")
    done = chat(folder, "--prompt_file", str(tmp_path / "p.txt"), text="/undo\n")
    assert done.returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--force_think"],
        ["--force_think", "true"],
        ["--force-think", "false"],
        ["--force-think=true"],
        ["--cpu-infer", "1", "--chunk_size", "4", "--seed", "3", "--temperature", "1"],
    ],
)
def test_flags(folder, words):
    assert chat(folder, *words, "-p", "x").returncode == 0


@pytest.mark.parametrize(
    "words,code,message",
    [
        (["--temprature", "1"], 2, "did you mean --temperature"),
        (["--top_p", "7"], 2, "top_p is 7"),
        (["--cpu_infer", "0"], 2, "at least 1"),
        (["--force_think", "maybe"], 2, "true or false"),
        (["--optimize_config_path", "nope"], 4, "no such rule file"),
        (["--num_experts_per_tok", "2"], 2, "has no experts"),
    ],
)
def test_usage_errors_are_one_line(folder, words, code, message):
    done = chat(folder, *words, "-p", "x")
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_a_truncated_file_is_told_in_one_line(folder, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes((folder / "model.gguf").read_bytes()[:-5000])
    command = ["ktx", "chat", "--model", folder, "--weights", bad, "-p", "x"]
    done = preloaded_process.run(*command, env=ENV)
    assert (
        done.returncode == 4
        and done.stderr.count("\n") == 1
        and "truncated" in done.stderr
        and "tensor" in done.stderr
        and "bad.gguf" in done.stderr
    )
    debug = preloaded_process.run(*command, "--debug", env=ENV)
    assert "Traceback" in debug.stderr


PROMPT, MORE = (rf"{mark}[^\n]*\x1b\[\?25h" for mark in (">>>", r"\.\.\."))  # written, and the cursor shown again


class Terminal:
    """A chat on a pseudo terminal."""

    def __init__(self, *command, home):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            termios.tcsetwinsize(0, (40, 100))
            own = {"HOME": str(home), "XDG_STATE_HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execvpe(command[0], list(command), ENV | own)
        self.text = ""

    def expect(self, pattern, seconds=60):
        end = time.time() + seconds
        while not re.search(pattern, self.text, re.S):
            ready, _, _ = select.select([self.fd], [], [], 0.2)
            if ready:
                try:
                    self.text += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    break
            assert time.time() < end, f"{pattern!r} did not come; the terminal says: {self.text[-1500:]}"
        found = re.search(pattern, self.text, re.S)
        assert found, self.text[-1500:]
        self.text = self.text[found.end() :]

    def send(self, text):
        os.write(self.fd, text.encode())

    def end(self):
        deadline = time.time() + 20
        while time.time() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            ready, _, _ = select.select([self.fd], [], [], 0.1)
            if ready:
                with contextlib.suppress(OSError):
                    self.text += os.read(self.fd, 65536).decode(errors="replace")
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"the chat did not end: {self.text[-1000:]}")


@pytest.mark.wall_clock
def test_a_terminal_session(folder, tmp_path):
    t = Terminal(
        sys.executable,
        "-m",
        "ktx.local_chat",
        "--model",
        str(folder),
        "--weights",
        str(folder / "model.gguf"),
        "--max-new-tokens",
        "2000",
        "--max-context",
        "500",
        home=tmp_path,
    )
    t.expect(PROMPT)
    t.send("hello\r")
    t.expect("hello")
    time.sleep(1.0)
    t.send("\x03")  # stops the answer, keeps the chat
    t.expect("first token")
    t.expect(PROMPT)
    t.send('"""\r')
    t.expect(MORE)
    t.send('two\rlines"""\r')
    time.sleep(0.5)
    t.send("\x03")
    t.expect("context left")
    t.expect(PROMPT)
    t.send("/nonsense\r")
    t.expect("unknown command")
    t.expect(PROMPT)
    t.send("\x1b[200~pasted\nlines\x1b[201~")  # bracketed paste: one message, not two
    t.send("\r")
    t.expect("context left")
    t.expect(PROMPT)
    t.send("/exit\r")
    assert t.end() == 0


def test_ctrl_d_leaves(folder, tmp_path):
    t = Terminal(
        sys.executable,
        "-m",
        "ktx",
        "chat",
        "--model",
        str(folder),
        "--weights",
        str(folder / "model.gguf"),
        home=tmp_path,
    )
    t.expect(PROMPT)
    t.send("\x04")
    assert t.end() == 0
