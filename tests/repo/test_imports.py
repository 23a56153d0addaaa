"""Layers: a module imports only its own or a lower layer, no imports form a circle, optional packages have one user."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (  # lowest first; a module belongs to the longest prefix that fits
    tuple(
        f"ktx.{name}"
        for name in [
            "errors",
            "environment",
            "hardware",
            "devices",
            "transformers_compat",
            "utils",
            "families",
            "chat_formats",
            "hub",
            "quant",
            "integrations.names",
            "injection.device_map",
            "injection.rule",
            "injection.rules",
            "injection.ktransformers",
        ]
    ),
    ("ktx.weights",),
    ("ktx.kernels",),
    ("ktx.cache",),
    ("ktx.ops",),
    ("ktx.injection", "ktx.model.lora"),
    ("ktx.model.notes", "ktx.placement"),
    ("ktx.loader", "ktx.model"),
    ("ktx.engine",),
    ("ktx.loader.load",),
    ("ktx.integrations", "ktx.server", "ktx.chat", "ktx.demo"),
    ("ktx.replicas", "ktx.cli"),
    ("ktx.__main__", "ktx.local_chat", "ktx.server.main"),
)
MAX_FLOORS = 13
BY_HAND = {
    "ktx": None,
    "ktx.integrations.experts_interface": None,
    "ktx.demo.evaluate": None,
    "ktx.kernels.check": None,
}  # entry points over everything
ONE_FILE = {
    "prompt_toolkit": "ktx/chat/",
    "llguidance": "ktx/engine/grammar.py",
    "fastapi": "ktx/server/",
    "pydantic": "ktx/server/",
    "uvicorn": "ktx/server/",
    "sse_starlette": "ktx/server/",
    "prometheus_client": "ktx/",
    "triton": "ktx/kernels/",
    "flashinfer": "ktx/kernels/",
    "cpufeature": "ktx/hardware.py",
    "ray": "ktx/replicas/",
    "modelscope_hub": "ktx/hub/modelscope.py",
    "httpx": "ktx/cli/",
    "matplotlib": "ktx/cli/bench_plot.py",
}
LIGHT = [
    "ktx",
    "ktx.injection.rules",
    "ktx.hardware",
    "ktx.environment",
    "ktx.errors",
    "ktx.chat_formats",
    "ktx.utils.versions",
    "ktx.__main__",
]  # import no torch


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "ktx").rglob("*.py"))}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in FILES}
    return found


def floor(module: str) -> int | None:
    fits = [
        (len(prefix), level)
        for level, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(fits)[1] if fits else None


@pytest.mark.parametrize("module", [name for name in FILES if name not in BY_HAND])
def test_imports_go_down_only(module):
    mine = floor(module)
    assert mine is not None, f"{module} has no floor: add it to FLOORS"
    above = sorted(name for name in imports(FILES[module]) if name.startswith("ktx.") and (floor(name) or 0) > mine)
    assert not above, f"{module} imports {above}, which are on higher floors"


def names_in_strings(path: Path) -> set[str]:
    """Modules that are named in strings, as importlib gets them; names of loggers and docstrings are none."""
    tree = ast.parse(path.read_text())
    loggers = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "getLogger"
        for argument in node.args
    }
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in loggers
    ]
    found = set()
    for text in texts:
        while re.fullmatch(r"ktx(\.\w+)+", text) and text not in FILES:
            text = text.rpartition(".")[0]
        found |= {text} & FILES.keys() - {"ktx"}
    return found


def test_no_imports_form_a_circle():
    """Late, type-only and string imports count."""
    graph = {
        name: ((imports(path) & FILES.keys()) | names_in_strings(path)) - {name, *_parents(name)}
        for name, path in FILES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def _parents(name: str) -> list[str]:
    """The packages around a module: they are imported with it, and have no imports of their own but the top one."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def test_strings_that_name_modules_are_found(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        'import logging\nlogging.getLogger("ktx.model.notes")\nA = "ktx.ops.linear.Linear"\nB = "see ktx.errors"\n'
    )
    assert names_in_strings(file) == {"ktx.ops.linear"}


def test_the_layout_of_the_package():
    assert len(FLOORS) <= MAX_FLOORS
    top = ["__init__", "__main__", "local_chat", "errors", "environment", "hardware", "devices", "transformers_compat"]
    assert {path.stem for path in (ROOT / "ktx").glob("*.py")} == set(top)


@pytest.mark.parametrize("package,home", ONE_FILE.items())
def test_optional_packages_have_one_home(package, home):
    users = [
        str(path.relative_to(ROOT)) for path in FILES.values() if package in {n.split(".")[0] for n in imports(path)}
    ]
    assert all(user.startswith(home) for user in users), f"{package} is imported by {users}, its home is {home}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, (
        f"import {module} brings torch or transformers"
    )


def test_a_wheel_holds_every_module():
    """An editable installation has them whatever setup.py says."""
    code = "import setuptools\nfrom distutils.core import run_setup\nprint(*run_setup('setup.py', stop_after='init').packages)"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "ktx").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"ktx.optimize_rules"} == set(done.stdout.split())
