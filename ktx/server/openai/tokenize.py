"""/tokenize, /detokenize and /tokenizer_info, in vLLM's format, which lm-eval uses."""

from __future__ import annotations

from typing import Any

from ktx.engine.sampler import SamplingParams
from ktx.server.errors import APIError
from ktx.server.openai.chat import to_template_message
from ktx.server.preprocess import ChatInput, build_engine_input
from ktx.server.protocol.openai import DetokenizeRequest, TokenizeRequest
from ktx.server.state import LoadedModel
from ktx.server.worker_threads import RENDER_THREADS, RENDER_TIMEOUT_S, run_with_timeout


async def tokenize(model: LoadedModel, fields: TokenizeRequest) -> dict[str, Any]:
    """Returns the token ids of a text, or of the prompt that a chat request with these messages would have, with
    their number (vLLM's /tokenize).
    """
    engine = model.engine
    if fields.messages is not None:
        chat = ChatInput(
            messages=[to_template_message(message) for message in fields.messages],
            tools=[tool.model_dump(exclude_none=True) for tool in fields.tools or ()],
            template_kwargs=fields.template_kwargs,
            add_generation_prompt=fields.add_generation_prompt is not False,
            continue_final_message=fields.continues,
            template=fields.chat_template,
        )
        ids = (await build_engine_input(model, chat, SamplingParams())).rendered.ids
    else:
        special = fields.add_special_tokens is not False
        ids = await run_with_timeout(
            RENDER_TIMEOUT_S,
            RENDER_THREADS,
            "the text",
            lambda: list(engine.tokenizer(fields.prompt, add_special_tokens=special)["input_ids"]),
        )
    token_strs = (
        {"token_strs": engine.tokenizer.convert_ids_to_tokens(ids)}
        if fields.return_token_strs
        else {"token_strs": None}
    )
    return {"count": len(ids), "max_model_len": engine.context, "tokens": ids, **token_strs}


async def detokenize(model: LoadedModel, fields: DetokenizeRequest) -> dict[str, Any]:
    """Returns the text of token ids. Raises APIError (400) for an id outside of the vocabulary."""
    engine = model.engine
    vocabulary = engine.model.config.vocab_size
    if invalid := [token for token in fields.tokens if token >= vocabulary]:
        raise APIError(400, f"the model has {vocabulary} tokens, so {invalid[0]} in tokens is not a token id", "tokens")
    text = await run_with_timeout(
        RENDER_TIMEOUT_S,
        RENDER_THREADS,
        "the text",
        lambda: engine.tokenizer.decode(fields.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    )
    return {"prompt": text}


def tokenizer_info(model: LoadedModel) -> dict[str, Any]:
    """Returns the tokenizer's class, special tokens, sizes and chat template, for /tokenizer_info."""
    tokenizer = model.engine.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: getattr(tokenizer, name, None) for name in names},
        **{f"{name}_id": getattr(tokenizer, f"{name}_id", None) for name in names},
        "vocab_size": len(tokenizer),
        "model_max_length": model.engine.context,
        "chat_template": model.prompts.template,
    }
