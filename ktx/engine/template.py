"""Which chat template writes a prompt, and whether it can: a tokenizer has one, several by name, or none.

Of several, transformers' rule: the one that a request names, `tool_use` where there are tools, else `default`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktx.errors import BadFile, UsageError, did_you_mean

DEFAULT, TOOLS = "default", "tool_use"
PROBE = "What is a rule file?"  # the plainest conversation, which every chat template must be able to write


def named_templates(template: Any) -> dict[str, str]:
    """Name -> text of what a tokenizer calls its chat_template: text, texts by name, or a list of {"name", "template"}.

    BadFile where it is none of these.
    """
    if not template:
        return {}
    if isinstance(template, str):
        return {DEFAULT: template}
    try:
        found = dict(template) if isinstance(template, Mapping) else {one["name"]: one["template"] for one in template}
    except (TypeError, KeyError, ValueError) as error:
        raise BadFile(_unreadable(template)) from error
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in found.items()):
        raise BadFile(_unreadable(template))
    return found


def _unreadable(template: Any) -> str:
    return (
        f"the tokenizer's chat_template is of type {type(template).__name__} and neither text nor texts by name; "
        "give --chat-template FILE"
    )


def chosen(templates: Mapping[str, str], tools: bool, name: str | None = None) -> str | None:
    """The template of a request with or without tools; None where the model has none. UsageError where none is meant."""
    known = ", ".join(sorted(templates)) or "none"
    if name is not None:
        if name not in templates:
            raise UsageError(
                f"chat_template {name[:64]!r} is no template of this model (it has: {known}){did_you_mean(name, templates)}"
            )
        return templates[name]
    if tools and TOOLS in templates:
        return templates[TOOLS]
    if not templates or DEFAULT in templates:
        return templates.get(DEFAULT)
    raise UsageError(f"this model has chat templates by name and no default: name one as chat_template ({known})")


SPECIAL = {f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "unk")}  # where no tokenizer is known yet


def check_templates(templates: Mapping[str, str], where: str, special: Mapping[str, Any] = SPECIAL) -> None:
    """BadFile for a template that no conversation can be written with: no Jinja, a name that nobody defines, no word of the messages.

    All are compiled. Rendered is the one that plain requests get; those under other names may need more than messages.
    `where` is what holds them, for the error; `special` are the tokenizer's special tokens, which a template may write.
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    for name, text in templates.items():
        place = where if len(templates) == 1 else f"{where} ({name})"
        messages = [{"role": "user", "content": PROBE}] if name == DEFAULT else []
        try:
            chats = [messages] if messages else []
            written = render_jinja_template(chats, chat_template=text, add_generation_prompt=True, **special)[0]
        except TemplateSyntaxError as error:
            raise BadFile(f"{place}, line {error.lineno}: is no Jinja template: {error.message}") from error
        except TemplateError as error:
            if (
                type(error) is not TemplateError
            ):  # what raise_exception raises: the template refuses these messages, not all
                raise BadFile(f"{place}{_line(error)}: cannot write a conversation: {error}") from error
            continue
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise BadFile(
                f"{place}{_line(error)}: cannot write a conversation: {type(error).__name__}: {error}"
            ) from error
        if messages and " ".join(PROBE.split()).casefold() not in " ".join("".join(written).split()).casefold():
            raise BadFile(f"{place}: writes nothing of what the user says: it is no chat template")


def _line(error: BaseException) -> str:
    """Where in the template an error was raised: Jinja's tracebacks have the template's own lines."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""
