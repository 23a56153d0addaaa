"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them and lm-eval asks for them."""

from __future__ import annotations

from typing import Any

from ktx.server.asked import Talk, asked_of, sampling_of
from ktx.server.chat import message_of
from ktx.server.errors import Problem
from ktx.server.fields.openai import Detokenize, Tokenize
from ktx.server.pools import PROMPTS, RENDER, within
from ktx.server.served import Served


async def tokenize(served: Served, fields: Tokenize) -> dict[str, Any]:
    engine, _, _ = served.ready()
    if fields.model is not None:
        served.named(fields.model)
    if fields.messages is not None:
        talk = Talk(
            [message_of(message) for message in fields.messages],
            [tool.model_dump(exclude_none=True) for tool in fields.tools or ()],
            words=fields.words,
            answer=fields.add_generation_prompt is not False,
            proceed=fields.proceeds,
            template=fields.chat_template,
        )
        ids = (await asked_of(served, talk, sampling_of(served, {}, 1))).rendered.ids
    else:
        special = fields.add_special_tokens is not False
        ids = await within(
            RENDER,
            PROMPTS,
            "the text",
            lambda: list(engine.tokenizer(fields.prompt, add_special_tokens=special)["input_ids"]),
        )
    words = (
        {"token_strs": engine.tokenizer.convert_ids_to_tokens(ids)}
        if fields.return_token_strs
        else {"token_strs": None}
    )
    return {"count": len(ids), "max_model_len": engine.context, "tokens": ids, **words}


async def detokenize(served: Served, fields: Detokenize) -> dict[str, Any]:
    engine, _, _ = served.ready()
    if fields.model is not None:
        served.named(fields.model)
    vocabulary = engine.model.config.vocab_size
    if bad := [token for token in fields.tokens if token >= vocabulary]:
        raise Problem(400, f"the model has {vocabulary} tokens, tokens holds {bad[0]}", "tokens")
    text = await within(
        RENDER,
        PROMPTS,
        "the text",
        lambda: engine.tokenizer.decode(fields.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    )
    return {"prompt": text}


def info(served: Served) -> dict[str, Any]:
    engine, prompts, _ = served.ready()
    tokenizer = engine.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: getattr(tokenizer, name, None) for name in names},
        **{f"{name}_id": getattr(tokenizer, f"{name}_id", None) for name in names},
        "vocab_size": len(tokenizer),
        "model_max_length": engine.context,
        "chat_template": prompts.template,
    }
