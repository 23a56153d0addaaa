"""Renders messages as token ids through the model's chat template.

Text in messages that looks like a control token stays text: only the template writes control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktx.chat_formats import ChatFormat, chat_format_for, ends_in_reasoning, to_template_messages
from ktx.engine.continue_message import render_continuation
from ktx.engine.template import DEFAULT, check_templates, named_templates, select_template
from ktx.errors import UsageError
from ktx.utils.deprecation import deprecated_members, deprecated_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEXT_CHARS = 64 << 20
_MARK = re.compile(r"[<\[].+[>\]]")
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode assigns them no meaning


@deprecated_members(said="prefill_text", untold="tools_not_rendered")
@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text and token ids.

    Args:
        text: the rendered text.
        ids: the token ids.
        thinking: the prompt ends inside the reasoning block.
        prefill_text: text at the prompt's end that the output continues.
        tools_not_rendered: there were tools, but the template did not render them.
    """

    text: str
    ids: list[int]
    thinking: bool
    prefill_text: str = ""
    tools_not_rendered: bool = False


class PromptRenderer:
    """Renders prompts for one tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.
        model_type: the config's model_type, which chooses the chat format where the template does not.
        template: replaces the tokenizer's own chat template.

    Raises:
        BadFile: a template cannot render prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model_type: str | None = None, template: str | None = None):
        """Checks the templates, and collects the control tokens, which the text of a message must not contain."""
        self.tokenizer = tokenizer
        # template name -> Jinja source
        self.templates = named_templates(template or getattr(tokenizer, "chat_template", None))
        folder = getattr(tokenizer, "name_or_path", "")
        tokenizer_source = f"{folder}: the tokenizer's chat template" if folder else "the tokenizer's chat template"
        source = "--chat-template" if template else tokenizer_source
        check_templates(self.templates, source, getattr(tokenizer, "special_tokens_map", {}))
        self.chat_format: ChatFormat = chat_format_for("\n".join(self.templates.values()), model_type)
        self.templates_with_tools: set[str | None] = set()  # templates that have rendered tools
        added_tokens = getattr(tokenizer, "added_tokens_decoder", None) or {}
        # control tokens: text in a message that looks like one of these must stay text
        names = [
            str(token)
            for token in added_tokens.values()
            if len(str(token)) > 1 and (token.special or _MARK.fullmatch(str(token)))
        ]
        self.special = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        self.textless_ids = frozenset(self._textless_tokens(added_tokens))
        self.control_pattern = re.compile(
            "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)"
        )

    def _textless_tokens(self, added_tokens: Mapping[int, Any]) -> set[int]:
        """Returns the special tokens without text in an output: all but the marks of reasoning and calls, which the
        parser reads.
        """
        if self.chat_format.call_format is not None and self.chat_format.call_format.style == "harmony":
            return set()  # all special tokens are marks
        marks = self.chat_format.all_marks
        return {
            token_id
            for token_id, special_token in added_tokens.items()
            if special_token.special
            and not any(str(special_token) in mark or mark in str(special_token) for mark in marks)
        }

    @property
    def template(self) -> str | None:
        """The template of requests without a template name; without a default template, the first one."""
        return self.templates.get(DEFAULT) or next(iter(self.templates.values()), None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        force_think: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_name: str | None = None,
    ) -> RenderedPrompt:
        """Renders a conversation.

        Args:
            messages: the conversation, in OpenAI's form.
            tools: OpenAI's tool definitions.
            template_kwargs: the template's keyword arguments.
            force_think: opens the reasoning block where the template does not.
            add_generation_prompt: ends with the generation prompt.
            continue_final_message: ends inside the last message, which the output continues.
            template_name: the name of the chat template.

        Raises:
            UsageError: the template refuses the messages, or the last message cannot be continued.
        """
        template = select_template(self.templates, bool(tools), template_name)
        template_messages = to_template_messages(messages, self.chat_format)
        separator, sentinel = self._unused_characters(template_messages, tools)
        template_messages = [
            {
                key: self._escape_special_tokens(value, separator, self._allowed_tokens(message))
                if key != "role"
                else value
                for key, value in message.items()
            }
            for message in template_messages
        ]
        escaped_tools = [self._escape_special_tokens(tool, separator, ()) for tool in tools]

        def render_text(
            messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tools: list[Any] = escaped_tools
        ) -> str:
            """Renders variants of the prompt with this request's template and arguments; limits the text's length."""
            text = self._apply_template(template, messages, tools, dict(template_kwargs or {}), add_generation_prompt)
            if len(text) > MAX_TEXT_CHARS:
                raise UsageError(f"the prompt has {len(text)} characters, the limit is {MAX_TEXT_CHARS}")
            return text

        tools_not_rendered = bool(tools) and not self._renders_tools(
            render_text, template_messages, add_generation_prompt, template
        )
        if continue_final_message:
            text, prefill_text, thinking = render_continuation(
                render_text, template_messages, self.chat_format, str(template), sentinel
            )
            prefill_text = prefill_text.replace(separator, "")
            return RenderedPrompt(
                text.replace(separator, ""), self._tokenize(text, separator), thinking, prefill_text, tools_not_rendered
            )
        text, open_mark = render_text(template_messages, add_generation_prompt), self.chat_format.reasoning_marks[0]
        if add_generation_prompt and force_think and open_mark and not ends_in_reasoning(text, self.chat_format):
            text += f"{open_mark}\n"
        thinking = bool(add_generation_prompt and ends_in_reasoning(text, self.chat_format))
        return RenderedPrompt(
            text.replace(separator, ""),
            self._tokenize(text, separator),
            thinking,
            tools_not_rendered=tools_not_rendered,
        )

    def _renders_tools(
        self,
        render_text: Any,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        template: str | None,
    ) -> bool:
        """Whether the template renders tools; many templates ignore them, and the client is warned about that.

        The template does if the prompt differs without tools, or if the template refuses messages without tools. The
        answer yes is cached by template, so that only the first prompts are rendered twice.
        """
        if template not in self.templates_with_tools:
            with_tools = render_text(messages, add_generation_prompt)
            try:
                if render_text(messages, add_generation_prompt, []) == with_tools:
                    return False
            except UsageError:  # a template that requires tools
                pass
            self.templates_with_tools.add(template)
        return True

    def _apply_template(
        self,
        template: str | None,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any],
        template_kwargs: dict[str, Any],
        add_generation_prompt: bool,
    ) -> str:
        """Applies the chat template; without a template, joins the messages' contents.

        Raises:
            UsageError: the template refuses the messages, or there are tools but no template.
        """
        if not template:
            if tools:
                raise UsageError("this model has no chat template, so tools cannot be rendered")
            return "\n".join(str(message["content"]) for message in messages)
        from jinja2.exceptions import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools or None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_kwargs,
            )
            assert isinstance(text, str)  # because of tokenize=False
            return text
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(f"the model's chat template refuses these messages: {error}") from error

    def _tokenize(self, text: str, separator: str) -> list[int]:
        """Tokenizes the parts between separators one by one, so that no control token spans a separator."""
        add_special = not self.templates  # a template renders the text's begin token itself
        parts = text.split(separator)
        ids = list(self.tokenizer(parts[0], add_special_tokens=add_special)["input_ids"])
        for part in parts[1:]:
            ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    def _unused_characters(self, *texts: Any) -> list[str]:
        """Returns two characters that do not occur in `texts`: the separator that breaks up control tokens, and the
        sentinel that marks where a continued message ends.
        """
        used = repr(texts)
        unused = [char for char in _NONCHARACTERS if char not in used and ascii(char)[1:-1] not in used]
        return [*unused, *_NONCHARACTERS][:2]

    def _allowed_tokens(self, message: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the control tokens that a message may contain: an assistant message keeps its reasoning marks."""
        return self.chat_format.reasoning_marks if message.get("role") == "assistant" else ()

    def _escape_special_tokens(self, value: Any, separator: str, allowed: Sequence[str]) -> Any:
        """Puts a separator inside each control token in a value's texts, where `_tokenize` splits the prompt: only the
        template may write control tokens, a client's text may not. `allowed`: tokens that stay.
        """
        if isinstance(value, str):

            def split_token(found: re.Match[str]) -> str:
                """Returns a control token with the separator after its first character, an allowed one unchanged."""
                return found[0] if found[0] in allowed else found[0][0] + separator + found[0][1:]

            return self.control_pattern.sub(split_token, value.replace(separator, ""))
        if isinstance(value, Mapping):
            return {key: self._escape_special_tokens(item, separator, allowed) for key, item in value.items()}
        return (
            [self._escape_special_tokens(item, separator, allowed) for item in value]
            if isinstance(value, list | tuple)
            else value
        )


__getattr__ = deprecated_names(__name__, Prompts="PromptRenderer", Rendered="RenderedPrompt")
