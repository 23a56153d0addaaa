"""Which files of a repository are wanted: its weights in one form, and what a model needs beside them. No network here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ktx.errors import BadFile, UsageError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # formats whose reader runs code that is in the file
WEIGHTS = (".safetensors", ".gguf", *PICKLES)
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "README.md")
NO_MODEL = re.compile(r"^(mmproj|imatrix)|[._-]imatrix\b", re.I)  # GGUF files that hold something else
SPLIT = re.compile(r"^(.+)-(\d{5,6})-of-(\d{5,6})$")
QUANTISATION = re.compile(
    r"(?:^|[._-])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F(?:P)?(?:16|32)))(?=$|[._-])", re.I
)


@dataclass(frozen=True)
class File:
    """A file of a repository; hubs name the digest of large ones only."""

    path: str
    size: int
    sha256: str | None = None

    @property
    def kind(self) -> str:
        return PurePosixPath(self.path).suffix.lower()


@dataclass(frozen=True)
class Quantization:
    """One GGUF model of a repository: a file, or the parts of a split one in their order."""

    name: str
    stem: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass
class FileSelection:
    """What is fetched, and the pickle files that are left where they are."""

    weights: list[File] = field(default_factory=list)
    beside: list[File] = field(default_factory=list)
    pickles: list[File] = field(default_factory=list)

    @property
    def files(self) -> list[File]:
        return self.weights + self.beside


class AmbiguousQuant(UsageError):
    """A repository of several quantisations, of which none is named."""

    def __init__(self, message: str, found: Sequence[Quantization]):
        super().__init__(message)
        self.found = found


def choose(
    repo: str, files: Sequence[File], tag: str = "", include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> FileSelection:
    """The wanted files: of quantisation `tag`, of the globs `include`, or of the one form of weights there is, never of `exclude`.

    Raises Several when there are many quantisations and none is named, UsageError when nothing fits, BadFile when a file's
    name leads out of the folder.
    """
    for file in files:
        if file.path.startswith("/") or "\\" in file.path or ".." in file.path.split("/"):
            raise BadFile(f"{repo}: names a file {file.path!r}, which lies outside of it; nothing is fetched")
    allowed = [file for file in files if not fits(file, exclude)]
    asked = {PurePosixPath(glob).suffix.lower() for glob in include}
    pickles = [file for file in allowed if file.kind in PICKLES and file.kind not in asked]
    safe = [file for file in allowed if file not in pickles]
    for glob in [*include, *exclude]:
        if not any(fits(file, [glob]) for file in files):
            warnings.warn(f"{repo}: {glob} fits no file", stacklevel=2)
    if include:
        wanted = [file for file in safe if fits(file, include)]
        if not wanted:
            raise UsageError(f"{repo}: no file fits {' or '.join(include)}; it holds {_some(files)}")
    else:
        wanted = _weights(repo, safe, pickles, tag)
    weights = [file for file in wanted if file.kind in WEIGHTS]
    beside = {file for file in safe if weights and "/" not in file.path and fits(file, BESIDE)}
    others = {file for file in wanted if file not in weights}
    return FileSelection(weights, sorted(others | beside, key=lambda file: file.path), pickles)


def fits(file: File, globs: Sequence[str]) -> bool:
    """Whether a glob names the file by its path or its last part; a folder with / at its end means all that is in it."""
    names = (file.path, PurePosixPath(file.path).name)
    return any(fnmatchcase(name, glob + "*" if glob.endswith("/") else glob) for glob in globs for name in names)


def _weights(repo: str, files: Sequence[File], pickles: Sequence[File], tag: str) -> list[File]:
    """Of a repository whose user named no file: a quantisation, else safetensors, else the only GGUF."""
    found, tensors = quantisations(files), _safetensors(files)
    if tag:
        return list(_tagged(repo, found, tag).files)
    if tensors:
        return tensors
    if len(found) > 1:
        raise AmbiguousQuant(f"{repo} holds {len(found)} quantisations: name one of the table", found)
    if found:
        return list(found[0].files)
    if pickles:
        raise UsageError(
            f"{repo}: its weights are pickle files alone ({_some(pickles)}), which run code when they are read; ktx reads"
            f' safetensors and GGUF. --include "*{pickles[0].kind}" fetches them all the same'
        )
    raise UsageError(
        f"{repo}: holds neither safetensors nor GGUF, only {_some(files)}; --include GLOB fetches other files"
    )


def _safetensors(files: Sequence[File]) -> list[File]:
    """Those of the top folder, and of two copies there the one that transformers reads; else all."""
    tensors = [file for file in files if file.kind == ".safetensors"]
    top = [file for file in tensors if "/" not in file.path]
    return [file for file in top if file.path.startswith("model")] or top or tensors


def quantisations(files: Sequence[File]) -> list[Quantization]:
    """The GGUF models of a repository, the smaller first."""
    groups: dict[str, list[File]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if file.kind == ".gguf" and not NO_MODEL.search(path.name):
            split = SPLIT.match(path.stem)
            groups.setdefault(str(path.parent / (split[1] if split else path.stem)), []).append(file)
    names = [_name(stem) for stem in groups]
    made = [
        Quantization(
            name if names.count(name) == 1 else PurePosixPath(stem).name,
            stem,
            tuple(sorted(group, key=lambda file: file.path)),
        )
        for name, (stem, group) in zip(names, groups.items(), strict=True)
    ]
    return sorted(made, key=lambda one: (one.size, one.name))


def _name(stem: str) -> str:
    """The last quantisation that a file's name tells, else its folder's, else the whole name."""
    path = PurePosixPath(stem)
    for part in (path.name, path.parent.name):
        if found := QUANTISATION.findall(part):
            return found[-1].upper()
    return path.name


def _tagged(repo: str, found: Sequence[Quantization], tag: str) -> Quantization:
    """The quantisation called `tag`, in capitals or not, with or without the UD- that Unsloth puts before some."""
    if not found:
        raise UsageError(f"{repo}: holds no GGUF, so no quantisation {tag!r}; leave :{tag} out")
    wanted = tag.upper()
    for names in ((wanted,), (f"UD-{wanted}",)):
        fitting = [one for one in found if one.name.upper() in names or _name(one.stem) in names]
        if fitting:
            break
    if len(fitting) != 1:
        holds = f"holds {len(fitting)} models that are" if fitting else "holds nothing that is"
        raise AmbiguousQuant(f"{repo}: {holds} {tag}: name one of the table", fitting or found)
    first = PurePosixPath(fitting[0].files[0].path)
    split = SPLIT.match(first.stem)
    if split and len(fitting[0].files) != int(split[3]):
        raise BadFile(f"{repo}: holds {len(fitting[0].files)} of the {int(split[3])} parts of {fitting[0].name}")
    return fitting[0]


def _some(files: Sequence[File]) -> str:
    names = [file.path for file in files[:3]]
    return ", ".join(names) + (f" and {len(files) - 3} more" if len(files) > 3 else "") if names else "nothing"
