"""Request models of Ollama's API; the same rules as in `openai`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ktx.server.protocol.openai import MaxTokens, Name, Object, Request, Stop, Stops, StrictModel, Text, Tool


def refuse_images(images: list[Any] | None) -> None:
    """Raises ValueError for images."""
    if images:
        raise ValueError("this is a text model; it does not accept images")


NoImages = Annotated[list[Any] | None, AfterValidator(refuse_images)]


class OllamaOptions(Request):
    """Sampling parameters. Options of Ollama's model runner (threads, GPU layers) are in the table IGNORED."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, ge=0, le=1)
    repeat_last_n: int | None = Field(None, ge=-1, lt=1 << 31)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    num_predict: int | None = Field(None, ge=-2, lt=1 << 31)
    stop: Stop | Stops | None = None


class OllamaShared(Request):
    """Fields of /api/chat and /api/generate."""

    model: Name
    stream: bool | None = None
    format: Literal["", "json"] | Object | None = None
    options: OllamaOptions | None = None
    max_tokens: MaxTokens | None = None  # an alias of num_predict
    keep_alive: Any = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncate: bool | None = None  # a prompt that is too long is refused either way
    shift: bool | None = None  # an answer that reaches the end of the context has the finish reason "length" either way
    debug_render_only: Literal[False] | None = Field(None, alias="_debug_render_only")


class OllamaCall(StrictModel):
    """Name and arguments of a tool call."""

    name: Annotated[str, Field(max_length=256)]
    arguments: Object | None = None
    index: int | None = None


class OllamaToolCall(StrictModel):
    """A tool call of an assistant message."""

    id: Name | None = None
    type: Literal["function"] | None = None
    function: OllamaCall


class OllamaMessage(StrictModel):
    """A message of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = ""
    thinking: Text | None = None
    images: NoImages = None
    tool_calls: Annotated[list[OllamaToolCall], Field(max_length=512)] | None = None
    tool_name: Name | None = None
    tool_call_id: Name | None = None


class OllamaChat(OllamaShared):
    """The body of /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(default_factory=list, max_length=10_000)]
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None


class OllamaGenerate(OllamaShared):
    """The body of /api/generate."""

    prompt: Text = ""
    suffix: Literal[""] | None = None
    system: Text | None = None
    raw: bool | None = None
    template: Literal[""] | None = None
    context: Annotated[list[int], Field(max_length=0)] | None = None
    images: NoImages = None


class OllamaShow(StrictModel):
    """The body of /api/show."""

    model: Name | None = None
    name: Name | None = None
    verbose: bool | None = None
    # Ollama's command line sends these fields, empty.
    system: Literal[""] | None = None
    template: Literal[""] | None = None
    options: Object | None = None
