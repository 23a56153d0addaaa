"""What a request of Anthropic's API may hold. The same rules as in `openai`."""

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
    own_tool,
)


class ContentBlock(StrictModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    type: Annotated[str, Field(max_length=64)]


class AnthropicMessage(StrictModel):
    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[ContentBlock], Field(max_length=4096)]


class AnthropicTool(StrictModel):
    name: FunctionName
    description: Text | None = None
    input_schema: Object
    type: Literal["custom"] | None = None
    cache_control: Object | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # calls are told when they are whole, here as there without it
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    _own = model_validator(mode="before")(own_tool)


class AnthropicChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(StrictModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(StrictModel):
    type: Literal["json_schema"]
    schema_: Object = Field(alias="schema")


class OutputConfig(StrictModel):
    effort: Effort | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Request):
    model: Name
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=10_000)]
    system: Text | Annotated[list[ContentBlock], Field(max_length=4096)] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=512)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its name while it was a beta
    cache_control: Object | None = None
    context_management: Object | None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None
    thread: Object | None = None  # refused with the words that clients know, see messages.py


class MessagesRequest(CountTokensRequest):
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
