"""Chat formats: how each model family writes reasoning and tool calls. Output is parsed, calls are forced by a grammar,
and messages are converted for the chat template.
"""

from ktx.chat_formats.calls import new_id
from ktx.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text, merged
from ktx.chat_formats.grammar import forced_call_grammar
from ktx.chat_formats.messages import for_template
from ktx.chat_formats.parser import Parser
from ktx.chat_formats.registry import DIALECTS, CallFormat, ChatFormat, dialect_for, opened

__all__ = [
    "DIALECTS",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "ChatFormat",
    "Event",
    "CallFormat",
    "Parser",
    "Text",
    "dialect_for",
    "for_template",
    "forced_call_grammar",
    "merged",
    "new_id",
    "opened",
]
