"""Request models of OpenAI's Responses API; the same rules as in `openai`."""

from __future__ import annotations

from typing import Annotated, Literal

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
    check_tool_type,
    choice_tag,
)

MAX_ITEMS = 10_000  # items of a conversation


class ResponseText(StrictModel):
    """Options of the answer's text."""

    format: Object | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseReasoning(StrictModel):
    """Options of the reasoning."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseTool(StrictModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None

    _check_tool_type = model_validator(mode="before")(check_tool_type)


class ResponseNamespace(StrictModel):
    """A namespace of functions; their calls have its name in the field `namespace`."""

    type: Literal["namespace"]
    name: FunctionName
    description: Text | None = None
    tools: Annotated[list[ResponseTool], Field(min_length=1, max_length=512)]


class ResponseSearch(StrictModel):
    """Web search, which is accepted and not supported: it is part of neither the prompt nor the response's tools."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["web_search"]


def tool_tag(tool: object) -> str:
    """Returns the discriminator tag of a tool, before or after validation."""
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in ("namespace", "web_search") else "function"


AnyResponseTool = Annotated[
    Annotated[ResponseTool, Tag("function")]
    | Annotated[ResponseNamespace, Tag("namespace")]
    | Annotated[ResponseSearch, Tag("web_search")],
    Discriminator(tool_tag),
]


class ResponseChoice(StrictModel):
    """A tool_choice that forces one function."""

    type: Literal["function"]
    name: FunctionName


class ResponseAllowed(StrictModel):
    """A tool_choice that allows a subset of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseChoice], Field(max_length=512)]


AnyResponseChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[ResponseChoice, Tag("function")]
    | Annotated[ResponseAllowed, Tag("allowed_tools")],
    Discriminator(choice_tag),
]


class ResponseTokensRequest(Request):
    """The body of /v1/responses/input_tokens: the fields that the prompt depends on."""

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
    """The body of /v1/responses."""

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
