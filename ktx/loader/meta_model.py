"""What transformers makes of a folder, a hub id or a GGUF file: configuration, model without weights, tokenizer."""

from __future__ import annotations

import glob
import warnings
from pathlib import Path
from typing import Any

import torch

from ktx.errors import BadFile, UsageError
from ktx.hub.file_selection import BESIDE
from ktx.injection.rules import FILES
from ktx.transformers_compat import config_dict, text_part, writes_text
from ktx.utils.json_file import read_object
from ktx.weights.base import WeightSource
from ktx.weights.gguf_files import ggufs_in, is_gguf


def located(model: str | Path, weights: bool = False) -> Path:
    """The folder or GGUF file that a name means: a hub id's files, with safetensors if `weights`, come from the hub or its cache (OWNER/NAME, or OWNER/NAME@REVISION)."""
    path = Path(model).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return path
    if str(model).count("/") > 1 or str(model).startswith((".", "~", "/")):
        raise BadFile(f"{model}: no such folder; `ktx download` fetches a model from a hub")
    return hub_folder(str(model), weights)


def read_config(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a folder, hub id or GGUF file (or a folder of nothing else); of text and pictures the text's. Kimi-K2 is DeepSeek-V3 under another name."""
    from transformers import AutoConfig

    path = located(source)
    if not path.exists():
        raise BadFile(f"{source}: no such file or folder; `ktx download` fetches a model from a hub")
    if is_gguf(path) or (path.is_dir() and not (path / "config.json").exists() and ggufs_in(path)):
        from ktx.weights.gguf_config import config_from_gguf

        return config_from_gguf(path)
    if path.is_file():
        raise BadFile(
            f"{source}: is a file, but no GGUF by its first four bytes; --model must be a Hugging Face folder, a hub id or a GGUF file"
        )
    if not (path / "config.json").exists():
        raise BadFile(
            f"{source}: has no config.json; --model must be a Hugging Face folder (its GGUF goes to --weights)"
        )
    read_object(path / "config.json", "configuration")  # errors of transformers' name no file
    try:
        raw = config_dict(str(path))
        if raw.get("model_type") == "kimi_k2":
            keep = {key: value for key, value in raw.items() if key not in ("auto_map", "model_type", "architectures")}
            return AutoConfig.for_model("deepseek_v3", architectures=["DeepseekV3ForCausalLM"], **keep)
        config = text_part(AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code))
    except Exception as error:  # transformers raises a dozen unrelated types for what a config.json can say
        first = str(error).strip().partition("\n")[0]
        raise BadFile(f"{source}: no configuration: {first[:300]}") from error
    if not (writes_text(config) or "AutoModelForCausalLM" in getattr(config, "auto_map", ())):
        raise BadFile(
            f"{source}: transformers has no language model by itself for a {config.model_type}"
            f" (architectures: {', '.join(config.architectures or ()) or 'none'}); take a checkpoint of the text model, or its GGUF"
        )
    return config


def hub_folder(model: str, weights: bool, below: str = "", **asked: Any) -> Path:
    """Where the files of a hub id are: configuration, tokenizer, template and settings, from one revision, and its safetensors where they are wanted; of a folder `below` its root those in that folder.

    `asked` are further arguments of the hub's client.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    repo, _, revision = model.partition("@")
    wanted = [*BESIDE, *(("*.safetensors",) if weights else ())]
    begin = f"{glob.escape(below.strip('/'))}/" if below else ""
    usual: dict[str, Any] = {
        "revision": revision or None,
        "local_files_only": HF_HUB_OFFLINE,  # older clients ask the hub for the files of a revision even then
    }
    try:
        found = snapshot_download(
            repo,
            allow_patterns=[f"{begin}{name}" for name in wanted],
            ignore_patterns=[f"{begin}*/*.safetensors", f"{begin}consolidated*"],
            **usual | asked,
        )
    except Exception as error:  # the hub client's errors have no common base but Exception
        raise BadFile(
            f"{model}: is no folder and cannot be fetched from the hub: {str(error).splitlines()[0][:200]};"
            f" `ktx download {repo}` fetches a model and says why it cannot"
        ) from error
    return Path(found)


def fewer_experts(config: Any, count: int) -> None:
    usual = getattr(config, "num_experts_per_tok", None)
    if usual is None:
        raise UsageError(f"moe_experts={count}: {config.model_type} has no experts")
    if not 1 <= count <= usual:
        raise UsageError(f"moe_experts={count}: must be 1 to {usual}, what the model was trained with")
    config.num_experts_per_tok = count


def skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The transformers model on the meta device; masks are intervals for our attention kernel in the families that we know."""
    from transformers import AutoModelForCausalLM

    import ktx.ops.attention as attention

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if config.model_type in FILES:
        model.config._attn_implementation = attention.NAME
    else:  # a family nobody here has read may use its mask elsewhere too (a sparse indexer): then it must be a matrix
        model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    return model.eval().requires_grad_(False)


def read_tokenizer(model: str | Path, source: WeightSource, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, or the GGUF's own when the folder has none."""
    from transformers import AutoTokenizer

    path = located(model)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if is_gguf(path) or (path.is_dir() and not any((path / name).exists() for name in names)):
        from ktx.weights.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(source.metadata, source.path)
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BadFile(f"{model}: no tokenizer: {str(error).strip().splitlines()[0][:300]}") from error


def generation(model: Any, folder: str | Path, source: WeightSource) -> None:
    """The folder's generation settings; where it has none, those of a GGUF file, whose every end of an answer counts too."""
    from transformers import GenerationConfig

    from ktx.weights.gguf_tokenizer import end_tokens, sampling_in

    if (Path(folder).expanduser() / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    else:
        own = model.generation_config.eos_token_id
        own = [own] if isinstance(own, int) else own or []
        ends = [*own, *(number for number in end_tokens(source.metadata, source.path) if number not in own)]
        if len(ends) > len(own):
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.generation_config.update(**sampling_in(source.metadata, source.path))
    model.generation_config.disable_compile = (
        True  # kernels are opaque to the compiler; compiling around them costs minutes
    )
