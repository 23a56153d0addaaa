"""Outputs that every family can write, in its own writing."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case
from tests.support.call_samples import WRITINGS, Arguments, dumps

PARIS: Arguments = {"city": "Paris"}
ROME: Arguments = {"city": "Rome", "days": 3}

# a title and arguments that must come through exactly
ARGUMENTS: tuple[tuple[str, str, Arguments], ...] = (
    ("one string", "weather", PARIS),
    ("a string and a number", "weather", ROME),
    ("no arguments", "now", {}),
    ("nested objects", "search", {"filters": {"a": {"b": [1, {"c": None}]}, "d": {}}}),
    ("a list of strings", "search", {"query": "x", "tags": ["a", "b c", ""]}),
    ("an empty list and an empty string", "search", {"query": "", "tags": []}),
    ("True, False and None", "search", {"query": "q", "exact": True, "filters": {"x": False, "y": None}}),
    ("a negative float", "search", {"query": "q", "limit": -12.5}),
    ("null for a number", "search", {"query": "q", "limit": None}),
    ("other scripts and emoji", "weather", {"city": "São Paulo 東京 Москва 🌧️👩‍👩‍👧"}),
    ("a number as a string", "weather", {"city": "75001", "days": 2}),
    ("a string that reads like JSON", "write", {"path": "a.json", "content": '{"a": [1, true]}'}),
    ("quotes and backslashes", "write", {"path": "C:\\temp\\x", "content": 'she said "no", it\'s \\n fine'}),
    ("several lines", "write", {"path": "a.py", "content": "def f():\n\treturn 1\n\n\nprint(f())"}),
    ("HTML", "write", {"path": "i.html", "content": '<html><body class="x">a < b && c > d</body></html>'}),
    ("a code block", "write", {"path": "r.md", "content": "# T\n```python\nx = {1}\n```\nend"}),
    ("brackets that do not match", "write", {"path": "x", "content": "}}]]{{[[ ((  >>> <<<"}),
    ("think tags", "write", {"path": "x", "content": "<think>a</think> [THINK]"}),
    ("a long string", "write", {"path": "long", "content": "word " * 700 + "end"}),
)


def shared(family: str) -> list[Case]:
    """The family's share."""
    w = WRITINGS[family]

    def call(name: str, arguments: Arguments, n: int = 0) -> Call:
        return Call(name, dumps(arguments), f"functions.{name}:{n}" if w.ids else "")

    paris = call("weather", PARIS)
    one = w.calls(("weather", PARIS))
    two = w.calls(("weather", PARIS), ("weather", ROME))
    both = paris, call("weather", ROME, 1)
    cases = [
        case("an answer", w.say("Hello there.\n\nHow are you?"), "Hello there.\n\nHow are you?"),
        case("an answer in other scripts", w.say("你好，世界！ Ω≈ç 🙂‍↕️"), "你好，世界！ Ω≈ç 🙂‍↕️"),
        case("nothing", ""),
        case("an answer with angle brackets", w.say("if a<b and c>d: <b>bold</b> <"), "if a<b and c>d: <b>bold</b> <"),
        case("JSON that is no call", w.say('Use {"name": 1} or [1, 2].'), 'Use {"name": 1} or [1, 2].'),
        case("thought and answer", w.thought("Hm.\nSo.") + w.say("Yes."), Think("Hm.\nSo."), "Yes."),
        case("thought about tags", w.thought("a <b> < [x] {") + w.say("Yes."), Think("a <b> < [x] {"), "Yes."),
        case("an empty thought", w.thought("") + w.say("Yes."), "Yes."),
        case("a thought that is cut", w.think[0] + "and so", Think("and so"), cut=True),
        case("a thought that ends with the stream", w.think[0] + "and so", Think("and so")),
        case("thought and call", w.thought("Look.") + one, Think("Look."), paris),
        case("thought and two calls", w.thought("Look.") + two, Think("Look."), *both),
        case("text and call", w.say("Let me look.") + "\n\n" + one, "Let me look.", paris),
        case("white space before a call", "\n\n" + one, paris),
        case("white space behind a call", one + "\n \n", paris),
        case("text behind a call", one + "\n\n" + w.say("Done."), paris, "Done."),
        case("two calls", two, *both),
        case("two runs of calls", one + "\n" + w.calls(("weather", ROME)), paris, call("weather", ROME, 0)),
        case("text between calls", one + "\n" + w.say("And:") + "\n" + one, paris, "And:", paris),
        case("a function that is not among the tools", w.calls(("unknown", {"a": 1})), call("unknown", {"a": 1})),
        case("an answer that is cut", w.say("Hello th")[: len(w.answer) + 8], "Hello th", cut=True),
    ]
    cases += [case(title, w.calls((name, args)), call(name, args)) for title, name, args in ARGUMENTS]
    if w.json:
        said = {"path": "x", "content": "".join(w.marks) + '{"name": "weather"}' + w.calls(("now", {}))}
        cases.append(case("the family's own marks in a string", w.calls(("write", said)), call("write", said)))
    if family == "kimi-k2":
        cases.append(case("a call in a thought", w.think[0] + "Look.\n" + one, Think("Look."), paris))
    elif family == "gpt-oss":  # a call is a message of its own
        cases.append(case("a call behind a thought", w.think[0] + "Look.\n" + one, Think("Look."), paris))
    else:
        thought = "Look.\n" + one.strip()
        cases += [
            case("a call in a thought", w.think[0] + thought, Think(thought)),
            case("a call in a thought that is closed", w.thought(thought) + w.say("Yes."), Think(thought), "Yes."),
            case("a call in a thought, then one behind it", w.thought(thought) + one, Think(thought), paris),
        ]
    if family != "gpt-oss":
        text = w.say("Let me look.") + "\n\n" + one + "\n" + w.say("Done now!")
        cases.append(case("text around a call", text, "Let me look.", paris, "\n\n\nDone now!"))
    if family not in ("gpt-oss", "llama-3", "llama-4"):  # bare calls begin a line
        text = "Look. " + w.calls(("now", {})) + w.say("So.") + " \n" + one + "\n\n"
        cases.append(case("a space before a call", text, "Look.", call("now", {}), " So.", paris))
    if family != "gpt-oss":
        raw = f"Text {one} more"
        cases.append(case("no tools: calls are text", raw, raw, tools=False))
        cases += _tags(family)
    return cases


def _tags(family: str) -> list[Case]:
    """Reasoning tags that are missing, doubled or only spoken of."""
    opening, closing = (part.strip() for part in WRITINGS[family].think)
    block = f"{opening}\nHm.\n{closing}\n\n"
    return [
        case("the prompt opened the block", f"Hm.\n{closing}\n\nYes.", Think("Hm."), "Yes.", thinking=True),
        case("the prompt opened it, the model too", f"{block}Yes.", Think("Hm."), "Yes.", thinking=True),
        case("opened twice", f"{opening}\n{block}Yes.", Think("Hm."), "Yes."),
        case("closed twice", f"{block}{closing}\nYes.", Think("Hm."), "Yes."),
        case("closed but never opened", f"Hm.\n{closing}\n\nYes.", "Hm.\n\n\nYes."),
        case("closed at once", f"{closing}\n\nYes.", "Yes."),
        case(
            "the answer speaks of tags",
            f"{block}Write {opening}x{closing}!",
            Think("Hm."),
            f"Write {opening}x{closing}!",
        ),
        case(
            "the thought speaks of tags",
            f"{opening}So {opening} opens.{closing}Yes.",
            Think(f"So {opening} opens."),
            "Yes.",
        ),
        case("half a tag at the end", f"{block}a {opening[:-1]}", Think("Hm."), f"a {opening[:-1]}"),
    ]
