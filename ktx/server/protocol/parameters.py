"""Parameters that other servers' clients send: which change nothing here, which are refused, and which go by another name.

What is in none of these tables is a field of the route or unknown. A value that says nothing (`nothing`) is taken everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

IGNORED_HEADER = "x-ignored-parameters"
IGNORED_BY_REQUEST: ContextVar[list[str] | None] = ContextVar("ignored_parameters", default=None)  # of the current request
NOTHING: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class RefusedParameter:
    """Would change the answer, and nobody here does it; `nothing`: values that ask for none of it, beside the empty ones."""

    reason: str
    nothing: tuple[Any, ...] = ()


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# what changes no answer -> why
IGNORED: dict[str, str] = {
    **_all("cache_prompt id_slot slot_id n_cache_reuse", "what was computed is found again by itself (llama.cpp)"),
    **_all("n_keep n_discard num_keep", "a context that is full ends the answer, nothing is shifted out of it"),
    **_all("timings_per_token return_progress response_fields", "more numbers beside the answer (llama.cpp)"),
    **_all("priority", "requests run in the order they came (vLLM, SGLang)"),
    **_all("request_id rid", "a client's own id is read from the header x-request-id (vLLM, SGLang)"),
    **_all("data_parallel_rank routed_dp_rank backend_sampling", "where it is computed changes no answer"),
    **_all("kv_transfer_params", "keys and values stay in this process (vLLM)"),
    **_all("mm_processor_kwargs media_io_kwargs", "this is a text model"),
    **_all("guided_decoding_backend", "there is one (vLLM)"),
    **_all("spaces_between_special_tokens", "fast tokenizers write no such spaces, in vLLM neither"),
    **_all("stream_reasoning", "reasoning comes while it is written (SGLang)"),
    **_all("length_penalty early_stopping", "of a beam search, which is refused"),
    **_all("mirostat_tau mirostat_eta", "of mirostat, which is refused"),
    **_all("dynatemp_exponent", "of dynatemp_range, which is refused"),
    **_all("xtc_threshold", "of xtc_probability, which is refused"),
    **_all(
        "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers", "of dry_multiplier, which is refused"
    ),
    **_all("store metadata", "nothing is kept of these routes' answers; /v1/responses keeps and repeats them"),
    **_all("user safety_identifier service_tier", "who asks and at what price; the answer says `default`"),
    **_all(
        "prompt_cache_key prompt_cache_retention prompt_cache_options", "computed prompts are found by their tokens"
    ),
    **_all("verbosity", "a hint to OpenAI's own models"),
    **_all("keep_alive", "the model is loaded as long as the server runs (Ollama)"),
    **_all(
        "truncate shift",
        "a prompt that is too long is refused, an answer that reaches the context's end is cut (Ollama)",
    ),
    **_all("num_ctx", "the context is the server's (--max-context)"),
    **_all("num_batch num_gpu main_gpu num_thread numa use_mmap use_mlock low_vram f16_kv", "how Ollama runs a model"),
    **_all("vocab_only logits_all embedding_only num_gqa draft_num_predict", "how Ollama runs a model"),
}
PREFIXES = {"speculative.": "guesses change no answer (llama.cpp)"}  # that ignored names begin with

REFUSED: dict[str, RefusedParameter] = {
    **_all("use_beam_search", RefusedParameter("beams are not searched")),
    **_all("bad_words allowed_token_ids", RefusedParameter("use logit_bias, or a grammar")),
    **_all(
        "logits_processors logits_processor_args custom_logit_processor vllm_xargs",
        RefusedParameter("no code runs here"),
    ),
    **_all("custom_params", RefusedParameter("parameters of processors, of which none run here")),
    **_all("prompt_logprobs", RefusedParameter("use echo with logprobs at /v1/completions")),
    **_all(
        "return_token_ids return_tokens return_hidden_states return_meta_info",
        RefusedParameter("answers hold none of it"),
    ),
    **_all(
        "thinking_budget thinking_token_budget",
        RefusedParameter("reasoning is not cut; reasoning_effort may shorten it"),
    ),
    **_all("documents", RefusedParameter("put them into a message")),
    **_all(
        "separate_reasoning parse_tool_calls", RefusedParameter("text is not mixed with what was read from it", (True,))
    ),
    **_all("reasoning_format", RefusedParameter("reasoning stands in a field of its own", ("auto", "deepseek"))),
    **_all("reasoning_in_content thinking_forced_open", RefusedParameter("reasoning stands in a field of its own")),
    **_all("stop_regex", RefusedParameter("use stop or stop_token_ids")),
    **_all("guided_whitespace_pattern", RefusedParameter("white space in JSON is the grammar's own")),
    **_all("repetition_detection", RefusedParameter("use repetition_penalty")),
    **_all("reasoning_budget thinking_budget_tokens", RefusedParameter("reasoning is not cut", (-1,))),
    **_all("prompt_embeds input_embeds session_params", RefusedParameter("send the text, or its tokens")),
    **_all("grammar ebnf", RefusedParameter("llama.cpp's and SGLang's grammars are not read; use structured_outputs")),
    **_all(
        "lora_path lora_request",
        RefusedParameter("name the adapter as the request's model; /v1/load_lora_adapter loads one"),
    ),
    **_all("mirostat", RefusedParameter("use temperature, top_p or min_p", (0,))),
    **_all("dynatemp_range xtc_probability dry_multiplier", RefusedParameter("use temperature, top_p or min_p", (0,))),
    **_all("top_n_sigma", RefusedParameter("use temperature, top_p or min_p", (-1, 0))),
    **_all("adaptive_target", RefusedParameter("use temperature, top_p or min_p", (-1,))),
    **_all("tfs_z", RefusedParameter("use temperature, top_p or min_p", (1,))),
    **_all("top_a", RefusedParameter("use temperature, top_p or min_p", (0,))),
    **_all(
        "samplers sampler_seq", RefusedParameter("the order is: penalties, temperature, top_k, top_p, min_p, typical_p")
    ),
    **_all("min_keep", RefusedParameter("cuts leave one token at least", (0, 1))),
    **_all("n_probs", RefusedParameter("use logprobs", (0,))),
    **_all("post_sampling_probs", RefusedParameter("log-probabilities are the model's own, before any setting")),
    **_all("n_indent", RefusedParameter("nothing is known of lines here", (0,))),
    **_all("t_max_predict_ms t_max_prompt_ms", RefusedParameter("use max_tokens", (0, -1))),
    **_all("penalize_newline", RefusedParameter("a line break is a token like others", (True,))),
    **_all("rope_frequency_base rope_frequency_scale", RefusedParameter("rotary tables are the model's", (0,))),
    **_all("input_extra multimodal_data", RefusedParameter("this is a text model")),
}

ALIASES = {  # another name -> ours, on the routes that have ours
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "max_tokens": "num_predict",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "json_schema": "guided_json",
    "regex": "guided_regex",
}


def ignore(name: str) -> None:
    """Notes a parameter of the current request that has no effect: its answer names it in a header."""
    noted = IGNORED_BY_REQUEST.get()
    if noted is not None and name not in noted:
        noted.append(name)


def ignored(name: str) -> str | None:
    """The name that an ignored parameter is told by: its own, or that of its kind. None for one that is not ignored."""
    return name if name in IGNORED else next((f"{prefix}*" for prefix in PREFIXES if name.startswith(prefix)), None)


def known(cls: Any, data: Any) -> Any:
    """A route's fields alone: ignored parameters are noted and left out, aliases get our name, refused ones are errors.

    `cls.model_fields` come first; those of them that are in the table of ignored ones are read for their form only,
    unless `cls.effective` names them.
    """
    if not isinstance(data, Mapping):
        return data
    fields, told = cls.model_fields, {}
    for name, value in data.items():
        without = ignored(name)
        if without and value is not None and name not in cls.effective:
            ignore(without)
        if name in fields or any(name == field.alias for field in fields.values()):
            told[name] = value
        elif ALIASES.get(name) in fields:
            _alias(told, data, name, value)
        elif name in REFUSED:
            _refuse(name, value)
        elif not without:
            told[name] = value
    return told


def _alias(told: dict[str, Any], data: Mapping[str, Any], name: str, value: Any) -> None:
    ours = ALIASES[name]
    if data.get(ours) is not None and value is not None and data[ours] != value:
        raise PydanticCustomError(
            "parameter", "{name} and {ours} are one and say two things", {"name": name, "ours": ours}
        )
    if name == "n_predict" and value in (-1, -2):  # llama.cpp's word for no limit
        return
    told[ours] = value if value is not None else data.get(ours)


def _refuse(name: str, value: Any) -> None:
    refused = REFUSED[name]
    if not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in (*NOTHING, *refused.nothing)
    ):
        raise PydanticCustomError(
            "parameter", "{name}: this server does not offer it: {why}", {"name": name, "why": refused.reason}
        )
