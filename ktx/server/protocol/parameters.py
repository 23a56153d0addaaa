"""Tables of other servers' request parameters: ignored ones, refused ones and aliases.

A parameter in none of the tables is a field of the route, or unknown. A refused parameter is accepted if its value is
empty or neutral.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

IGNORED_HEADER = "x-ignored-parameters"
IGNORED_BY_REQUEST: ContextVar[list[str] | None] = ContextVar("ignored_parameters", default=None)  # set per request
EMPTY_VALUES: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class RefusedParameter:
    """A parameter that would change the answer and is not supported.

    `neutral_values` are accepted in addition to the empty values, because they disable the feature.
    """

    reason: str
    neutral_values: tuple[Any, ...] = ()


def _map_names(names: str, value: Any) -> dict[str, Any]:
    """Maps each of the names, which are separated by spaces, to the same value."""
    return dict.fromkeys(names.split(), value)


# parameters that do not change the answer -> reason
IGNORED: dict[str, str] = {
    **_map_names(
        "cache_prompt id_slot slot_id n_cache_reuse", "the prefix cache finds computed prompts by itself (llama.cpp)"
    ),
    **_map_names("n_keep n_discard num_keep", "a full context ends the answer; there is no context shift"),
    **_map_names(
        "timings_per_token return_progress response_fields", "additional statistics in the response (llama.cpp)"
    ),
    **_map_names("priority", "requests are scheduled in order of arrival (vLLM, SGLang)"),
    **_map_names("request_id rid", "the request id is read from the header x-request-id (vLLM, SGLang)"),
    **_map_names(
        "data_parallel_rank routed_dp_rank backend_sampling", "the place of the computation does not change the answer"
    ),
    **_map_names("kv_transfer_params", "the KV cache stays in this process (vLLM)"),
    **_map_names("mm_processor_kwargs media_io_kwargs", "this is a text model"),
    **_map_names("guided_decoding_backend", "there is only one backend (vLLM)"),
    **_map_names("spaces_between_special_tokens", "fast tokenizers add no such spaces, as in vLLM"),
    **_map_names("stream_reasoning", "reasoning is always streamed (SGLang)"),
    **_map_names("length_penalty early_stopping", "only for beam search, which is not supported"),
    **_map_names("mirostat_tau mirostat_eta", "only for mirostat, which is not supported"),
    **_map_names("dynatemp_exponent", "only for dynatemp_range, which is not supported"),
    **_map_names("xtc_threshold", "only for xtc_probability, which is not supported"),
    **_map_names(
        "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers",
        "only for dry_multiplier, which is not supported",
    ),
    **_map_names("store metadata", "these routes do not store responses; /v1/responses stores and returns both"),
    **_map_names(
        "user safety_identifier service_tier",
        "they name the user and the price; the response's service_tier is `default`",
    ),
    **_map_names(
        "prompt_cache_key prompt_cache_retention prompt_cache_options",
        "the prefix cache finds computed prompts by their tokens",
    ),
    **_map_names("verbosity", "a hint for OpenAI's own models"),
    **_map_names("keep_alive", "the model stays loaded until the server stops (Ollama)"),
    **_map_names(
        "truncate shift",
        "a prompt that is too long is refused; an answer that reaches the end of the context is truncated (Ollama)",
    ),
    **_map_names("num_ctx", "the server sets the context length (--max-context)"),
    **_map_names(
        "num_batch num_gpu main_gpu num_thread numa use_mmap use_mlock low_vram f16_kv",
        "options of Ollama's model runner",
    ),
    **_map_names("vocab_only logits_all embedding_only num_gqa draft_num_predict", "options of Ollama's model runner"),
}
# prefixes of ignored names -> reason
PREFIXES = {"speculative.": "speculative decoding does not change the answer (llama.cpp)"}

REFUSED: dict[str, RefusedParameter] = {
    **_map_names("use_beam_search", RefusedParameter("there is no beam search")),
    **_map_names("bad_words allowed_token_ids", RefusedParameter("use logit_bias, or a grammar")),
    **_map_names(
        "logits_processors logits_processor_args custom_logit_processor vllm_xargs",
        RefusedParameter("requests cannot run code"),
    ),
    **_map_names("custom_params", RefusedParameter("there are no custom logits processors")),
    **_map_names("prompt_logprobs", RefusedParameter("use echo with logprobs at /v1/completions")),
    **_map_names(
        "return_token_ids return_tokens return_hidden_states return_meta_info",
        RefusedParameter("responses do not include it"),
    ),
    **_map_names(
        "thinking_budget thinking_token_budget",
        RefusedParameter("the length of reasoning cannot be limited; reasoning_effort may shorten it"),
    ),
    **_map_names("documents", RefusedParameter("put them into a message")),
    **_map_names(
        "separate_reasoning parse_tool_calls",
        RefusedParameter("reasoning and tool calls are always separated from the text", (True,)),
    ),
    **_map_names(
        "reasoning_format", RefusedParameter("reasoning is returned in a separate field", ("auto", "deepseek"))
    ),
    **_map_names(
        "reasoning_in_content thinking_forced_open", RefusedParameter("reasoning is returned in a separate field")
    ),
    **_map_names("stop_regex", RefusedParameter("use stop or stop_token_ids")),
    **_map_names("guided_whitespace_pattern", RefusedParameter("the grammar determines the white space in JSON")),
    **_map_names("repetition_detection", RefusedParameter("use repetition_penalty")),
    **_map_names(
        "reasoning_budget thinking_budget_tokens", RefusedParameter("the length of reasoning cannot be limited", (-1,))
    ),
    **_map_names("prompt_embeds input_embeds session_params", RefusedParameter("send the text, or its tokens")),
    **_map_names(
        "grammar ebnf",
        RefusedParameter("grammars in llama.cpp's and SGLang's formats are not supported; use structured_outputs"),
    ),
    **_map_names(
        "lora_path lora_request",
        RefusedParameter("use the adapter's name as the model; /v1/load_lora_adapter loads an adapter"),
    ),
    **_map_names("mirostat", RefusedParameter("use temperature, top_p or min_p", (0,))),
    **_map_names(
        "dynatemp_range xtc_probability dry_multiplier", RefusedParameter("use temperature, top_p or min_p", (0,))
    ),
    **_map_names("top_n_sigma", RefusedParameter("use temperature, top_p or min_p", (-1, 0))),
    **_map_names("adaptive_target", RefusedParameter("use temperature, top_p or min_p", (-1,))),
    **_map_names("tfs_z", RefusedParameter("use temperature, top_p or min_p", (1,))),
    **_map_names("top_a", RefusedParameter("use temperature, top_p or min_p", (0,))),
    **_map_names(
        "samplers sampler_seq", RefusedParameter("the order is: penalties, temperature, top_k, top_p, min_p, typical_p")
    ),
    **_map_names("min_keep", RefusedParameter("sampling filters keep at least one token", (0, 1))),
    **_map_names("n_probs", RefusedParameter("use logprobs", (0,))),
    **_map_names(
        "post_sampling_probs", RefusedParameter("log probabilities are the model's, before any sampling parameter")
    ),
    **_map_names("n_indent", RefusedParameter("there is no min indentation of lines", (0,))),
    **_map_names("t_max_predict_ms t_max_prompt_ms", RefusedParameter("use max_tokens", (0, -1))),
    **_map_names("penalize_newline", RefusedParameter("a newline is penalized like any other token", (True,))),
    **_map_names(
        "rope_frequency_base rope_frequency_scale", RefusedParameter("the model sets its rotary embedding", (0,))
    ),
    **_map_names("input_extra multimodal_data", RefusedParameter("this is a text model")),
}

ALIASES = {  # other name -> our name, on the routes that have a field of our name
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "max_tokens": "num_predict",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "json_schema": "guided_json",
    "regex": "guided_regex",
}


def note_ignored(name: str) -> None:
    """Records a parameter of the current request that has no effect; a header of the response lists them."""
    noted = IGNORED_BY_REQUEST.get()
    if noted is not None and name not in noted:
        noted.append(name)


def ignored_name(name: str) -> str | None:
    """Returns the name under which an ignored parameter is listed: its own or its prefix; None if it is not ignored."""
    return name if name in IGNORED else next((f"{prefix}*" for prefix in PREFIXES if name.startswith(prefix)), None)


def select_fields(cls: Any, data: Any) -> Any:
    """Selects the fields of a route from a request body; a pydantic "before" validator.

    Ignored parameters are recorded and removed, aliases are renamed. A field of the route that is also in the table of
    ignored parameters is only validated and is recorded as ignored, unless `cls.effective` names it.

    Args:
        cls: the model of the request.
        data: the request body.

    Raises:
        PydanticCustomError: a parameter is refused, or a parameter and its alias have different values.
    """
    if not isinstance(data, Mapping):
        return data
    fields, selected = cls.model_fields, {}
    for name, value in data.items():
        ignored_as = ignored_name(name)
        if ignored_as and value is not None and name not in cls.effective:
            note_ignored(ignored_as)
        if name in fields or any(name == field.alias for field in fields.values()):
            selected[name] = value
        elif ALIASES.get(name) in fields:
            _add_alias(selected, data, name, value)
        elif name in REFUSED:
            _refuse(name, value)
        elif not ignored_as:
            selected[name] = value
    return selected


def _add_alias(selected: dict[str, Any], data: Mapping[str, Any], name: str, value: Any) -> None:
    """Adds a parameter under our name. Raises an error if both names are set to different values."""
    canonical = ALIASES[name]
    if data.get(canonical) is not None and value is not None and data[canonical] != value:
        raise PydanticCustomError(
            "parameter",
            "{name} and {ours} are the same parameter, but have different values",
            {"name": name, "ours": canonical},
        )
    if name == "n_predict" and value in (-1, -2):  # no limit, in llama.cpp
        return
    selected[canonical] = value if value is not None else data.get(canonical)


def _refuse(name: str, value: Any) -> None:
    """Raises an error for a refused parameter unless its value is empty or neutral; 1 and true are different values."""
    parameter = REFUSED[name]
    if not any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in (*EMPTY_VALUES, *parameter.neutral_values)
    ):
        raise PydanticCustomError(
            "parameter", "{name}: this server does not support it: {why}", {"name": name, "why": parameter.reason}
        )
