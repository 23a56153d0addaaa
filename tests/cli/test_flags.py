"""Every truth value of every command: alone, with its opposite, with a value, with underscores, in a file of options."""

from __future__ import annotations

import argparse

import pytest

from ktx.__main__ import COMMANDS, build_parser
from ktx.cli.arguments import Flag, Parser, flag

POSITIONAL = {"download": ["owner/name"]}


def parsers():
    """Each command's parser by the words that reach it."""
    top = build_parser()
    found = {}

    def walk(parser, words):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    found[(*words, name)] = inner
                    walk(inner, (*words, name))

    walk(top, ())
    return found


PARSERS = parsers()
FLAGS = [
    (words, names, action.dest)
    for words, parser in PARSERS.items()
    for action in parser._actions
    if isinstance(action, Flag)
    for names in [[name for name in action.option_strings if name.startswith("--")]]
]


def value(words, dest, *more):
    return getattr(build_parser().parse_args([*words, *more, *POSITIONAL.get(words[-1], [])]), dest)


def test_every_command_has_some_and_none_is_of_another_kind():
    assert {words[0] for words, _, _ in FLAGS} == set(COMMANDS)
    for words, parser in PARSERS.items():
        for action in parser._actions:
            plain = isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction)
            loose = isinstance(action.default, bool) and not isinstance(action, Flag)
            assert not plain and not loose, (words, action.option_strings)


@pytest.mark.parametrize("words,names,dest", FLAGS, ids=lambda part: part if isinstance(part, str) else part[0])
def test_a_truth_value(words, names, dest):
    given, other = names[0], names[-1]
    assert other == (f"--{given[5:]}" if given.startswith("--no-") else f"--no-{given[2:]}")
    for name, sense in ((given, True), (other, False)):
        for spelt in (name, "--" + name[2:].replace("-", "_")):
            for more, wanted in (
                ((spelt,), sense),
                ((spelt, "true"), sense),
                ((spelt, "false"), not sense),
                ((f"{spelt}=true",), sense),
                ((f"{spelt}=off",), not sense),
                ((spelt, "NO"), not sense),
                ((other, spelt), sense),  # the last one counts
                ((spelt, "--debug"), sense if dest != "debug" else True),
            ):
                assert value(words, dest, *more) is wanted, more
            with pytest.raises(SystemExit) as end:
                value(words, dest, f"{spelt}=maybe")
            assert end.value.code == 2


@pytest.mark.parametrize("name,dest", [("prefix-cache", "no_prefix_cache"), ("cuda-graphs", "no_cuda_graphs")])
def test_no_and_false_undo_each_other(name, dest):
    for more, off in (
        ([], False),
        ([f"--no-{name}"], True),
        ([f"--no-{name}", "false"], False),
        ([f"--no-{name}", "true"], True),
        ([f"--{name}"], False),
        ([f"--{name}", "false"], True),
        ([f"--{name}", "true"], False),
    ):
        assert value(("serve",), dest, *more) is off, more
        if name == "cuda-graphs":
            assert value(("chat",), dest, *more) is off


def test_a_flag_takes_no_positional_argument():
    args = build_parser().parse_args(["download", "--dry-run", "owner/name"])
    assert args.dry_run and args.repo == "owner/name"
    args = build_parser().parse_args(["download", "owner/name", "--no-dry-run", "--debug"])
    assert not args.dry_run and args.debug


def test_a_word_that_is_no_truth_value_is_told(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--force_think", "maybe"])
    assert "must be true or false, found 'maybe'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key,said,off",
    [
        ("no_prefix_cache", "true", True),
        ("no-prefix-cache", "false", False),
        ("prefix_cache", "false", True),
        ("prefix-cache", "yes", False),
    ],
)
def test_a_file_of_options_says_it_too(key, said, off, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(f"{key}: {said}\nhide_input: false\n")
    args = build_parser().parse_args(["serve", "--config", str(file)])
    assert args.no_prefix_cache is off and args.hide_input is False
    file.write_text(f"{key}: perhaps\n")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--config", str(file)])


def test_help_names_both():
    parser = Parser(prog="x")
    flag(parser, "--no-it", help="without it")
    flag(parser, "--that", help="that", default=True)
    told = parser.format_help()
    assert all(name in told for name in ("--no-it", "--it", "--that", "--no-that"))
    assert parser.parse_args([]).no_it is False and parser.parse_args([]).that is True
    assert parser.parse_args(["--no-that"]).that is False
