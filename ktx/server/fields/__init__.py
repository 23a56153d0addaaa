"""What a request may hold, a file a protocol."""

from ktx.server.fields import parameters
from ktx.server.fields.anthropic import Anthropic, Count
from ktx.server.fields.ollama import OllamaChat, OllamaGenerate, OllamaShow
from ktx.server.fields.openai import Chat, Completion, Detokenize, LoadAdapter, Tokenize, UnloadAdapter
from ktx.server.fields.responses import Respond, RespondCount

__all__ = [
    "Anthropic",
    "Chat",
    "Completion",
    "Count",
    "Detokenize",
    "LoadAdapter",
    "OllamaChat",
    "OllamaGenerate",
    "OllamaShow",
    "Respond",
    "RespondCount",
    "Tokenize",
    "UnloadAdapter",
    "parameters",
]
