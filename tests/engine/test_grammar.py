"""Answers that follow a grammar, and grammars that nobody should have to follow."""

from __future__ import annotations

import json
import re
import time

import pytest

import ktx
from ktx.engine.grammar import GrammarCompiler, regex_grammar, schema_grammar
from ktx.engine.request import Finished, TokenEvent
from ktx.engine.sampler import SamplingParams
from ktx.errors import UsageError
from tests.support.tiny_chat_model import write_model

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("grammar") / "m")
    model, _ = ktx.load(folder, folder / "model.gguf", progress=False)
    with model.ktx.engine(max_batch_size=8) as made:
        yield made


@pytest.fixture(scope="module")
def grammars(engine):
    return GrammarCompiler(engine.tokenizer, engine.model.config.vocab_size, sorted(engine.stop_ids))


def answered(engine, constraint, **settings):
    heard, done = [], []
    engine.submit(
        [9, 10, 11], SamplingParams(**{"max_new_tokens": 300, "temperature": 1.0, **settings}), heard.append, constraint
    )
    while not done:
        time.sleep(0.001)
        done = [event for event in heard if isinstance(event, Finished)]
    return "".join(event.text for event in heard if isinstance(event, TokenEvent | Finished)), done[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_random_model_answers_in_the_schema(engine, grammars, seed):
    text, done = answered(engine, grammars.compile(schema_grammar(SCHEMA)), seed=seed)
    assert done.reason == "stop"
    value = json.loads(text)
    assert set(value) == {"name", "age"} and 0 <= value["age"] <= 150 and len(value["name"]) <= 12


@pytest.mark.parametrize("pattern", [r"[a-c]{3,5}-\d+/x", r"(yes|no)\n?", "é+"])
def test_or_as_the_expression_says(engine, grammars, pattern):
    text, done = answered(engine, grammars.compile(regex_grammar(pattern)), seed=1, logit_bias={2: 5.0})
    assert done.reason == "length" or re.fullmatch(pattern, text)


def test_an_object_of_as_many_members_as_are_read(engine, grammars):
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer", "minimum": i} for i in range(660)}}
    text, done = answered(engine, grammars.compile(schema_grammar(schema)), max_new_tokens=40, seed=3)
    assert done.reason in ("stop", "length") and text.startswith("{")


BEYOND = "(?:a?){500}a{500}"  # more than the parser keeps in mind, which shows only once tokens come


def test_what_goes_beyond_the_parser_is_the_requests_fault(engine, grammars):
    _, done = answered(engine, grammars.compile(regex_grammar(BEYOND)))
    assert (done.reason, done.client_error) == ("error", True) and "cannot be followed any further" in done.error
    text, done = answered(engine, grammars.compile(regex_grammar("yes|no")))
    assert text in ("yes", "no")


def test_lark_rules(engine, grammars):
    text, done = answered(engine, grammars.compile('start: "a" other\nother: /[xy]{2}/'))
    assert re.fullmatch("a[xy]{2}", text) and done.reason == "stop"


def test_any_object(engine, grammars):
    text, done = answered(engine, grammars.compile(schema_grammar(True)), max_new_tokens=400, logit_bias={2: 50.0})
    assert done.reason == "length" or isinstance(json.loads(text), dict)


def test_the_rules_begin_behind_a_mark(engine, grammars):
    constraint = grammars.compile(regex_grammar("[0-9]{3}"), after="</think>")
    end = engine.tokenizer.convert_tokens_to_ids("</think>")
    assert constraint.mask() is None
    constraint.accept(100)
    assert constraint.mask() is None
    constraint.accept(end)
    assert engine.tokenizer.decode(constraint.mask().nonzero()[:, 0].tolist()).isdigit()


def test_one_that_breaks_the_rules_fails_alone(engine, grammars):
    class Wild:
        ended = False

        def mask(self):
            raise ValueError("no way on")

    assert answered(engine, Wild())[1].reason == "error"
    assert answered(engine, None, max_new_tokens=2)[1].reason in ("length", "stop")


DEEP = {"type": "object"}
for _ in range(100):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
HOSTILE = {
    "deep": DEEP,
    "wide": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(5000)}},
    "enum": {"enum": [f"value {i}" for i in range(100_000)]},
    "remote": {"$ref": "https://example.com/schema.json"},
    "file": {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
    "list": [],
    "text": "object",
    "pattern": {"type": "string", "pattern": "(" * 500},
    "counted": {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    "none": {"type": "nothing"},
    "circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "impossible": {"type": "integer", "minimum": 5, "maximum": 1},
}


HARMLESS = {"counted"}  # odd, but llguidance follows it


def refused(make, harmless=False):
    """What is hostile is refused in two seconds; what only looks so can be followed in as many."""
    start = time.monotonic()
    try:
        constraint = make()
        for _ in range(5):
            constraint.accept(int(constraint.mask().nonzero()[0]))
        assert harmless, "not refused"
    except UsageError:
        pass
    assert time.monotonic() - start < 2


@pytest.mark.wall_clock
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_in_time(grammars, name):
    refused(lambda: grammars.compile(schema_grammar(HOSTILE[name])), name in HARMLESS)


@pytest.mark.wall_clock
@pytest.mark.parametrize(
    "rules",
    [
        "(" * 60_000,
        "start: " + "(" * 2000 + '"a"' + ")" * 2000,
        "start: start",
        "",
        "x" * 300_000,
        "\x00",
        "start: /a" + "{1,999}" * 20 + "/",
    ],
    ids=range(7),
)
def test_and_so_are_hostile_rules(grammars, rules):
    refused(lambda: grammars.compile(rules), "999" in rules)


@pytest.mark.wall_clock
@pytest.mark.parametrize("pattern", ["[", "(" * 3000, "(?=x)y", r"(a)\1", "(((a+)+)+)+$", "a{1,100000}{1,100000}"])
def test_and_hostile_expressions(grammars, pattern):
    refused(lambda: grammars.compile(regex_grammar(pattern)), "a" in pattern and "(a)" not in pattern)
