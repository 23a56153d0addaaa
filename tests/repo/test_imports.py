"""The floors of the house: a module imports only what lies below it, and heavy or optional packages stay in their place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (  # lowest first; a file belongs to the longest prefix that fits
    (
        "ktx.errors",
        "ktx.environment",
        "ktx.injection.device_map",
        "ktx.devices",
        "ktx.utils.fork_handlers",
        "ktx.hardware",
        "ktx.utils.json_file",
        "ktx.quant.types",
        "ktx.quant.quantize",
        "ktx.utils.spawn_pickle",
        "ktx.transformers_compat",
        "ktx.utils.torch_defaults",
        "ktx.utils.versions",
        "ktx.demo",
        "ktx.chat_formats",
        "ktx.hub",
    ),
    ("ktx.weights", "ktx.kernels"),
    ("ktx.cache",),
    ("ktx.ops",),
    ("ktx.model.lora",),
    ("ktx.injection.rules", "ktx.injection.ktransformers"),
    ("ktx.injection.inject",),
    ("ktx.model.notes",),
    ("ktx.placement.memory_model",),
    ("ktx.placement.workspace",),
    ("ktx.placement.solver",),
    ("ktx.placement.suggest",),
    ("ktx.loader.meta_model",),
    ("ktx.loader.build",),
    ("ktx.loader.load_weights", "ktx.model.pickling", "ktx.model.self_test"),
    ("ktx.model.checkpoint_folder",),
    ("ktx.model.saving", "ktx.model.saving_packed"),
    ("ktx.model.training_notes",),
    ("ktx.model.loaded",),
    ("ktx.loader.load",),
    ("ktx.integrations.from_pretrained",),
    ("ktx.engine",),
    ("ktx.server",),
    ("ktx.replicas",),
    ("ktx.chat", "ktx.cli"),
    ("ktx.local_chat", "ktx.__main__", "ktx.server.main"),
)
BY_HAND = {
    "ktx": None,
    "ktx.integrations.experts_interface": None,
    "ktx.demo.train": None,
    "ktx.demo.export": None,
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
    assert mine is not None, f"{module} stands on no floor: add it to FLOORS"
    above = sorted(name for name in imports(FILES[module]) if name.startswith("ktx.") and (floor(name) or 0) > mine)
    assert not above, f"{module} imports {above}, which lie above it"


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
    code = "import setuptools\nfrom distutils.core import run_setup\nprint(*run_setup('setup.py', stop_after='init').packages)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "ktx").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"ktx.optimize_rules"} == set(done.stdout.split())
