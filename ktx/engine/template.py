"""Selects and checks the chat template of a request: a tokenizer has one template, several named ones, or none.

Several named templates follow transformers' rule: the one that a request names, `tool_use` with tools, else `default`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktx.errors import BadFile, UsageError, did_you_mean

DEFAULT, TOOLS = "default", "tool_use"
PROBE_TEXT = "What is a rule file?"  # the simplest conversation, which every chat template must be able to render


def named_templates(template: Any) -> dict[str, str]:
    """Returns name -> text of a tokenizer's chat_template: a text, texts by name, or a list of {"name", "template"}.

    Raises:
        BadFile: it is none of these.
    """
    if not template:
        return {}
    if isinstance(template, str):
        return {DEFAULT: template}
    try:
        templates = (
            dict(template)
            if isinstance(template, Mapping)
            else {entry["name"]: entry["template"] for entry in template}
        )
    except (TypeError, KeyError, ValueError) as error:
        raise BadFile(_type_error_message(template)) from error
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in templates.items()):
        raise BadFile(_type_error_message(template))
    return templates


def _type_error_message(template: Any) -> str:
    """Returns the message for a chat_template that is neither a text nor texts by name."""
    return (
        f"the tokenizer's chat_template is of type {type(template).__name__}, but neither text nor texts by name; "
        "give --chat-template FILE"
    )


def select_template(templates: Mapping[str, str], tools: bool, name: str | None = None) -> str | None:
    """Returns the template of a request; None where the model has none.

    Args:
        templates: name -> text.
        tools: whether the request has tools.
        name: the template that the request names.

    Raises:
        UsageError: the name is unknown, or there are several templates and no default.
    """
    known = ", ".join(sorted(templates)) or "none"
    if name is not None:
        if name not in templates:
            raise UsageError(
                f"this model has no chat_template {name[:64]!r} (it has: {known}){did_you_mean(name, templates)}"
            )
        return templates[name]
    if tools and TOOLS in templates:
        return templates[TOOLS]
    if not templates or DEFAULT in templates:
        return templates.get(DEFAULT)
    raise UsageError(f"this model has named chat templates and no default: choose one with chat_template ({known})")


# where there is no tokenizer yet
DEFAULT_SPECIAL_TOKENS = {f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "unk")}


def check_templates(
    templates: Mapping[str, str], where: str, special: Mapping[str, Any] = DEFAULT_SPECIAL_TOKENS
) -> None:
    """Raises BadFile for a template that renders no conversation: invalid Jinja, an undefined name, or no text of the
    messages.

    All templates are compiled. Only the default one is rendered, because those under other names may need more than
    messages.

    Args:
        templates: name -> text.
        where: the file or object that holds them, for the error message.
        special: the tokenizer's special tokens, which a template may use.
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    for name, template in templates.items():
        source = where if len(templates) == 1 else f"{where} ({name})"
        messages = [{"role": "user", "content": PROBE_TEXT}] if name == DEFAULT else []
        try:
            conversations = [messages] if messages else []
            rendered = render_jinja_template(
                conversations, chat_template=template, add_generation_prompt=True, **special
            )[0]
        except TemplateSyntaxError as error:
            raise BadFile(f"{source}, line {error.lineno}: is not a valid Jinja template: {error.message}") from error
        except TemplateError as error:
            # raise_exception raises exactly TemplateError: the template refuses these messages, but not all.
            if type(error) is not TemplateError:
                raise BadFile(f"{source}{_error_line(error)}: cannot render a conversation: {error}") from error
            continue
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise BadFile(
                f"{source}{_error_line(error)}: cannot render a conversation: {type(error).__name__}: {error}"
            ) from error
        if messages and " ".join(PROBE_TEXT.split()).casefold() not in " ".join("".join(rendered).split()).casefold():
            raise BadFile(f"{source}: does not render the user's message, so it is not a chat template")


def _error_line(error: BaseException) -> str:
    """Returns the template's line that raised an error, as text: Jinja's tracebacks have the template's own lines."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""
