"""The scripted backend: the engine as it is, a script in the place of the model."""

from __future__ import annotations

import json
import time

import pytest

from ktx.engine.engine import Options
from ktx.engine.request import Finished
from ktx.engine.sampler import SamplingParams
from ktx.errors import BadFile
from tests.support.scripted_engine import read_script, scripted_engine
from tests.support.tiny_chat_model import tokenizer

TOK = tokenizer()


def said(engine, *prompts, **settings):
    done = {i: e for i, e in engine.generate(prompts, SamplingParams(**settings)) if isinstance(e, Finished)}
    return [TOK.decode(done[i].ids) for i in range(len(prompts))]


def test_it_says_what_it_is_told(tmp_path):
    path = tmp_path / "script.json"
    path.write_text(json.dumps([{"match": "hello", "text": "Good day!"}, {"match": "ids", "ids": [100, 101]}]))
    with scripted_engine(TOK, Options(), read_script(path, TOK)) as engine:
        assert said(engine, "say hello", "ids", "other words") == ["Good day!", TOK.decode([100, 101]), "other words"]
        assert said(engine, "hello " * 300, max_new_tokens=4) == ["Good"]
        engine.check_integrity()


def test_many_at_once_in_a_small_cache_hear_their_own():
    prompts = [f"request {i} " + "x" * (i * 13 % 90) for i in range(40)]
    with scripted_engine(TOK, Options(kv_cache_tokens=512, max_batch_size=4), read_script(None, TOK)) as engine:
        assert said(engine, *prompts) == [prompt[-64:] for prompt in prompts]
        engine.check_integrity()


@pytest.mark.wall_clock
def test_the_pace_is_kept():
    with scripted_engine(TOK, Options(), read_script(None, TOK), seconds=0.01) as engine:
        start = time.monotonic()
        said(engine, "0123456789")
        assert 0.18 < time.monotonic() - start < 2


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[{"match": "x"}]', '["x"]'])
def test_what_is_no_script_is_told(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(BadFile, match="is not a script"):
        read_script(tmp_path / "s.json", TOK)
    with pytest.raises(BadFile, match="cannot be read"):
        read_script(tmp_path / "none.json", TOK)
