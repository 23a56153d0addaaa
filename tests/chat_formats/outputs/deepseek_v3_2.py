"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case

PARIS = '{"city": "Paris"}'
CITY = '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'

CASES: list[Case] = [
    case("no outer mark", f'<｜DSML｜invoke name="weather">\n{CITY}</｜DSML｜invoke>', Call("weather", PARIS)),
    case("no end marks", f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n{CITY}', Call("weather", PARIS)),
    case(
        "nothing said of strings",
        '<｜DSML｜invoke name="weather"><｜DSML｜parameter name="city">7</｜DSML｜parameter></｜DSML｜invoke>',
        Call("weather", '{"city": "7"}'),
    ),
    case(
        "a string of an unknown function",
        '<｜DSML｜invoke name="f"><｜DSML｜parameter name="x" string="true">7</｜DSML｜parameter></｜DSML｜invoke>',
        Call("f", '{"x": "7"}'),
    ),
    case(
        "a number of an unknown function",
        '<｜DSML｜invoke name="f"><｜DSML｜parameter name="x" string="false">7</｜DSML｜parameter></｜DSML｜invoke>',
        Call("f", '{"x": 7}'),
    ),
    case("the mark spoken of", "Begin with <｜DSML｜function_calls> so.", "Begin with <｜DSML｜function_calls> so."),
    case(
        "a call in the thought",
        '<think>Hm.\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        Think(
            'Hm.\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
        ),
    ),
    case(
        "cut in a value",
        '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Par',
        Call("weather", '{"city": "Par', whole=False),
        cut=True,
        open=True,
    ),
]
