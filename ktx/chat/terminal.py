"""The interactive chat loop: reads turns, runs slash commands, handles Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktx.chat.conversation import CHAT_PARAMETERS, Conversation
from ktx.chat.reading import read_lines, read_text
from ktx.chat.render import Printer, format_stats, print_note
from ktx.errors import BadFile, KtxError, UsageError, did_you_mean

BLOCK_QUOTES = '"""'
COMMANDS = {
    "/help": "list the commands",
    "/clear": "clear the conversation",
    "/retry": "answer the last question again",
    "/undo": "remove the last question and its answer",
    "/system": "TEXT  set the system message (without TEXT: show it)",
    "/set": "NAME VALUE  set temperature, top_p, seed, ... (without NAME: show them)",
    "/read": "FILE  send a file as the message",
    "/save": "FILE  save the conversation",
    "/load": "FILE  load a saved conversation",
    "/fold": "hide or show reasoning",
    "/stats": "statistics of the last answer",
    "/exit": "leave (also Ctrl-D)",
}


@dataclass
class Chat:
    """A conversation on a terminal or on pipes."""

    conversation: Conversation
    printer: Printer
    engine: Any
    bandwidth: float | None = None
    prompt_file: str | None = None

    # ---- turns

    def send(self, text: str) -> None:
        """Runs one turn: prints the answer, then its statistics. Ctrl-C cancels the answer and the chat continues."""
        with self.cancel_on_interrupt():
            finished = self.printer.show(self.conversation.send(text))
        if finished is not None:
            self.report(format_stats(finished, self.engine, self.bandwidth))

    def report(self, line: str) -> None:
        """Prints a line below the answer on a terminal, otherwise on standard error, so that a pipe receives answers
        only.
        """
        if self.printer.out.isatty():
            self.printer.dim(f"[{line}]")
        else:
            print_note(f"[{line}]")

    @contextmanager
    def cancel_on_interrupt(self) -> Iterator[None]:
        """Within this context, Ctrl-C cancels the answer; a second Ctrl-C raises KeyboardInterrupt."""

        def stop(signum: int, frame: Any) -> None:
            if self.conversation.session.cancelled:
                raise KeyboardInterrupt
            self.conversation.session.cancel()

        previous_handler = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous_handler)

    def turn(self, text: str) -> bool:
        """Processes a line or block from the user; returns False to leave. Errors are printed and the chat continues.

        An empty first message stands for the text of `prompt_file`; later ones are ignored.
        """
        try:
            if text.startswith("/"):
                return self.command(text)
            if not text.strip():
                if self.conversation.turns or not self.prompt_file:
                    return True
                text = read_text(self.prompt_file)
            self.send(text)
        except KtxError as error:
            print_note(f"! {error}")
        return True

    # ---- commands

    def command(self, line: str) -> bool:
        """Runs a slash command by its `do_...` method; returns False to leave. UsageError for an unknown one."""
        word, _, rest = line.strip().partition(" ")
        if word not in COMMANDS:
            raise UsageError(
                f"unknown command {word}{did_you_mean(word, COMMANDS)}; /help lists the commands; "
                "begin a message with a space to send text that begins with /"
            )
        action: Callable[[str], bool | None] = getattr(self, f"do_{word[1:]}")
        return action(rest.strip()) is not False

    def do_help(self, rest: str) -> None:
        """Lists the commands."""
        width = max(map(len, COMMANDS))
        print_note("\n".join(f"{name.ljust(width)}  {text}" for name, text in COMMANDS.items()))
        print_note(
            f"{BLOCK_QUOTES.ljust(width)}  begins and ends a message of several lines; pasted text is one message"
        )

    def do_exit(self, rest: str) -> bool:
        """Ends the chat."""
        return False

    def do_clear(self, rest: str) -> None:
        """Empties the conversation."""
        self.conversation.clear()
        print_note("the conversation is empty")

    def do_undo(self, rest: str) -> None:
        """Removes the last question and its answer."""
        question = self.conversation.undo()
        print_note("nothing to undo" if question is None else f"removed: {question[:60]}")

    def do_retry(self, rest: str) -> None:
        """Answers the last question again."""
        question = self.conversation.undo()
        if question is None:
            raise UsageError("there is no question to answer again")
        self.send(question)

    def do_system(self, rest: str) -> None:
        """Sets the system message, or prints it."""
        if rest:
            self.conversation.system = rest
        print_note(f"system: {self.conversation.system or '(none)'}")

    def do_set(self, rest: str) -> None:
        """Sets a sampling parameter, or prints all."""
        name, _, value = rest.replace("=", " ").partition(" ")
        if value:
            print_note(self.conversation.set(name, value.strip()))
        else:
            settings = vars(self.conversation.sampling)
            print_note("\n".join(f"{name} = {settings[name]}" for name in CHAT_PARAMETERS))

    def do_read(self, rest: str) -> None:
        """Sends the text of a file."""
        if not rest:
            raise UsageError("/read needs a file name")
        self.send(read_text(rest))

    def do_save(self, rest: str) -> None:
        """Saves the conversation to a file."""
        if not rest:
            raise UsageError("/save needs a file name")
        try:
            self.conversation.save(Path(rest).expanduser())
        except OSError as error:
            raise BadFile(f"{rest}: cannot be written: {error.strerror}") from error
        print_note(f"saved {len(self.conversation.turns)} messages to {rest}")

    def do_load(self, rest: str) -> None:
        """Loads a conversation from a file."""
        if not rest:
            raise UsageError("/load needs a file name")
        print_note(f"loaded {self.conversation.load(Path(rest).expanduser())} messages")

    def do_fold(self, rest: str) -> None:
        """Folds reasoning, or shows it."""
        self.printer.fold = not self.printer.fold
        print_note(f"reasoning is {'folded' if self.printer.fold else 'visible'}")

    def do_stats(self, rest: str) -> None:
        """Prints the speed and tokens of the last answer."""
        last = self.conversation.last
        print_note(format_stats(last, self.engine, self.bandwidth) if last else "no answer yet")

    # ---- input

    def interactive(self) -> None:
        """Reads messages until /exit or Ctrl-D; Ctrl-C at the prompt clears the line, and a second one leaves."""
        read_message, interrupted = _make_message_reader(), False
        while True:
            try:
                text = read_message()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                print_note("(Ctrl-C again or /exit leaves)")
                continue
            interrupted = False
            if not self.turn(text):
                return

    def piped(self, stream: Any) -> None:
        """Processes each line of a stream as a turn; a block between two lines with three quotes is one turn."""
        for text in split_turns(read_lines(stream, print_note)):
            if text.strip() and not self.turn(text):
                return


def split_turns(lines: Any) -> Iterator[str]:
    """Yields the user's turns in a text stream, such as standard input: a line each, or a block of several lines.

    A block begins at a line that begins with three quotes and ends at one that ends with them.
    """
    block_lines: list[str] | None = None
    for raw_line in lines:
        line = raw_line.rstrip("\n")
        if block_lines is None:
            if not line.startswith(BLOCK_QUOTES):
                yield line
                continue
            line, block_lines = line[len(BLOCK_QUOTES) :], []
        if line.rstrip().endswith(BLOCK_QUOTES):
            yield "\n".join([*block_lines, line.rstrip()[: -len(BLOCK_QUOTES)]]).strip("\n")
            block_lines = None
        else:
            block_lines.append(line)
    if block_lines is not None:
        yield "\n".join(block_lines).strip("\n")


def _make_message_reader() -> Callable[[], str]:
    """Returns a function that reads one message, with line editing, history, bracketed paste, and blocks of three
    quotes.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ktx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        history: Any = FileHistory(str(folder / "chat_history"))
    except OSError:
        history = InMemoryHistory()  # a read-only home directory must not prevent a chat
    commands = WordCompleter(list(COMMANDS), sentence=True)
    session: Any = PromptSession(
        history=history, completer=commands, complete_while_typing=False, enable_open_in_editor=False
    )

    def read_message() -> str:
        """Reads one line, or lines up to the closing three quotes, and returns the message."""
        text = session.prompt(">>> ")
        if text.startswith(BLOCK_QUOTES) and not (
            len(text) > len(BLOCK_QUOTES) and text.rstrip().endswith(BLOCK_QUOTES)
        ):
            lines = [text]
            while not lines[-1].rstrip().endswith(BLOCK_QUOTES) or len(lines) == 1:
                lines.append(session.prompt("... "))
            text = "\n".join(lines)
        return next(iter(split_turns(text.split("\n"))), "") if text.startswith(BLOCK_QUOTES) else text

    return read_message


def has_terminal() -> bool:
    """Whether standard input and output are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()
