"""The interactive loop: reading turns, slash commands, Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktx.chat.conversation import SETTABLE, Conversation
from ktx.chat.reading import lines_of, read_text
from ktx.chat.render import Printer, note, stats_line
from ktx.errors import BadFile, KtxError, UsageError, did_you_mean

BLOCK = '"""'
HELP = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/retry": "answer the last question again",
    "/undo": "take the last question back",
    "/system": "TEXT  set the system message (none: show it)",
    "/set": "NAME VALUE  change temperature, top_p, seed, ... (none: show them)",
    "/read": "FILE  send a file as the message",
    "/save": "FILE  write the conversation",
    "/load": "FILE  read one back",
    "/fold": "hide or show thinking",
    "/stats": "numbers of the last answer",
    "/exit": "leave (also Ctrl-D)",
}


@dataclass
class Chat:
    """A conversation on a terminal, or on pipes."""

    conversation: Conversation
    printer: Printer
    engine: Any
    bandwidth: float | None = None
    prompt_file: str | None = None

    # ---- turns

    def say(self, text: str) -> None:
        """One turn: the answer, then its line of numbers. Ctrl-C stops the answer and keeps the chat."""
        with self.stoppable():
            done = self.printer.show(self.conversation.send(text))
        if done is not None:
            self.report(stats_line(done, self.engine, self.bandwidth))

    def report(self, line: str) -> None:
        """On a terminal below the answer; otherwise on standard error, so that a pipe holds answers only."""
        if self.printer.out.isatty():
            self.printer.dim(f"[{line}]")
        else:
            note(f"[{line}]")

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        def stop(signum: int, frame: Any) -> None:
            if self.conversation.session.cancelled:
                raise KeyboardInterrupt
            self.conversation.session.cancel()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def turn(self, text: str) -> bool:
        """A line or block from the user; False to leave. What is wrong is told and the chat goes on."""
        try:
            if text.startswith("/"):
                return self.command(text)
            if not text.strip():
                if self.conversation.turns or not self.prompt_file:
                    return True
                text = read_text(self.prompt_file)
            self.say(text)
        except KtxError as error:
            note(f"! {error}")
        return True

    # ---- commands

    def command(self, line: str) -> bool:
        word, _, rest = line.strip().partition(" ")
        if word not in HELP:
            raise UsageError(
                f"{word} is no command{did_you_mean(word, HELP)}; /help lists them; begin with a space to send such a text"
            )
        action: Callable[[str], bool | None] = getattr(self, f"do_{word[1:]}")
        return action(rest.strip()) is not False

    def do_help(self, rest: str) -> None:
        width = max(map(len, HELP))
        note("\n".join(f"{name.ljust(width)}  {text}" for name, text in HELP.items()))
        note(f"{BLOCK.ljust(width)}  begins and ends a message of several lines; a pasted text is one message")

    def do_exit(self, rest: str) -> bool:
        return False

    def do_clear(self, rest: str) -> None:
        self.conversation.clear()
        note("the conversation is empty")

    def do_undo(self, rest: str) -> None:
        question = self.conversation.undo()
        note("nothing to undo" if question is None else f"took back: {question[:60]}")

    def do_retry(self, rest: str) -> None:
        question = self.conversation.undo()
        if question is None:
            raise UsageError("there is no question to answer again")
        self.say(question)

    def do_system(self, rest: str) -> None:
        if rest:
            self.conversation.system = rest
        note(f"system: {self.conversation.system or '(none)'}")

    def do_set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").partition(" ")
        if value:
            note(self.conversation.set(name, value.strip()))
        else:
            settings = vars(self.conversation.sampling)
            note("\n".join(f"{name} = {settings[name]}" for name in SETTABLE))

    def do_read(self, rest: str) -> None:
        if not rest:
            raise UsageError("/read needs the name of a file")
        self.say(read_text(rest))

    def do_save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs the name of a file")
        try:
            self.conversation.save(Path(rest).expanduser())
        except OSError as error:
            raise BadFile(f"{rest}: cannot be written: {error.strerror}") from error
        note(f"saved {len(self.conversation.turns)} messages to {rest}")

    def do_load(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load needs the name of a file")
        note(f"loaded {self.conversation.load(Path(rest).expanduser())} messages")

    def do_fold(self, rest: str) -> None:
        self.printer.fold = not self.printer.fold
        note(f"thinking is {'folded' if self.printer.fold else 'shown'}")

    def do_stats(self, rest: str) -> None:
        last = self.conversation.last
        note(stats_line(last, self.engine, self.bandwidth) if last else "no answer yet")

    # ---- input

    def interactive(self) -> None:
        """Prompts until /exit or Ctrl-D; Ctrl-C at the prompt clears the line, and a second one leaves."""
        ask, interrupted = _prompter(), False
        while True:
            try:
                text = ask()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                note("(Ctrl-C again or /exit leaves)")
                continue
            interrupted = False
            if not self.turn(text):
                return

    def piped(self, stream: Any) -> None:
        """Each line is a turn; a block between two lines of three quotes is one."""
        for text in blocks(lines_of(stream, note)):
            if text.strip() and not self.turn(text):
                return


def blocks(lines: Any) -> Iterator[str]:
    """Turns of a text stream: lines, and what lies between lines that begin and end a block with three quotes."""
    held: list[str] | None = None
    for raw in lines:
        line = raw.rstrip("\n")
        if held is None:
            if not line.startswith(BLOCK):
                yield line
                continue
            line, held = line[len(BLOCK) :], []
        if line.rstrip().endswith(BLOCK):
            yield "\n".join([*held, line.rstrip()[: -len(BLOCK)]]).strip("\n")
            held = None
        else:
            held.append(line)
    if held is not None:
        yield "\n".join(held).strip("\n")


def _prompter() -> Callable[[], str]:
    """A function that reads one message: line editing, history, bracketed paste, blocks of three quotes."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ktx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        history: Any = FileHistory(str(folder / "chat_history"))
    except OSError:
        history = InMemoryHistory()  # a read-only home is no reason not to chat
    commands = WordCompleter(list(HELP), sentence=True)
    session: Any = PromptSession(
        history=history, completer=commands, complete_while_typing=False, enable_open_in_editor=False
    )

    def ask() -> str:
        text = session.prompt(">>> ")
        if text.startswith(BLOCK) and not (len(text) > len(BLOCK) and text.rstrip().endswith(BLOCK)):
            lines = [text]
            while not lines[-1].rstrip().endswith(BLOCK) or len(lines) == 1:
                lines.append(session.prompt("... "))
            text = "\n".join(lines)
        return next(iter(blocks(text.split("\n"))), "") if text.startswith(BLOCK) else text

    return ask


def has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()
