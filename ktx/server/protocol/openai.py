"""Request models of OpenAI's API, and the types that all protocols share.

Every number, string and list has a limit, and an unknown field is refused by name. Fields of OpenAI's API that make no
sense for a text model on one machine are accepted only with a value that disables them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from ktx.server.protocol.parameters import select_fields

MAX_TEXT_CHARS = 16 << 20
Name = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Object = dict[str, Any]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=1 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=16)]
Choices = Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=1024)]
MaxTokens = Annotated[int, Field(ge=1, lt=1 << 31)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,128}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Tier = Literal["auto", "default", "flex", "scale", "priority"]  # this server has only "default"
Retention = Literal["in-memory", "in_memory", "24h"]  # of a prompt; here pages stay cached until they are evicted
TEMPLATE_KWARGS = (  # chat template kwargs that a request may set
    "enable_thinking",
    "thinking",
    "thinking_budget",
    "reasoning_effort",
    "preserve_thinking",
    "clear_thinking",
    "model_identity",
    "date_string",
    "custom_instructions",
)


class StrictModel(BaseModel):
    """A model that does not convert types and refuses unknown fields.

    The exception: 8.0 is accepted as the integer 8, because JSON has one number type and some clients write all numbers
    as floats.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def convert_integral_float(cls, value: Any) -> Any:
        """Converts a float without a fraction to an int."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


class Request(StrictModel):
    """The body of a route, which may also contain parameters of other servers (see `parameters`)."""

    effective: ClassVar[frozenset[str]] = frozenset()  # parameters of the table IGNORED that have an effect here

    _select_fields = model_validator(mode="before")(classmethod(select_fields))  # type: ignore[arg-type]


# ---- sampling parameters, shared by several routes


class SamplingFields(Request):
    """Sampling parameters."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 30)  # 0 and -1: all
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(None, max_length=1024)
    )
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    repeat_last_n: int | None = Field(None, ge=-1, lt=1 << 31)  # number of last tokens that penalties apply to; -1: all
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class LoraUse(StrictModel):
    """An entry of llama.cpp's list of adapters."""

    id: int = Field(ge=0, lt=1 << 31)
    scale: float = Field(ge=-100, le=100)


class Schema(StrictModel):
    """A named JSON schema."""

    name: Name | None = None
    description: Text | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None


class Format(StrictModel):
    """The format of the answer; regex and grammar (Lark) come from vLLM's structured outputs."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: Schema | None = None
    pattern: Text | None = None
    grammar: Text | None = None

    @model_validator(mode="after")
    def check_type_fields(self) -> Format:
        """Raises ValueError if the field of the type is missing."""
        needed = {"json_schema": "json_schema", "regex": "pattern", "grammar": "grammar"}.get(self.type)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"type {self.type} needs {needed}")
        if self.json_schema is not None and self.type == "json_schema" and self.json_schema.schema_ is None:
            raise ValueError("json_schema needs schema")
        return self


def check_tool_type(tool: Any) -> Any:
    """Raises ValueError for a tool that is not a function: one that the server would run or that takes free text."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom" if "input_schema" in tool else "function"):
        raise ValueError(f"a tool of type {kind!r} cannot be used here: only functions that the client runs")
    return tool


class Function(StrictModel):
    """A function that the model may call."""

    name: FunctionName
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function
    cache_control: Object | None = Field(None, exclude=True)  # the prefix cache is automatic

    _check_tool_type = model_validator(mode="before")(check_tool_type)


class NamedFunction(StrictModel):
    """The name of a function."""

    name: FunctionName


class NamedTool(StrictModel):
    """A tool_choice that forces one function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(StrictModel):
    """A subset of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(max_length=512)]


class AllowedChoice(StrictModel):
    """A tool_choice that allows a subset of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_tag(choice: object) -> str:
    """Returns the discriminator tag of a tool_choice, before or after validation."""
    kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", "word")
    return kind if kind in ("word", "allowed_tools") else "function"


AnyChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedTool, Tag("function")]
    | Annotated[AllowedChoice, Tag("allowed_tools")],
    Discriminator(choice_tag),
]


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: each chunk has the usage so far


class Structured(StrictModel):
    """vLLM's structured_outputs, which replaces its guided_* fields; exactly one field is set."""

    json_: Object | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: Literal[True] | None = None


class StructuredOutputFields(SamplingFields):
    """Fields that chat completions and completions share, among them the constraints on the output."""

    response_format: Format | None = None
    structured_outputs: Structured | None = None
    lora: Annotated[list[LoraUse], Field(max_length=64)] | None = None
    guided_json: Object | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=8)
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=1 << 31)  # keep the last ones; -1: as many as fit
    return_tokens_as_token_ids: bool | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    service_tier: Tier | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Retention | None = None
    prompt_cache_options: Object | None = None

    @model_validator(mode="after")
    def check_one_guide(self) -> StructuredOutputFields:
        """Raises ValueError for several constraints on the output, or stream_options without a stream."""
        guides = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        used = [name for name in guides if getattr(self, name) is not None]
        if self.structured_outputs is not None:
            used += [f"structured_outputs.{name}" for name in self.structured_outputs.model_dump(exclude_none=True)]
        if self.response_format is not None and self.response_format.type != "text":
            used.append("response_format")
        if len(used) > 1:
            raise ValueError(f"{' and '.join(used)} cannot be combined")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


# ---- /v1/chat/completions and the messages of /tokenize


class TextPart(StrictModel):
    """A part of a message's content."""

    type: Literal["text", "refusal"]
    text: Text | None = None
    refusal: Text | None = None
    cache_control: Object | None = None


class CalledFunction(StrictModel):
    """Name and arguments of a tool call."""

    name: Annotated[str, Field(max_length=256)]
    arguments: Text | Object | None = None
    parsed_arguments: Any = Field(None, exclude=True)  # of OpenAI's client


class ToolCall(StrictModel):
    """A tool call of an assistant message."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    provider_specific_fields: Any = Field(None, exclude=True)  # of LiteLLM


class Message(StrictModel):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart | Object], Field(max_length=4096)] | None = None
    name: Name | None = None
    refusal: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=512)] | None = None
    tool_call_id: Name | None = None
    prefix: bool | None = Field(None, exclude=True)  # DeepSeek's: the answer continues this message, which is the last
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    cache_control: Object | None = Field(None, exclude=True)
    # Clients add these to a response and send them back; they only repeat the other fields.
    id: Name | None = Field(None, exclude=True)
    parsed: Any = Field(None, exclude=True)
    provider_specific_fields: Any = Field(None, exclude=True)
    thinking_blocks: Any = Field(None, exclude=True)
    images: Annotated[list[Any], Field(max_length=0)] | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def check_content(self) -> Message:
        """Raises ValueError if a message that needs content has none."""
        if self.role in ("system", "developer", "user") and self.content is None:
            raise ValueError(f"a {self.role} message needs content")
        return self


class Switch(StrictModel):
    """Turns thinking on or off, as in GLM's and DeepSeek's APIs."""

    type: Literal["enabled", "disabled", "auto"]
    clear_thinking: bool | None = None


class ContinueFields(Request):
    """Fields that determine how messages become a prompt: chat template kwargs, and how the prompt ends."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    enable_thinking: bool | None = None
    thinking: Switch | bool | None = None
    chat_template_kwargs: Object | None = None
    chat_template: Text | None = None  # name of one of the model's templates; a request cannot contain a template

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message."""
        return bool(self.continue_final_message or (self.messages and self.messages[-1].prefix))

    @field_validator("chat_template_kwargs")
    @classmethod
    def check_template_kwargs(cls, value: Object | None) -> Object | None:
        """Raises ValueError for a chat template kwarg whose name or type is not supported."""
        for key, item in (value or {}).items():
            if key not in TEMPLATE_KWARGS:
                raise ValueError(f"{key!r} is not a supported template argument; use {', '.join(TEMPLATE_KWARGS)}")
            if not isinstance(item, str | int | float | bool | None) or (isinstance(item, str) and len(item) > 4096):
                raise ValueError(f"{key!r} must be a string of at most 4096 characters, a number, a boolean or null")
        return value

    @property
    def template_kwargs(self) -> Object:
        """The chat template kwargs; chat_template_kwargs overrides `thinking`, which overrides `enable_thinking`."""
        enabled, kwargs = self.enable_thinking, {}
        if isinstance(self.thinking, Switch):
            enabled = {"enabled": True, "disabled": False}.get(self.thinking.type, enabled)
            if self.thinking.clear_thinking is not None:
                kwargs["clear_thinking"] = self.thinking.clear_thinking
        elif self.thinking is not None:
            enabled = self.thinking
        if enabled is not None:
            kwargs |= {"enable_thinking": enabled, "thinking": enabled}
        return kwargs | (self.chat_template_kwargs or {})

    @model_validator(mode="after")
    def check_continuation(self) -> ContinueFields:
        """Raises ValueError if another message than the last is continued, or if a new one is started as well."""
        if any(message.prefix for message in (self.messages or ())[:-1]):
            raise ValueError("prefix: only the last message can be continued")
        if self.continues and self.add_generation_prompt:
            raise ValueError("an answer that continues the last message needs add_generation_prompt: false")
        return self


class Reasoning(StrictModel):
    """OpenRouter's reasoning options."""

    effort: Effort | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    max_tokens: None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # no effect: the full reasoning is returned


class ChatCompletionRequest(StructuredOutputFields, ContinueFields):
    """The body of /v1/chat/completions."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: AnyChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    add_special_tokens: Literal[False] | None = None  # vLLM's: the template adds the BOS token
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None  # vLLM's: a continued message is not repeated
    modalities: list[Literal["text"]] | None = None
    store: bool | None = None  # no effect: chat completions are not stored
    verbosity: Literal["low", "medium", "high"] | None = None
    include_reasoning: bool | None = None
    # known, but only accepted if they are null
    audio: None = None
    functions: None = None
    function_call: None = None
    prediction: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def check_consistency(self) -> ChatCompletionRequest:
        """Raises ValueError for log probabilities or a tool choice without the fields that they need."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not one of the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        return self


# ---- /v1/completions and tokens


class CompletionRequest(StructuredOutputFields):
    """The body of /v1/completions."""

    model: Name
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=256)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=256)]
    )
    max_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=8)
    add_special_tokens: bool | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def check_consistency(self) -> CompletionRequest:
        """Raises ValueError for combinations that are not supported: best_of other than n, echo of a stream."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported")
        if self.echo and self.stream:
            raise ValueError("echo cannot be streamed")
        return self


class TokenizeRequest(ContinueFields):
    """The body of /tokenize: a prompt or messages."""

    model: Name | None = None
    prompt: Text | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None

    @model_validator(mode="after")
    def check_one_input(self) -> TokenizeRequest:
        """Raises ValueError unless there is either a prompt or messages."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class LoadAdapter(StrictModel):
    """The body of /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool | None = None  # replace a loaded adapter of the same name


class UnloadAdapter(StrictModel):
    """The body of /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_int_id: None = None  # vLLM's id, which this server does not have


class DetokenizeRequest(Request):
    """The body of /detokenize."""

    model: Name | None = None
    tokens: Ids
