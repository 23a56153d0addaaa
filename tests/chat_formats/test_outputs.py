"""Every output gives what its user wants, whole, character by character, and cut anywhere."""

from __future__ import annotations

import importlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx.chat_formats import CHAT_FORMATS, CallArguments, CallEnd
from tests.chat_formats.cases import TOOLS, Case, parse, wanted
from tests.support.call_cases import shared
from tests.support.call_samples import WRITINGS
from tests.support.malformed_calls import messy


def outputs(family: str) -> list[Case]:
    own = importlib.import_module("tests.chat_formats.outputs." + family.replace("-", "_").replace(".", "_")).CASES
    return (shared(family) + messy(family) if family in WRITINGS else []) + own


CASES = [(family, case) for family in CHAT_FORMATS for case in outputs(family)]
IDS = [f"{family}: {case.title}" for family, case in CASES]


def read(family: str, case: Case, pieces: list[str]):
    return parse(family, pieces, case.thinking, TOOLS if case.tools else (), case.cut)


@pytest.mark.parametrize(("family", "case"), CASES, ids=IDS)
def test_output(family, case):
    events, open_call = read(family, case, [case.text])
    assert events == wanted(case)
    assert open_call == case.open
    assert read(family, case, list(case.text)) == (events, open_call)


@pytest.mark.parametrize("family", CHAT_FORMATS)
def test_cut_anywhere(family):
    cases = outputs(family)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def check(data):
        case = data.draw(st.sampled_from(cases))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(case.text)), max_size=8)))
        ends = [*cuts, len(case.text)]
        pieces = [case.text[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
        assert read(family, case, pieces)[0] == wanted(case)

    check()


@pytest.mark.parametrize(("family", "case"), CASES, ids=IDS)
def test_ended_calls_are_objects(family, case):
    events, _ = read(family, case, [case.text])
    ended = {event.index for event in events if isinstance(event, CallEnd)}
    for event in events:
        if isinstance(event, CallArguments) and event.index in ended:
            assert isinstance(json.loads(event.text), dict)


@pytest.mark.parametrize("family", CHAT_FORMATS)
def test_at_least_forty(family):
    texts = {case.text for case in outputs(family)}
    assert len(texts) >= (40 if family != "plain" else 15)
