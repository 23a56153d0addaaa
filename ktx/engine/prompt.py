"""Messages -> the ids that a model reads, through its own chat template.

Words of the messages that look like control tokens stay words: only the template writes control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktx.chat_formats import ChatFormat, dialect_for, for_template, opened
from ktx.engine.continue_message import render_continuation
from ktx.engine.template import DEFAULT, check_templates, chosen, named_templates
from ktx.errors import UsageError

MAX_TEXT_CHARS = 64 << 20  # characters of a rendered prompt
_MARK = re.compile(r"[<\[].+[>\]]")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode will never give them a meaning


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text and as ids; `thinking`: it ends inside the reasoning block; `said`: text at its end that the answer goes on with.

    `untold`: tools were given, and the template wrote nothing of them.
    """

    text: str
    ids: list[int]
    thinking: bool
    prefill_text: str = ""
    tools_not_rendered: bool = False


class PromptRenderer:
    """Makes prompts for one tokenizer. `template` takes the place of the tokenizer's own. BadFile where no prompt could be made."""

    def __init__(self, tokenizer: Any, model_type: str | None = None, template: str | None = None):
        self.tokenizer = tokenizer
        self.templates = named_templates(template or getattr(tokenizer, "chat_template", None))
        folder = getattr(tokenizer, "name_or_path", "")
        own = f"{folder}: the tokenizer's chat template" if folder else "the tokenizer's chat template"
        where = "--chat-template" if template else own
        check_templates(self.templates, where, getattr(tokenizer, "special_tokens_map", {}))
        self.dialect: ChatFormat = dialect_for("\n".join(self.templates.values()), model_type)
        self.writes_tools: set[str | None] = set()  # templates that have written tools
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        names = [
            str(token)
            for token in added.values()
            if len(str(token)) > 1 and (token.special or _MARK.fullmatch(str(token)))
        ]
        self.special = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        self.silent = frozenset(self._silent(added))
        self.controls = re.compile(
            "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)"
        )

    def _silent(self, added: Mapping[int, Any]) -> set[int]:
        """Special tokens that say nothing to whoever reads an answer: all but the marks of reasoning and calls, which the parser reads."""
        if self.dialect.format is not None and self.dialect.format.style == "harmony":
            return set()  # all of them are marks
        marks = self.dialect.written
        return {
            token
            for token, word in added.items()
            if word.special and not any(str(word) in mark or mark in str(word) for mark in marks)
        }

    @property
    def template(self) -> str | None:
        """The template of plain requests; where there is none, any."""
        return self.templates.get(DEFAULT) or next(iter(self.templates.values()), None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        words: Mapping[str, Any] | None = None,
        force_think: bool = False,
        answer: bool = True,
        proceed: bool = False,
        name: str | None = None,
    ) -> RenderedPrompt:
        """A conversation that ends where the assistant speaks (`answer`), or inside its last message (`proceed`). `name`: of the template.

        UsageError for messages that the template refuses, or with which no answer can go on.
        """
        template = chosen(self.templates, bool(tools), name)
        told = for_template(messages, self.dialect)
        border, end = self._unwritten(told, tools)
        told = [
            {
                key: self._escape_special_tokens(value, border, self._spared(message)) if key != "role" else value
                for key, value in message.items()
            }
            for message in told
        ]
        shielded = [self._escape_special_tokens(tool, border, ()) for tool in tools]

        def write(messages: Sequence[Mapping[str, Any]], answer: bool, tools: list[Any] = shielded) -> str:
            text = self._text(template, messages, tools, dict(words or {}), answer)
            if len(text) > MAX_TEXT_CHARS:
                raise UsageError(f"the prompt has {len(text)} characters, at most {MAX_TEXT_CHARS} are read")
            return text

        untold = bool(tools) and not self._tells_tools(write, told, answer, template)
        if proceed:
            text, said, thinking = render_continuation(write, told, self.dialect, str(template), end)
            said = said.replace(border, "")
            return RenderedPrompt(text.replace(border, ""), self._ids(text, border), thinking, said, untold)
        text, mark = write(told, answer), self.dialect.think[0]
        if answer and force_think and mark and not opened(text, self.dialect):
            text += f"{mark}\n"
        thinking = bool(answer and opened(text, self.dialect))
        return RenderedPrompt(text.replace(border, ""), self._ids(text, border), thinking, tools_not_rendered=untold)

    def _tells_tools(
        self, write: Any, messages: Sequence[Mapping[str, Any]], answer: bool, template: str | None
    ) -> bool:
        """Whether the template writes anything of tools: the prompt without them is another one, or none."""
        if template not in self.writes_tools:
            told = write(messages, answer)
            try:
                if write(messages, answer, []) == told:
                    return False
            except UsageError:  # a template that cannot do without them
                pass
            self.writes_tools.add(template)
        return True

    def _text(
        self,
        template: str | None,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any],
        words: dict[str, Any],
        answer: bool,
    ) -> str:
        if not template:
            if tools:
                raise UsageError("this model has no chat template, so it cannot be told of tools")
            return "\n".join(str(message["content"]) for message in messages)
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=template,
                add_generation_prompt=answer,
                tokenize=False,
                **words,
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(f"the model's chat template refuses these messages: {error}") from error

    def _ids(self, text: str, border: str) -> list[int]:
        whole = not self.templates  # a template writes what begins a text itself
        parts = text.split(border)
        ids = list(self.tokenizer(parts[0], add_special_tokens=whole)["input_ids"])
        for part in parts[1:]:
            ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    def _unwritten(self, *texts: Any) -> list[str]:
        """Two characters that nobody has written."""
        written = repr(texts)
        free = [char for char in _NONCHARACTERS if char not in written and ascii(char)[1:-1] not in written]
        return [*free, *_NONCHARACTERS][:2]

    def _spared(self, message: Mapping[str, Any]) -> tuple[str, ...]:
        """Marks that are the model's own words in its own messages."""
        return self.dialect.think if message.get("role") == "assistant" else ()

    def _escape_special_tokens(self, value: Any, border: str, spared: Sequence[str]) -> Any:
        """A border inside each control token, so that it is read as the letters it is."""
        if isinstance(value, str):

            def broken(found: re.Match[str]) -> str:
                return found[0] if found[0] in spared else found[0][0] + border + found[0][1:]

            return self.controls.sub(broken, value.replace(border, ""))
        if isinstance(value, Mapping):
            return {key: self._escape_special_tokens(inner, border, spared) for key, inner in value.items()}
        return (
            [self._escape_special_tokens(inner, border, spared) for inner in value]
            if isinstance(value, list | tuple)
            else value
        )
