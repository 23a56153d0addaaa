"""Bytes that are no text, on every way into the chat and out of it: no turn behind them is lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from ktx.__main__ import main
from ktx.chat.conversation import Conversation
from ktx.chat.reading import read_lines, read_text, replace_surrogates
from ktx.chat.render import Printer
from ktx.chat_formats import Text
from ktx.errors import BadFile
from tests.chat.test_chat import ENV, chat
from tests.support.tiny_chat_model import write_model

LATIN = "Größe\n".encode("latin-1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat") / "m")


def lines(data, encoding="utf-8"):
    told = []
    stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), encoding)
    return list(read_lines(stream, told.append)), told


@pytest.mark.parametrize(
    "data,read,told",
    [
        ("Größe\nb\n".encode(), ["Größe\n", "b\n"], []),
        (LATIN + b"b\n", ["Gr��e\n", "b\n"], ["! line 1: bytes that are not UTF-8 were replaced by �"]),
        (b"a\n\xff\xfe\n\xed\xa0\x80\nb", ["a\n", "��\n", "���\n", "b"], ["line 2", "line 3"]),
        ("a�\n".encode(), ["a�\n"], []),  # a replacement character of the sender's own
        ("Größe\r\nb\r\n".encode("utf-16"), ["Größe\n", "b\n"], []),
        (b"\xfe\xff" + "Größe\nb".encode("utf-16-be"), ["Größe\n", "b"], []),
        ("Größe\nb".encode("utf-32"), ["Größe\n", "b"], []),
        (b"\xef\xbb\xbfa\nb\n", ["a\n", "b\n"], []),
        ("a\nb\n".encode("utf-16-le") + b"\n", [], ["line 1 is skipped", "line 2 is skipped", "line 3 is skipped"]),
        (b"a\0b\nc\n", ["c\n"], ["! line 1 is skipped: it contains NUL"]),
        (b"\xef\xbb", ["��"], ["line 1"]),
        (b"", [], []),
    ],
)
def test_lines_of_a_stream(data, read, told):
    found, warned = lines(data)
    assert found == read and len(warned) == len(told)
    assert all(words in line for words, line in zip(told, warned, strict=True))


def test_a_stream_in_the_locales_encoding():
    assert lines(LATIN, "latin-1") == (["Größe\n"], [])
    assert lines("Größe\n".encode(), "ascii") == (["Größe\n"], [])  # LC_ALL=C says nothing about a file
    assert list(read_lines(io.StringIO("a\nb"), print)) == ["a\n", "b"]


def test_lines_come_before_the_stream_ends():
    read, write = os.pipe()
    with os.fdopen(read, encoding="utf-8") as stream:
        os.write(write, b"one\n")
        found = read_lines(stream, print)
        assert next(found) == "one\n"  # else a program that waits for the answer would wait for ever
        os.write(write, b"two\n")
        assert next(found) == "two\n"
        found.close()
        os.close(write)


def test_files(tmp_path):
    file = tmp_path / "q.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        file.write_bytes("Größe\r\nb".encode(encoding))
        assert read_text(str(file)) == "Größe\nb"
    for data, told in ((LATIN, "not UTF-8 text"), (b"\xff\xfea", "not UTF-16 text"), (b"a\0b", "NUL")):
        file.write_bytes(data)
        with pytest.raises(BadFile, match=told):
            read_text(str(file))


def test_clean():
    assert (
        replace_surrogates("a\udcfcb") == "a�b"
        and replace_surrogates("\ud83d\ude42 \udc00") == "🙂 �"
        and replace_surrogates("é🙂") == "é🙂"
    )


class Said:
    """A session that says one thing."""

    def __init__(self, text):
        self.text, self.asked = text, []

    def render(self, messages, force_think):
        self.asked = messages
        return None

    def stream(self, prompt, sampling):
        yield Text(self.text)

    def reset(self):
        pass


def test_a_conversation_holds_no_half_characters(tmp_path):
    talk = Conversation(Said("x"), None, system="s\udcff")
    list(talk.send("a\udcfc"))
    assert [m["content"] for m in talk.session.asked] == ["s�", "a�"]
    talk.save(tmp_path / "c.json")
    (tmp_path / "d.json").write_text('{"system": "\\ud800", "turns": [{"role": "user", "content": "\\udc00x"}]}')
    assert talk.load(tmp_path / "d.json") == 1 and (talk.system, talk.turns[0]["content"]) == ("�", "�x")
    talk.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["turns"][0]["content"] == "�x"


def test_the_turn_behind_a_wrong_byte_is_answered(folder):
    done = chat(folder, text=LATIN + b"a\0b\nthree\n")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.count("first token") == 2
    assert "line 1: bytes that are not UTF-8" in done.stderr and "line 2 is skipped" in done.stderr


def test_a_file_by_flag_that_is_no_text_is_one_line(folder, tmp_path):
    (tmp_path / "q.txt").write_bytes(LATIN)
    done = chat(folder, text=b"/read " + os.fsencode(tmp_path / "q.txt") + b"\nx\n")
    assert done.returncode == 0 and done.stderr.count("is not UTF-8 text (byte 2)") == 1
    assert done.stderr.count("first token") == 1 and "Traceback" not in done.stderr


def test_a_message_and_a_system_message_with_wrong_bytes(folder):
    done = chat(folder, "--system", "\udcfc", "-p", "Gr\udcfc\udcdfe")  # as Python reads such an argument
    assert done.returncode == 0 and "first token" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_an_answer_that_the_terminal_cannot_show(folder, encoding):
    done = chat(folder, text="x\n/system \N{EM DASH}\n", PYTHONIOENCODING=encoding)
    assert (
        done.returncode == 0 and "Traceback" not in done.stderr
    )  # random letters of all kinds, and what it says itself
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")
    Printer(out).show([Text("a\ud800\N{EM DASH}b")])
    out.flush()
    assert out.buffer.getvalue().startswith(b"a?") and out.buffer.getvalue().endswith(b"b\n")


def test_output_that_nobody_reads(folder):
    command = f"'{sys.executable}' -m ktx chat --model '{folder}' --weights '{folder}/model.gguf' --max-new-tokens 4"
    text = f"set -o pipefail; yes hello | head -n 2000 | {command} 2>&1 | true; echo ${{PIPESTATUS[2]}}"
    done = subprocess.run(["bash", "-c", text], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n" and done.stderr == ""


@pytest.mark.parametrize("closed", [("stdin",), ("stdout",), ("stdout", "stderr"), ("stdin", "stdout", "stderr")])
def test_streams_that_the_shell_has_closed(closed, monkeypatch):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert main(["chat", "--model", "/nothing/here", "-p", "x"]) == 4
    for name in closed:
        getattr(sys, name).close()


def test_standard_output_never_fails_for_a_letter(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="latin-1") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["chat", "--model", "/nothing/here", "-p", "x"]) == 4
        assert out.errors == "replace" and out.write("\N{EM DASH}") == 1
