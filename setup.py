"""Builds the one extension, ktx/_C.abi3.so: LibTorch's stable ABI and Python's limited API, so one binary fits all.

No -m flags: the instruction sets are chosen by regions inside the sources, and at run time by cpuid.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
TORCH_2_11 = "0x020b000000000000"  # the oldest torch whose stable ABI has all we use; newer API is a compile error
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",  # GCC 12 warns about its own AVX-512 headers
    "-DTORCH_STABLE_ONLY",
    f"-DTORCH_TARGET_VERSION={TORCH_2_11}",
    "-DPy_LIMITED_API=0x030b0000",
]

SLOWEST_FIRST = ["amx_emulated", "avx512", "scalar", "amx", "avxvnni", "avx2"]  # files of csrc/cpu/isa by compile time
LANES_ARE_LOOPS = {"scalar", "amx_emulated"}  # -O3 takes GCC minutes for these and brings nothing

# pip shows every warning of a build. torch misses NumPy, which no header needs; setuptools explains what an editable
# installation is.
for message in ("Failed to initialize NumPy", "Editable installation"):
    warnings.filterwarnings("ignore", message=rf"\s*{message}")


def _digest(compiler: list[str], includes: list[str]) -> str:
    """Returns a hash of everything that object files depend on.

    pip builds in a new folder each time, so objects are cached under this name.
    """
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    found = hashlib.sha256(repr((compiler, version, FLAGS, includes)).encode())
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Build(build_ext):
    """Compiles each source in a process of its own, slowest first, one per core. Caches objects in build/objects."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles all sources and links the extension."""
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = os.environ.get("CXX", "g++").split()
        temporary = Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        includes = ["-Icsrc", *(flag for path in include_paths() for flag in ("-isystem", path))]

        cache = ROOT / "build" / "objects" / _digest(compiler, includes)
        cache.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target, done = temporary / (source.replace("/", "_") + ".o"), cache / (source.replace("/", "_") + ".o")
            if done.exists():
                return str(done)
            kernels = "/cpu/" in source  # everything below csrc/cpu knows no torch
            level = "-O2" if not kernels or Path(source).stem in LANES_ARE_LOOPS else "-O3"
            self.call(
                [
                    *compiler,
                    "-c",
                    source,
                    "-o",
                    str(target),
                    level,
                    *FLAGS,
                    *(includes[:1] if kernels else includes),
                ]
            )
            shutil.move(target, done.with_suffix(".part"))  # complete or absent: a build may be interrupted
            return str(done.with_suffix(".part").rename(done))

        order = {f"csrc/cpu/isa/{name}.cpp": index for index, name in enumerate(SLOWEST_FIRST)}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, sorted(ext.sources, key=lambda source: order.get(source, len(order)))))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in library_paths()]
        self.call(
            [
                *compiler,
                "-shared",
                "-o",
                str(output),
                *objects,
                *libraries,
                "-ltorch_cpu",
                "-lpthread",
                "-Wl,-z,defs",
                "-Wl,--as-needed",
            ]
        )

    @staticmethod
    def call(command: list[str]) -> None:
        """Runs a command; ends with its text if it fails."""
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode:
            sys.exit(f"ktx: this command failed (a C++20 compiler is needed, g++ 11 or newer):\n  {' '.join(command)}")


# The checkout's own rule files serve an editable install, which is then a path entry. With a package that is in another
# folder it would be an import hook, and that comes too late in the parent folder of a checkout: there Python takes the
# checkout itself for the package ktx.
RULE_FILES = {} if "editable_wheel" in sys.argv else {"ktx.optimize_rules": "optimize_rules"}

setup(
    ext_modules=[Extension("ktx._C", SOURCES, py_limited_api=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    packages=[
        *(".".join(path.parent.relative_to(ROOT).parts) for path in sorted(Path(ROOT, "ktx").rglob("__init__.py"))),
        *RULE_FILES,
    ],
    package_dir={"": "."} | RULE_FILES,
    include_package_data=False,  # else folders of data count as packages that were forgotten: pages of warnings
    package_data={
        "ktx": ["py.typed"],
        "ktx.optimize_rules": ["*.yaml"],
        "ktx.demo": ["*.jsonl", "*.txt", "model/*"],
        "ktx.server": ["page/*"],
    },
)
