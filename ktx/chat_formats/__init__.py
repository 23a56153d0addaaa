"""Chat formats: how each model family writes reasoning and tool calls. Output is parsed, calls are forced by a grammar,
and messages are converted for the chat template.
"""

from ktx.chat_formats.calls import new_id
from ktx.chat_formats.events import CallArguments, CallEnd, CallStart, Event, Text, merge_events
from ktx.chat_formats.grammar import forced_call_grammar
from ktx.chat_formats.messages import to_template_messages
from ktx.chat_formats.parser import Parser
from ktx.chat_formats.registry import CHAT_FORMATS, CallFormat, ChatFormat, chat_format_for, ends_in_reasoning

__all__ = [
    "CHAT_FORMATS",
    "CallArguments",
    "CallEnd",
    "CallFormat",
    "CallStart",
    "ChatFormat",
    "Event",
    "Parser",
    "Text",
    "chat_format_for",
    "ends_in_reasoning",
    "forced_call_grammar",
    "merge_events",
    "new_id",
    "to_template_messages",
]
