"""What is public: names that tab completion shows, and signatures as docs/python-api.md has them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ktx
from ktx.engine.engine import Options
from ktx.loader.build import measure_footprint

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python-api.md").read_text(encoding="utf-8")
SIGNATURE = re.compile(r"`(ktx(?:\.\w+)+)\(([^`]*)\)`")
NAMES = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| `(ktx[\w.]*)` \|$", re.M)


def thing(path: str) -> object:
    """What `ktx.load` or `ktx.cache.kv.KVCache` names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def rows(argument: str) -> list[str]:
    """The names in the first column of the table whose head begins with a word."""
    table = re.search(rf"^\| {argument} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.M)
    assert table is not None, argument
    return [name for row in table[1].splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]


def test_dir_shows_the_public_names_and_completes_without_torch():
    code = "import ktx, sys, json; print(json.dumps([dir(ktx), 'torch' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, torch_came = ast.literal_eval(done.stdout.replace("true", "True").replace("false", "False"))
    assert set(ktx.__all__) <= set(names) and "__version__" in names and not torch_came
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ktx.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ktx, name) is not None and name in dir(ktx)


def test_all_and_the_page_have_the_same_names():
    first = PAGE.split("\n\n")[1].partition(".")[0]
    assert set(re.findall(r"`(\w+)`", first)) - {"ktx"} == set(ktx.__all__)


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="'ktx' has no attribute 'lode'"):
        ktx.lode  # noqa: B018


@pytest.mark.parametrize("names, module", NAMES.findall(PAGE), ids=[module for _, module in NAMES.findall(PAGE)])
def test_what_is_public_elsewhere_is_at_its_place(names, module):
    for name in re.findall(r"`(\w+)`", names):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_page_names_places_and_signatures():
    assert len(NAMES.findall(PAGE)) >= 8
    assert {"ktx.load", "ktx.plan", "ktx.Rule"} <= {path for path, _ in SIGNATURE.findall(PAGE)}


@pytest.mark.parametrize("path, written", SIGNATURE.findall(PAGE), ids=[path for path, _ in SIGNATURE.findall(PAGE)])
def test_a_signature_is_the_functions_own(path, written):
    """Names, order, kinds and defaults."""
    space = {"torch": torch}
    exec(f"def documented({written}): ...", space)
    documented = inspect.signature(space["documented"]).parameters.values()  # type: ignore[arg-type]
    own = inspect.signature(thing(path)).parameters.values()  # type: ignore[arg-type]
    assert [(p.name, p.kind) for p in documented] == [(p.name, p.kind) for p in own]
    for mine, theirs in zip(documented, own, strict=True):
        default = theirs.default
        if "factory" in repr(default):  # a dataclass's: what it makes
            default = next(f.default_factory() for f in dataclasses.fields(thing(path)) if f.name == theirs.name)  # type: ignore[arg-type, misc]
        assert mine.default == default, f"{path}: {theirs.name}"


@pytest.mark.parametrize("function", [ktx.plan, measure_footprint])
def test_arguments_of_load_have_its_defaults_elsewhere_too(function):
    own = inspect.signature(ktx.load).parameters
    arguments = inspect.signature(function).parameters
    assert {name: p.default for name, p in arguments.items()} == {name: own[name].default for name in arguments}


def test_the_tables_explain_every_argument_and_no_other():
    assert sorted(rows("argument")) == sorted(inspect.signature(ktx.load).parameters)
    options = {field.name for field in dataclasses.fields(Options)}
    assert set(rows("option")) <= options and options - set(rows("option")) <= {"longest_chunk"}
