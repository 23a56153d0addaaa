"""What pip gets of us: the distribution's name, its bounds, the lock, and what was tested."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ktx
from ktx.utils import versions

ROOT = Path(__file__).resolve().parents[2]
# `ktx` on the package index is somebody else's: no text of ours may have it installed, nor ask for its metadata.
WRONG_NAME = re.compile(
    r"""\bktx\[\s*[a-z]                                                 # ktx[serve]
    | \b(?:pip3?|pipx|uv)\s[^|;&`()\n]*?\b(?:install|add|download)\s(?:[^|;&`()\n]*?[\s'"])?ktx(?=[\s'"`=<>~!;,).]|$)
    | \b(?:version|distribution|requires|files|metadata)\(\s*['"]ktx['"]""",
    re.X | re.M,
)


def texts() -> dict[str, str]:
    """Every text of the repository by its path."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {}
    for name in filter(None, names.split("\0")):
        try:
            found[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # a picture, a model; or a file deleted and not committed
    return found


@pytest.mark.parametrize(
    "text",
    [
        "pip install ktx",
        "pip install -U 'ktx'",
        "pip3 install ktx==0.5.0",
        "`pip install ktx`",
        "pip install 'ktx[serve]'",
        "python -m pip install --upgrade ktx transformers",
        "uv pip install ktx",
        "uv add ktx",
        "pipx install ktx",
        'dev = ["ktx[serve]"]',
        'importlib.metadata.version("ktx")',
        "distribution('ktx')",
    ],
)
def test_the_wrong_name_is_found(text):
    assert WRONG_NAME.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "pip install -e '.[serve]'",
        "pip install ktx-moe",
        "pip install 'dist/ktx_moe-0.1.0-cp311-abi3-linux_x86_64.whl[serve]'",
        "pip install httpx; ktx serve",
        "git clone https://example.org/ktx && pip install -e .",
    ],
)
def test_the_right_name_is_not_found(text):
    assert not WRONG_NAME.search(text)


def test_no_text_sends_anybody_to_a_strangers_package():
    wrong = [
        f"{name}:{text[: found.start()].count(chr(10)) + 1}: {found[0]}"
        for name, text in texts().items()
        if name != "tests/repo/test_packaging.py"
        for found in WRONG_NAME.finditer(text)
    ]
    assert not wrong, "ktx on the package index is somebody else's:\n" + "\n".join(wrong)


def test_an_extra_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert versions.install_command("serve") == "pip install -e '.[serve]'"
    monkeypatch.chdir(tmp_path)
    assert versions.install_command("ray") == f"pip install -e '.[ray]' in {ROOT}"


@pytest.mark.parametrize(
    "direct_url,wheel",
    [
        ('{"url": "file:///home/m%20e/dist/ktx_moe-1-cp311-abi3-linux_x86_64.whl"}', "/home/m e/dist/ktx_moe-1-cp311-abi3-linux_x86_64.whl"),  # noqa: E501
        ('{"url": "https://example.org/ktx_moe-1-cp311-abi3-linux_x86_64.whl"}', "https://example.org/ktx_moe-1-cp311-abi3-linux_x86_64.whl"),
        (None, "dist/ktx_moe-0.2.0-cp311-abi3-linux_x86_64.whl"),
    ],
)  # fmt: skip
def test_an_extra_of_a_wheel(monkeypatch, tmp_path, direct_url, wheel):
    class Installed:
        def read_text(self, name):
            return direct_url

    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert versions.install_command("serve") == f"pip install '{wheel}[serve]'"


def test_an_extra_of_files_that_nobody_installed(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert versions.install_command("serve").startswith("pip install 'dist/ktx_moe-")


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
OURS = ("serve", "ray", "modelscope")  # extras of users; the others are for us
LOCKED = ("serve", "modelscope", "dev")


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, less the extras that name ours again."""
    lines = [*PYPROJECT["project"]["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [found for line in lines if canonicalize_name((found := Requirement(line)).name) != versions.DISTRIBUTION]


def locked() -> list[Requirement]:
    text = (ROOT / "requirements.lock").read_text()
    return [Requirement(line) for line in text.splitlines() if not line.startswith("#")]


def lower(bounds: SpecifierSet) -> str:
    return next(one.version for one in bounds if one.operator == ">=")


def upper(bounds: SpecifierSet) -> str:
    return next(one.version for one in bounds if one.operator == "<")


def test_the_names_agree():
    assert PYPROJECT["project"]["name"] == versions.DISTRIBUTION
    assert PYPROJECT["project"]["scripts"] == {"ktx": "ktx.__main__:main"}
    own = {canonicalize_name(Requirement(line).name) for lines in EXTRAS.values() for line in lines if "moe" in line}
    assert own == {versions.DISTRIBUTION}


@pytest.mark.parametrize(
    "requirement", [*declared(*EXTRAS), *map(Requirement, PYPROJECT["build-system"]["requires"])], ids=str
)
def test_every_bound_has_an_end(requirement):
    if requirement.name in ("setuptools", "wheel") and requirement in map(
        Requirement, PYPROJECT["build-system"]["requires"]
    ):
        return  # what builds us has no part in what we compute
    assert {one.operator for one in requirement.specifier} == {">=", "<"}, f"{requirement}: needs >= and <"


@pytest.mark.parametrize("requirement", declared(*OURS), ids=lambda found: found.name)
def test_bounds_are_what_was_tested(requirement):
    name = requirement.name
    assert name in versions.TESTED, f"{name} has no entry in ktx/utils/versions.py"
    oldest, newest = versions.TESTED[name]
    assert lower(requirement.specifier) == oldest
    assert requirement.specifier.contains(newest)
    if name in PRIVATE:
        assert str(requirement) == str(Requirement(versions.requirement(name))), f"we use private names of {name}"
    else:
        assert upper(requirement.specifier) == str(versions.release_components(newest)[0] + 1), "the next major version"


def test_nothing_is_tested_that_nobody_asks_for():
    assert set(versions.TESTED) == {found.name for found in declared(*OURS)}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_is_what_was_tested(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = {
        canonicalize_name(pin.name): pin.specifier
        for pin in locked()
        if not pin.marker or pin.marker.evaluate(environment)
    }
    for requirement in declared(*LOCKED):
        name = canonicalize_name(requirement.name)
        if name == "torch":
            continue  # .ci/install_torch.py
        assert name in pins, f"make lock: Python {python} has no {name}"
        (pin,) = pins[name]
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), (
            f"make lock: {name} {pin} for {requirement}"
        )
        if requirement.name in versions.TESTED:
            far = versions.compare_to_tested(requirement.name, pin.version)
            assert far is None, (
                f"{name} {pin.version} is {far} than ktx/utils/versions.py says that the suite was run on"
            )
    assert {"pip", "setuptools", "wheel"} <= set(pins)
    assert not {name for name in pins if name.startswith(("torch", "nvidia-", "cuda-"))}


def test_the_lock_has_exact_versions_and_no_places():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|(?m:^)(?:-|\s*/)|\bfile:| @ ", text)
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in locked())


def test_the_lock_has_all_that_is_installed_with_it():
    """The requirements of what it names, as installed here, down to the last."""
    pins = {canonicalize_name(pin.name) for pin in locked()} | {"torch"}
    waiting, seen = [(found.name, extra) for found in declared(*LOCKED) for extra in ["", *found.extras]], set()
    while waiting:
        name, extra = waiting.pop()
        if (key := (canonicalize_name(name), extra)) in seen or (
            key[0] == "triton" and not versions.installed_version("triton")
        ):
            continue
        seen.add(key)
        if key[0].startswith(("nvidia-", "cuda-")):
            continue  # with a CUDA build of torch
        assert key[0] in pins, f"make lock: {name} is missing"
        for line in importlib.metadata.requires(name) or []:
            found = Requirement(line)
            if found.marker is None or found.marker.evaluate({"extra": extra}):
                waiting += [(found.name, one) for one in ["", *found.extras]]
    assert len(seen) > 80


@pytest.mark.parametrize(
    "version,said",
    [
        ("5.16.9", "older"),
        ("5.17.0", None),
        ("5.23.0", None),
        ("5.23.4", None),
        ("5.24.0", "newer"),
        ("5.24.0.dev0", "newer"),
        ("6.0", "newer"),
        ("5.20.0+local", None),
    ],
)
def test_a_version_outside(monkeypatch, version, said):
    monkeypatch.setitem(versions.TESTED, "transformers", ("5.17", "5.23"))
    monkeypatch.setattr(versions, "installed_version", lambda name: version if name == "transformers" else None)
    assert versions.compare_to_tested("transformers", version) == said
    found = versions.untested_warnings()
    assert len(found) == (said is not None)
    if said:
        assert found == [
            f"transformers {version} is {said} than the versions ktx was tested with (5.17 to 5.23): pip install 'transformers>=5.17,<5.24'"  # noqa: E501
        ]


# Private names of others that ktx uses: package -> where each is found. A new minor version may drop any, so these
# packages' bounds end behind the
# newest one that was tested. () makes an instance; a name after / is looked for in the module's source.
PRIVATE = {
    "torch": [
        "torch:Tensor._version",
        "torch.nn:Module()._parameters",
        "torch.nn:Module()._modules",
        "torch.nn:Module()._forward_hooks",
        "torch.nn:Module()._forward_pre_hooks",
        "torch.nn:Module()._buffers",
        "torch.nn:Module()._non_persistent_buffers_set",
        "torch.nn.modules.module:_global_forward_hooks",
        "torch.nn.modules.module:_global_forward_pre_hooks",
        "torch.nn.modules.module:_global_backward_hooks",
        "torch.nn.modules.module:_global_backward_pre_hooks",
        "torch.nn:Module()._backward_hooks",
        "torch.nn:Module()._backward_pre_hooks",
        "torch.autograd.forward_ad:_current_level",
        "torch._C:_disabled_torch_function_impl",
        "torch._C:_len_torch_dispatch_stack",
        "torch._C._functorch:is_functorch_wrapped_tensor",
        "torch:Tensor._make_wrapper_subclass",
        "torch:ops.aten.detach.default._schema",
        "torch.utils._pytree:tree_map_only",
    ],
    "transformers": [
        "transformers:AutoModelForCausalLM._model_mapping",
        "transformers:PreTrainedModel._get_dtype_plan",
        "transformers:GenerationMixin._supports_default_dynamic_cache",
        "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected",
        "transformers:PreTrainedModel._supports_sdpa",
        "transformers:PreTrainedModel._init_weights",
        "transformers:PreTrainedModel._initialize_weights",
        "transformers:LlamaConfig()._attn_implementation",
        "transformers:LlamaConfig()._experts_implementation",
        "transformers.models.gpt_oss.modeling_gpt_oss:GptOssExperts._apply_gate",
        "transformers.modeling_utils/_is_hf_initialized",
        "transformers.core_model_loading:WeightRenaming",
        "transformers.core_model_loading:revert_weight_conversion",
        "transformers.core_model_loading/_weight_conversions",
        "transformers.conversion_mapping:get_model_conversion_mapping",
        "transformers.utils.output_capturing:_active_collector",
        "transformers.modeling_utils/_hf_peft_config_loaded",
        "transformers:PreTrainedModel._keys_to_ignore_on_save",
        "transformers.conversion_mapping:get_checkpoint_conversion_mapping",
    ],
    "starlette": ["starlette.requests/_json"],
    "uvicorn": [
        "uvicorn:Server.handle_exit",
        "uvicorn:Server.shutdown",
        "uvicorn.server/should_exit",
        "uvicorn.server/force_exit",
    ],
    "sse-starlette": ["sse_starlette.sse:AppStatus.should_exit"],
}
PEERS = {"_ctypes_api", "_lib"}  # of ik_llama_cpp, which only `ktx bench --peer` asks
PYTHONS = {
    "_actions",
    "_asdict",
    "_replace",
    "_option_string_actions",
    "_SubParsersAction",
    "_ArgumentGroup",
    "_AppendAction",
    "_exit",
}


@pytest.mark.parametrize("place", [place for places in PRIVATE.values() for place in places])
def test_a_private_name_of_others_is_there(place):
    if "/" in place:
        module, name = place.split("/")
        assert re.search(rf"\b{name}\b", Path(importlib.import_module(module).__file__).read_text())
        return
    module, names = place.split(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name.removesuffix("()"))
        if name.endswith("()"):
            found = found()


def test_every_private_name_of_others_is_listed():
    listed = {re.split(r"[.:/]", place)[-1] for places in PRIVATE.values() for place in places}
    listed |= {place.split(":")[0].split(".")[-1] for places in PRIVATE.values() for place in places}
    trees = {file: ast.parse(file.read_text()) for file in (ROOT / "ktx").rglob("*.py")}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    known = {name for _, node in nodes for name in made(node)} | listed | PEERS | PYTHONS
    unknown = sorted(
        f"{file.relative_to(ROOT)}:{node.lineno}: {name}"
        for file, node in nodes
        for name in asked(node)
        if name not in known
    )
    assert not unknown, "private names of other packages, which PRIVATE does not list:\n" + "\n".join(unknown)


def made(node: ast.AST) -> list[str]:
    """Names that a statement of ours defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr] if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else []
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def asked(node: ast.AST) -> list[str]:
    """Private names that a statement takes from an object or a package not of ours."""
    names: list[str] = []
    if isinstance(node, ast.Attribute):
        names = [node.attr]
    elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("ktx"):
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr")
    ):
        names = [str(word.value) for word in node.args[1:2] if isinstance(word, ast.Constant)]
    return [name for name in names if name.startswith("_") and not name.endswith("__")]


def test_a_build_says_nothing_of_packages_and_holds_the_data(tmp_path):
    """Folders of data are no packages: setuptools warned of each, a page a folder."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "-e",
        str(tmp_path),
        "build_py",
        "-d",
        str(tmp_path / "lib"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "importable" not in done.stdout + done.stderr and "ignored" not in done.stdout + done.stderr
    assert (tmp_path / "lib/ktx/py.typed").is_file()  # type checkers read the annotations of an installed ktx
    for folder in ("ktx/demo", "ktx/demo/model", "ktx/server/page", "optimize_rules"):
        here = {file.name for file in (ROOT / folder).iterdir() if file.is_file()}
        there = tmp_path / "lib" / folder.replace("optimize_rules", "ktx/optimize_rules")
        assert {file.name for file in there.iterdir() if file.is_file()} == here


def test_pyproject_has_the_packages_version():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == ktx.__version__
    assert f"\n## {ktx.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
