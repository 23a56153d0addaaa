"""What a request may hold, a file a protocol."""

from ktx.server.fields import parameters
from ktx.server.fields.anthropic import CountTokensRequest, MessagesRequest
from ktx.server.fields.ollama import OllamaChat, OllamaGenerate, OllamaShow
from ktx.server.fields.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapter,
    TokenizeRequest,
    UnloadAdapter,
)
from ktx.server.fields.responses import ResponsesRequest, ResponseTokensRequest

__all__ = [
    "MessagesRequest",
    "ChatCompletionRequest",
    "CompletionRequest",
    "CountTokensRequest",
    "DetokenizeRequest",
    "LoadAdapter",
    "OllamaChat",
    "OllamaGenerate",
    "OllamaShow",
    "ResponsesRequest",
    "ResponseTokensRequest",
    "TokenizeRequest",
    "UnloadAdapter",
    "parameters",
]
