"""How each model family writes reasoning and calls: read from its text, forced by a grammar, put into its template."""

from ktx.dialects.calls import new_id
from ktx.dialects.events import CallArguments, CallEnd, CallStart, Event, Text, merged
from ktx.dialects.grammar import forced_call_grammar
from ktx.dialects.messages import for_template
from ktx.dialects.parser import Parser
from ktx.dialects.table import DIALECTS, CallFormat, ChatFormat, dialect_for, opened

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
