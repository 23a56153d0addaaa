"""Request models of Anthropic's API; the same rules as in `openai`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ktx.server.protocol.openai import (
    Effort,
    FunctionName,
    MaxTokens,
    Name,
    Object,
    Request,
    Stops,
    StrictModel,
    Text,
    check_tool_type,
)


class ContentBlock(StrictModel):
    """A block of a message's content, with the further fields of its type."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    type: Annotated[str, Field(max_length=64)]


class AnthropicMessage(StrictModel):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[ContentBlock], Field(max_length=4096)]


class AnthropicTool(StrictModel):
    """A tool, in Anthropic's format."""

    name: FunctionName
    description: Text | None = None
    input_schema: Object
    type: Literal["custom"] | None = None
    cache_control: Object | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # no effect: calls are sent when they are complete
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    _check_tool_type = model_validator(mode="before")(check_tool_type)


class AnthropicChoice(StrictModel):
    """Which tools the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(StrictModel):
    """Turns thinking on or off."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(StrictModel):
    """A JSON schema that the answer must match."""

    type: Literal["json_schema"]
    schema_: Object = Field(alias="schema")


class OutputConfig(StrictModel):
    """Options of the output."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Request):
    """The body of /v1/messages/count_tokens."""

    model: Name
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=10_000)]
    system: Text | Annotated[list[ContentBlock], Field(max_length=4096)] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=512)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the name of output_config.format during its beta
    cache_control: Object | None = None
    context_management: Object | None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
    thread: Object | None = None  # refused with the error that clients expect, see messages.py


class MessagesRequest(CountTokensRequest):
    """The body of /v1/messages."""

    max_tokens: MaxTokens
    stop_sequences: Stops | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=1 << 30)
    stream: bool | None = None
    metadata: Object | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard"] | None = None
    container: None = None
    diagnostics: Object | None = None
