"""Opens a checkpoint of any format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ktx.errors import BadFile
from ktx.weights.base import WeightSource
from ktx.weights.gguf import GGUFSource
from ktx.weights.gguf_files import ggufs_in, is_gguf
from ktx.weights.packed import PackedSource, is_packed
from ktx.weights.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def open_weights(path: str | Path, config: PreTrainedConfig) -> WeightSource:
    """Opens a checkpoint; reads headers only.

    Args:
        path: a GGUF file (any part of a split one), a folder with one model's GGUF files, or a safetensors file, index
            or folder.
        config: the transformers configuration of the model.

    Raises:
        BadFile: the path is missing, damaged, ambiguous or of an unknown format.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise BadFile(f"{path}: no such file or folder; pass a GGUF file, a safetensors file, or a folder of either")
    if source.is_file() and is_gguf(source):
        return GGUFSource(source, config)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    ggufs = ggufs_in(source) if source.is_dir() else []
    tensors = [file for file in files if file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")]
    tensors = [file for file in tensors if file not in ggufs]
    if ggufs and tensors and source.is_dir():
        raise BadFile(
            f"{path}: contains both GGUF ({ggufs[0].name}) and safetensors ({tensors[0].name}); pass the one to load"
        )
    if tensors:
        return PackedSource(source, config) if is_packed(source) else SafetensorsSource(source, config)
    if ggufs or source.is_file():
        return GGUFSource(source, config)
    raise BadFile(f"{path}: no .gguf and no .safetensors file in this folder")
