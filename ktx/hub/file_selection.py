"""Selects the files of a repository to download: the weights in one format, and the other files that a model needs.

No network access.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ktx.errors import BadFile, UsageError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # reading these can run code in the file
WEIGHT_SUFFIXES = (".safetensors", ".gguf", *PICKLE_SUFFIXES)
OTHER_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "README.md")
NOT_MODEL = re.compile(r"^(mmproj|imatrix)|[._-]imatrix\b", re.I)  # GGUF files that are not models
SPLIT = re.compile(r"^(.+)-(\d{5,6})-of-(\d{5,6})$")
QUANTIZATION = re.compile(
    r"(?:^|[._-])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F(?:P)?(?:16|32)))(?=$|[._-])", re.I
)


@dataclass(frozen=True)
class File:
    """A file of a repository; `size` in bytes. Hubs report `sha256` for large files only."""

    path: str
    size: int
    sha256: str | None = None

    @property
    def kind(self) -> str:
        """The suffix in lower case."""
        return PurePosixPath(self.path).suffix.lower()


@dataclass(frozen=True)
class Quantization:
    """One GGUF model of a repository: a file, or the parts of a split file in order. `stem`: path without suffix."""

    name: str
    stem: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(file.size for file in self.files)


@dataclass
class FileSelection:
    """The files to download, and the pickle files that are skipped."""

    weights: list[File] = field(default_factory=list)
    other_files: list[File] = field(default_factory=list)
    pickles: list[File] = field(default_factory=list)

    @property
    def files(self) -> list[File]:
        """All files to download."""
        return self.weights + self.other_files


class AmbiguousQuant(UsageError):
    """The repository contains several quantizations and the request matches none or more than one of them."""

    def __init__(self, message: str, found: Sequence[Quantization]):
        super().__init__(message)
        self.found = found


def select_files(
    repo: str, files: Sequence[File], tag: str = "", include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> FileSelection:
    """Selects the files to download.

    Args:
        repo: the repository's name, for messages.
        files: all files of the repository.
        tag: the name of a GGUF quantization.
        include: globs of files to download; without these and `tag`, safetensors or else the only GGUF model.
        exclude: globs of files to skip.

    Raises:
        AmbiguousQuant: there are several quantizations and none is selected.
        UsageError: no file matches.
        BadFile: a file's name leads out of the target folder.
    """
    for file in files:
        if file.path.startswith("/") or "\\" in file.path or ".." in file.path.split("/"):
            raise BadFile(
                f"{repo}: lists the file {file.path!r}, which is outside of the repository; nothing downloaded"
            )
    allowed = [file for file in files if not matches(file, exclude)]
    included_suffixes = {PurePosixPath(glob).suffix.lower() for glob in include}
    pickles = [file for file in allowed if file.kind in PICKLE_SUFFIXES and file.kind not in included_suffixes]
    safe = [file for file in allowed if file not in pickles]
    for glob in [*include, *exclude]:
        if not any(matches(file, [glob]) for file in files):
            warnings.warn(f"{repo}: {glob} matches no file", stacklevel=2)
    if include:
        selected = [file for file in safe if matches(file, include)]
        if not selected:
            raise UsageError(f"{repo}: no file matches {' or '.join(include)}; it contains {_first_names(files)}")
    else:
        selected = _select_weights(repo, safe, pickles, tag)
    weights = [file for file in selected if file.kind in WEIGHT_SUFFIXES]
    next_to_weights = {file for file in safe if weights and "/" not in file.path and matches(file, OTHER_FILES)}
    others = {file for file in selected if file not in weights}
    return FileSelection(weights, sorted(others | next_to_weights, key=lambda file: file.path), pickles)


def matches(file: File, globs: Sequence[str]) -> bool:
    """Whether a glob matches the file's path or its name; a glob that ends with / matches everything in that folder."""
    names = (file.path, PurePosixPath(file.path).name)
    return any(fnmatchcase(name, glob + "*" if glob.endswith("/") else glob) for glob in globs for name in names)


def _select_weights(repo: str, files: Sequence[File], pickles: Sequence[File], tag: str) -> list[File]:
    """Selects the weights when no glob is given: quantization `tag`, else safetensors, else the only GGUF model.

    Pickle files are never selected; if there is nothing else, the error names them.
    """
    found, tensors = list_quantizations(files), _select_safetensors(files)
    if tag:
        return list(_find_quantization(repo, found, tag).files)
    if tensors:
        return tensors
    if len(found) > 1:
        raise AmbiguousQuant(f"{repo} contains {len(found)} quantizations: choose one of the table", found)
    if found:
        return list(found[0].files)
    if pickles:
        raise UsageError(
            f"{repo}: its weights are only pickle files ({_first_names(pickles)}), which can run code when they are"
            f' read; ktx reads safetensors and GGUF. --include "*{pickles[0].kind}" downloads them anyway'
        )
    raise UsageError(
        f"{repo}: contains neither safetensors nor GGUF, only {_first_names(files)}; --include GLOB downloads other"
        " files"
    )


def _select_safetensors(files: Sequence[File]) -> list[File]:
    """Selects the safetensors in the top folder, of two copies the one that transformers reads; else all of them."""
    tensors = [file for file in files if file.kind == ".safetensors"]
    top = [file for file in tensors if "/" not in file.path]
    return [file for file in top if file.path.startswith("model")] or top or tensors


def list_quantizations(files: Sequence[File]) -> list[Quantization]:
    """Lists the GGUF models of a repository, smallest first: the parts of a split file are one model.

    Models with the same quantization are named by their file instead.
    """
    groups: dict[str, list[File]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if file.kind == ".gguf" and not NOT_MODEL.search(path.name):
            split = SPLIT.match(path.stem)
            groups.setdefault(str(path.parent / (split[1] if split else path.stem)), []).append(file)
    names = [_quantization_name(stem) for stem in groups]
    found = [
        Quantization(
            name if names.count(name) == 1 else PurePosixPath(stem).name,
            stem,
            tuple(sorted(group, key=lambda file: file.path)),
        )
        for name, (stem, group) in zip(names, groups.items(), strict=True)
    ]
    return sorted(found, key=lambda quantization: (quantization.size, quantization.name))


def _quantization_name(stem: str) -> str:
    """The last quantization type in a file's name, else in its folder's name, else the complete file name."""
    path = PurePosixPath(stem)
    for part in (path.name, path.parent.name):
        if found := QUANTIZATION.findall(part):
            return found[-1].upper()
    return path.name


def _find_quantization(repo: str, found: Sequence[Quantization], tag: str) -> Quantization:
    """Returns the quantization named `tag`, ignoring case, else the one with Unsloth's prefix UD- in front of it.

    Raises AmbiguousQuant if there is none or several, BadFile if parts of a split file are missing.
    """
    if not found:
        raise UsageError(f"{repo}: contains no GGUF, so no quantization {tag!r}; leave :{tag} out")
    requested = tag.upper()
    for names in ((requested,), (f"UD-{requested}",)):  # the second only if nothing has the requested name
        matching = [one for one in found if one.name.upper() in names or _quantization_name(one.stem) in names]
        if matching:
            break
    if len(matching) != 1:
        problem = f"contains {len(matching)} models named" if matching else "contains no model named"
        raise AmbiguousQuant(f"{repo}: {problem} {tag}: choose one of the table", matching or found)
    first = PurePosixPath(matching[0].files[0].path)
    split = SPLIT.match(first.stem)
    if split and len(matching[0].files) != int(split[3]):
        raise BadFile(f"{repo}: contains {len(matching[0].files)} of the {int(split[3])} parts of {matching[0].name}")
    return matching[0]


def _first_names(files: Sequence[File]) -> str:
    names = [file.path for file in files[:3]]
    return ", ".join(names) + (f" and {len(files) - 3} more" if len(files) > 3 else "") if names else "nothing"
