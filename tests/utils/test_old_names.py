"""Names of ktx 0.1: each still imports, gives the object of today, and warns."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest

from ktx.utils import old_names
from ktx.utils.old_names import ELSEWHERE, MODULES, NAMES


def imported(name):
    """An old module as at its first import."""
    sys.modules.pop(name, None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = importlib.import_module(name)
    return module, [str(warning.message) for warning in seen if warning.category is DeprecationWarning]


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_is_the_new_one(old):
    module, messages = imported(old)
    new = importlib.import_module(MODULES[old])
    assert messages == [f"{old} is called {MODULES[old]} since ktx 0.2; the old name ends with 0.3"]
    for name in (name for name in vars(new) if not name.startswith("_")):
        assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("new,old,now", [(new, old, now) for new, names in NAMES.items() for old, now in names.items()])
def test_an_old_name_is_the_new_one(new, old, now):
    modules = [name for name, moved in MODULES.items() if moved == new] or [new]
    module = imported(modules[0])[0] if modules[0] != new else importlib.import_module(new)
    with pytest.warns(DeprecationWarning, match=f"{old} is called .*{now}"):
        found = getattr(module, old) if modules[0] != new else old_names.old_name(new, old)
    assert found is getattr(importlib.import_module(new), now)


@pytest.mark.parametrize("old,name", ELSEWHERE)
def test_a_name_that_moved_to_a_third_module(old, name):
    assert getattr(imported(old)[0], name) is getattr(importlib.import_module(ELSEWHERE[old, name]), name)


@pytest.mark.parametrize(
    "old,new", [("ktx.dialects.parser", "ktx.chat_formats.parser"), ("ktx.commands.plan", "ktx.cli.plan")]
)
def test_modules_of_a_moved_package(old, new):
    assert imported(old)[0].__getattr__("__doc__") is importlib.import_module(new).__doc__


def test_a_module_that_never_was():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ktx.no_such_module")
