"""What a request to /v1/responses may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from ktx.server.protocol.openai import (
    Effort,
    FunctionName,
    MaxTokens,
    Name,
    Object,
    Request,
    Retention,
    StrictModel,
    Text,
    Tier,
    kind_of_choice,
    own_tool,
)

MAX_ITEMS = 10_000  # of a conversation


class ResponseText(StrictModel):
    format: Object | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseReasoning(StrictModel):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseTool(StrictModel):
    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None

    _own = model_validator(mode="before")(own_tool)


class ResponseNamespace(StrictModel):
    """Functions under a common name, which calls of them repeat."""

    type: Literal["namespace"]
    name: FunctionName
    description: Text | None = None
    tools: Annotated[list[ResponseTool], Field(min_length=1, max_length=512)]


class ResponseSearch(StrictModel):
    """Leave to search the web, which nobody here can: the model is not told of it, nor is it among the answer's tools."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["web_search"]


def kind_of_tool(tool: Any) -> str:
    """Of what was sent, or of what was read from it."""
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in ("namespace", "web_search") else "function"


AnyResponseTool = Annotated[
    Annotated[ResponseTool, Tag("function")]
    | Annotated[ResponseNamespace, Tag("namespace")]
    | Annotated[ResponseSearch, Tag("web_search")],
    Discriminator(kind_of_tool),
]


class ResponseChoice(StrictModel):
    type: Literal["function"]
    name: FunctionName


class ResponseAllowed(StrictModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseChoice], Field(max_length=512)]


AnyResponseChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[ResponseChoice, Tag("function")]
    | Annotated[ResponseAllowed, Tag("allowed_tools")],
    Discriminator(kind_of_choice),
]


class ResponseTokensRequest(Request):
    """What the length of a prompt depends on."""

    effective = frozenset({"store", "metadata"})

    model: Name | None = None
    input: Text | Annotated[list[Object], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    instructions: Text | None = None
    previous_response_id: Name | None = None
    tools: Annotated[list[AnyResponseTool], Field(max_length=512)] | None = None
    tool_choice: AnyResponseChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: ResponseReasoning | None = None
    truncation: Literal["disabled"] | None = None
    conversation: None = None


class ResponsesRequest(ResponseTokensRequest):
    model: Name
    max_output_tokens: MaxTokens | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: Object | None = None
    store: bool | None = None  # true by default
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    include: Annotated[list[str], Field(max_length=16)] | None = None
    service_tier: Tier | None = None
    safety_identifier: Name | None = None
    client_metadata: Object | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Retention | None = None
    prompt_cache_options: Object | None = None
    background: Literal[False] | None = None
    prompt: None = None
    max_tool_calls: int | None = None
