"""Request models of each protocol, and the tables of other servers' parameters."""

from ktx.server.protocol import parameters
from ktx.server.protocol.anthropic import CountTokensRequest, MessagesRequest
from ktx.server.protocol.ollama import OllamaChat, OllamaGenerate, OllamaShow
from ktx.server.protocol.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapter,
    TokenizeRequest,
    UnloadAdapter,
)
from ktx.server.protocol.responses import ResponsesRequest, ResponseTokensRequest

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "CountTokensRequest",
    "DetokenizeRequest",
    "LoadAdapter",
    "MessagesRequest",
    "OllamaChat",
    "OllamaGenerate",
    "OllamaShow",
    "ResponseTokensRequest",
    "ResponsesRequest",
    "TokenizeRequest",
    "UnloadAdapter",
    "parameters",
]
