"""Every command takes each of its truth values in every form.

Alone, with its opposite, with a value, with underscores, in a file of options.
"""

from __future__ import annotations

import argparse

import pytest

from ktx.__main__ import COMMANDS, build_parser
from ktx.cli.arguments import OLD_OPTIONS, Parser, flag

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
    if isinstance(action, argparse.BooleanOptionalAction)
    for names in [[name for name in action.option_strings if name.startswith("--")]]
]


def value(words, dest, *more):
    return getattr(build_parser().parse_args([*words, *more, *POSITIONAL.get(words[-1], [])]), dest)


def test_every_command_has_some_and_none_is_of_another_kind():
    assert {words[0] for words, _, _ in FLAGS} == set(COMMANDS)
    for words, parser in PARSERS.items():
        for action in parser._actions:
            plain = isinstance(action, argparse._StoreTrueAction | argparse._StoreFalseAction)
            loose = isinstance(action.default, bool) and not isinstance(action, argparse.BooleanOptionalAction)
            assert not plain and not loose, (words, action.option_strings)


@pytest.mark.parametrize("words,names,dest", FLAGS, ids=lambda part: part if isinstance(part, str) else part[0])
def test_a_truth_value(words, names, dest):
    given, other = names[0], names[-1]
    assert names == [given, other] and other == f"--no-{given[2:]}" and not given.startswith("--no-")
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


@pytest.mark.parametrize("name,dest", [("prefix-cache", "prefix_cache"), ("cuda-graphs", "cuda_graphs")])
def test_no_and_false_undo_each_other(name, dest, capsys):
    for more, on, warned in (
        ([], True, ""),
        ([f"--no-{name}"], False, ""),
        ([f"--no-{name}", "false"], True, f"--no-{name} false is written --{name} since ktx 0.2"),
        ([f"--no-{name}", "true"], False, f"--no-{name} true is written --no-{name} since ktx 0.2"),
        ([f"--{name}"], True, ""),
        ([f"--{name}", "false"], False, ""),
        ([f"--{name}", "true"], True, ""),
    ):
        for command in ("serve", "chat") if name == "cuda-graphs" else ("serve",):
            assert value((command,), dest, *more) is on, more
            told = capsys.readouterr().err
            assert warned in told and told.count("\n") == bool(warned)


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
    "key,said,on,warned",
    [
        ("no_prefix_cache", "true", False, "line 1: no_prefix_cache is written prefix_cache: false since ktx 0.2"),
        ("no-prefix-cache", "false", True, "line 1: no-prefix-cache is written prefix_cache: true since ktx 0.2"),
        ("prefix_cache", "false", False, ""),
        ("prefix-cache", "yes", True, ""),
    ],
)
def test_a_file_of_options_says_it_too(key, said, on, warned, tmp_path, capsys):
    file = tmp_path / "serve.yaml"
    file.write_text(f"{key}: {said}\nlog_prompts: true\n")
    args = build_parser().parse_args(["serve", "--config", str(file)])
    assert args.prefix_cache is on and args.log_prompts is True
    told = capsys.readouterr().err
    assert warned in told and told.count("\n") == bool(warned)
    file.write_text(f"{key}: perhaps\n")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--config", str(file)])


def test_help_names_both():
    parser = Parser(prog="x")
    flag(parser, "--it", help="with it", default=True)
    flag(parser, "--that", help="that", default=True)
    told = parser.format_help()
    assert all(name in told for name in ("--no-it", "--it", "--that", "--no-that"))
    assert parser.parse_args([]).it is True and parser.parse_args([]).that is True
    assert parser.parse_args(["--no-it"]).it is False
    assert parser.parse_args(["--no-that"]).that is False


OLD_VALUES = {  # an old option -> its value, the name in the namespace, and what that holds then
    "--dtype": ("int4", "quantize", "int4"),
    "--moe-dtype": ("int8", "quantize_experts", "int8"),
    "--cache-dir": ("there", "packed_cache_dir", "there"),
    "--moe-experts": ("3", "num_experts_per_tok", 3),
    "--stream-experts": ("64", "stream_experts_min_tokens", "64"),
    "--shared-device": ("cuda", "shared_expert_device", "cuda"),
    "--hide-input": ("false", "log_prompts", True),
    "--no-hide-input": ("true", "log_prompts", True),
    "--keep-responses": ("7", "max_stored_responses", 7),
}


@pytest.mark.parametrize("old", OLD_OPTIONS)
def test_an_old_option_is_the_new_one_and_warns(old, capsys, tmp_path):
    text, dest, wanted = OLD_VALUES[old]
    new = "--log-prompts" if dest == "log_prompts" else OLD_OPTIONS[old]
    for words in ([old, text], [f"{old}={text}"], ["--" + old[2:].replace("-", "_"), text]):
        assert value(("serve",), dest, *words) == wanted
        told = capsys.readouterr().err
        assert f"{words[0].partition('=')[0]} is called {new} since ktx 0.2" in told and told.count("\n") == 1
    file = tmp_path / "serve.yaml"
    file.write_text(f"\n{old[2:].replace('-', '_')}: {text}\n")
    assert value(("serve",), dest, "--config", str(file)) == wanted
    told = capsys.readouterr().err
    assert f"line 2: {old[2:].replace('-', '_')} is written {dest}" in told and told.count("\n") == 1


def test_old_options_are_in_no_help_and_only_where_the_new_ones_are(capsys):
    for words, parser in PARSERS.items():
        names = [name for action in parser._actions for name in action.option_strings]
        assert not {*names} & {*OLD_OPTIONS}, words
    with pytest.raises(SystemExit):
        build_parser().parse_args(["doctor", "--dtype", "int4"])
    assert "unrecognized arguments: --dtype" in capsys.readouterr().err


def test_names_of_ktransformers_warn_of_nothing(capsys):
    words = "--model_path m --gguf_path w --optimize_config_path r --cpu_infer 2 --max_new_tokens 9 --cache_lens 512"
    args = build_parser().parse_args(
        ["serve", *words.split(), "--force_think", "true", "--backend_type", "ktransformers"]
    )
    assert (args.model, args.weights, args.rules, args.threads, args.kv_cache_tokens) == ("m", "w", "r", 2, 512)
    assert args.force_think is True and args.max_new_tokens == 9 and not capsys.readouterr().err
