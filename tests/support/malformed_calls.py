"""Arguments as models spoil them, in every family's call."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, case
from tests.support.call_samples import WRITINGS

WHOLE = '{"city": "Paris"}'

# what stands where the JSON of arguments belongs, and the JSON that is meant
MENDED: tuple[tuple[str, str, str], ...] = (
    ("space inside", '{ "city" :  "Paris" }', '{ "city" :  "Paris" }'),
    ("over several lines", '{\n  "city": "Paris",\n  "days": 2\n}', '{\n  "city": "Paris",\n  "days": 2\n}'),
    ("Python's quotes", "{'city': 'Paris'}", WHOLE),
    (
        "Python's quotes around others",
        """{'city': 'the "big" one', "days": 1}""",
        '{"city": "the \\"big\\" one", "days": 1}',
    ),
    ("an escaped Python quote", r"""{'city': 'L\'Aquila'}""", """{"city": "L'Aquila"}"""),
    ("Python's words", '{"a": True, "b": False, "c": None}', '{"a": true, "b": false, "c": null}'),
    ("a comma too many", '{"city": "Paris",}', WHOLE),
    ("a comma too many in a list", '{"tags": ["a", "b", ]}', '{"tags": ["a", "b"]}'),
    ("keys without quotes", '{city: "Paris", days: 2}', '{"city": "Paris", "days": 2}'),
    ("numbers for keys", "{1: 'a', 2.5: None}", '{"1": "a", "2.5": null}'),
    ("a line break in a string", '{"city": "Pa\nris"}', '{"city": "Pa\\nris"}'),
    ("a tab in a string", '{"city": "Pa\tris"}', '{"city": "Pa\\tris"}'),
    ("a stray backslash", r'{"city": "\d+\s"}', r'{"city": "\\d+\\s"}'),
    ("escapes of characters", r'{"city": "M\u00fcnchen \ud83d\ude00"}', r'{"city": "M\u00fcnchen \ud83d\ude00"}'),
    ("half an escape", r'{"city": "\u12 x"}', r'{"city": "\\u12 x"}'),
    ("numbers as people write them", '{"a": +1, "b": .5, "c": 1., "d": 007}', '{"a": 1, "b": 0.5, "c": 1.0, "d": 7}'),
    ("not a number", '{"a": NaN}', '{"a": null}'),
    ("an exponent", '{"a": -1.5e+10}', '{"a": -1.5e+10}'),
    ("JSON in a string", r'"{\"city\": \"Paris\"}"', WHOLE),
    ("spoilt JSON in a string", r'"{\"city\": True,}"', '{"city": true}'),
    ("an empty string", '""', "{}"),
    ("null", "null", "{}"),
    ("a bracket forgotten", '{"tags": ["a", "b"}', '{"tags": ["a", "b"]}'),
    ("a brace forgotten inside", '{"filters": {"a": [1, {"b": 2]}}', '{"filters": {"a": [1, {"b": 2}]}}'),
)
# nothing can be made of these; what had been told before that was clear
BROKEN: tuple[tuple[str, str, str | None], ...] = (
    ("no value", '{"city": }', '{"city": '),
    ("a quote in a string", '{"city": "the "big" one"}', '{"city": "the "'),
    ("words for a value", '{"city": Paris of course}', '{"city": '),
    ("no colon", '{"city" "Paris"}', '{"city" '),
    ("two commas", '{"city": "Paris",, "days": 1}', '{"city": "Paris"'),
    ("a list", '["Paris"]', None),
    ("a number", "17", None),
    ("a number that no reader takes", '{"days": ' + "7" * 5000 + "}", '{"days": '),
    ("brackets without end", '{"filters": ' + "[" * 300 + "}", '{"filters": ' + "[" * 127),
)
OPEN = ("a closing brace forgotten", '{"filters": {"a": [1, 2]}', '{"filters": {"a": [1, 2]}}')


def _in_call(family: str, arguments: str, name: str = "weather") -> str:
    w = WRITINGS[family]
    return w.calls((name, {"city": "Paris"})).replace(WHOLE, arguments)


def messy(family: str) -> list[Case]:
    """The family's share, empty for those whose arguments are not JSON."""
    w = WRITINGS[family]
    if WHOLE not in w.calls(("weather", {"city": "Paris"})):
        return []
    id = "functions.weather:0" if w.ids else ""
    cases = [case(title, _in_call(family, text), Call("weather", meant, id)) for title, text, meant in (*MENDED, OPEN)]
    if family in ("deepseek-v3", "deepseek-r1"):  # the line break before the code block's end is inside the object
        cases[-1] = case(OPEN[0], _in_call(family, OPEN[1]), Call("weather", OPEN[2][:-1] + "\n}", id))
    for title, text, told in BROKEN:
        raw = _in_call(family, text)
        if family != "gpt-oss":  # whose text keeps its headers: see its own outputs
            start = () if told is None else (Call("weather", told, id, whole=False),)
            cases.append(case(f"broken: {title}", raw, *start, raw))
    whole = _in_call(family, '{"city": "Par')
    cut = whole[: whole.index('"Par') + 4]
    cases.append(case("cut in a string", cut, Call("weather", '{"city": "Par', id, whole=False), cut=True, open=True))
    cut = whole[: whole.index('"city') + 1]
    cases.append(case("cut in a key", cut, Call("weather", '{"', id, whole=False), cut=True, open=True))
    cut = cut[: cut.index("weather") + 4]
    if family != "gpt-oss":
        cases.append(case("cut in the name", cut, cut, cut=True))
    whole = _in_call(family, WHOLE)
    cases.append(
        case("ended behind the arguments", whole[: whole.index(WHOLE) + len(WHOLE)], Call("weather", WHOLE, id))
    )
    cases.append(
        case("ended before the last brace", whole[: whole.index(WHOLE) + len(WHOLE) - 1], Call("weather", WHOLE, id))
    )
    return cases
