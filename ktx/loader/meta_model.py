"""Reads what transformers needs from a folder, hub id or GGUF file: configuration, meta-device model, tokenizer."""

from __future__ import annotations

import glob
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ktx.errors import BadFile, UsageError
from ktx.families import RULE_FILES
from ktx.hub.file_selection import OTHER_FILES
from ktx.transformers_compat import config_dict, has_causal_lm, text_config
from ktx.utils.json_file import read_object
from ktx.weights.base import WeightSource
from ktx.weights.gguf_files import ggufs_in, is_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_model(model: str | Path, weights: bool = False) -> Path:
    """Returns the path of a folder or GGUF file; resolves a hub id by the hub or its local cache.

    Args:
        model: a path, OWNER/NAME, or OWNER/NAME@REVISION.
        weights: whether safetensors are fetched too.

    Raises:
        BadFile: there is no such path, or the hub id cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return path
    if str(model).count("/") > 1 or str(model).startswith((".", "~", "/")):  # a path, no OWNER/NAME
        raise BadFile(f"{model}: no such folder; `ktx download` fetches a model from a hub")
    return hub_folder(str(model), weights)


def read_config(source: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Returns the transformers configuration of a folder, a hub id, a GGUF file, or a folder with only a GGUF file.

    Of a multimodal model it returns the text model's configuration. Kimi-K2 is read as DeepSeek-V3, whose architecture
    it has.

    Raises:
        BadFile: there is no configuration, it cannot be read, or transformers has no language model for it.
    """
    from transformers import AutoConfig

    path = resolve_model(source)
    if not path.exists():
        raise BadFile(f"{source}: no such file or folder; `ktx download` fetches a model from a hub")
    if is_gguf(path) or (path.is_dir() and not (path / "config.json").exists() and ggufs_in(path)):
        from ktx.weights.gguf_config import config_from_gguf

        return config_from_gguf(path)
    if path.is_file():
        raise BadFile(
            f"{source}: is a file, but its first four bytes are not GGUF's;"
            " --model must be a Hugging Face folder, a hub id or a GGUF file"
        )
    if not (path / "config.json").exists():
        raise BadFile(
            f"{source}: has no config.json; --model must be a Hugging Face folder (its GGUF goes to --weights)"
        )
    read_object(path / "config.json", "configuration")  # transformers' own errors do not name the file
    try:
        config_json = config_dict(str(path))
        if config_json.get("model_type") == "kimi_k2":
            fields = {
                key: value
                for key, value in config_json.items()
                if key not in ("auto_map", "model_type", "architectures")
            }
            kimi: PreTrainedConfig = AutoConfig.for_model(
                "deepseek_v3", architectures=["DeepseekV3ForCausalLM"], **fields
            )
            return kimi
        config: PreTrainedConfig = text_config(
            AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        )
    except Exception as error:  # transformers raises a dozen unrelated types for invalid configurations
        reason = str(error).strip().partition("\n")[0]
        raise BadFile(f"{source}: the configuration cannot be read: {reason[:300]}") from error
    if not (has_causal_lm(config) or "AutoModelForCausalLM" in getattr(config, "auto_map", ())):
        raise BadFile(
            f"{source}: transformers has no built-in language model for model_type {config.model_type}"
            f" (architectures: {', '.join(config.architectures or ()) or 'none'});"
            " use a checkpoint of the text model, or its GGUF"
        )
    return config


def hub_folder(model: str, weights: bool, subfolder: str = "", **client_options: Any) -> Path:
    """Fetches a hub id's configuration, tokenizer, chat template and settings; returns the local folder.

    All files are of one revision.

    Args:
        model: OWNER/NAME or OWNER/NAME@REVISION.
        weights: whether safetensors are fetched too.
        subfolder: a subfolder of the repository, whose files are fetched instead; the repository's root is returned.
        client_options: further arguments of huggingface_hub.snapshot_download.

    Raises:
        BadFile: the files cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    repo, _, revision = model.partition("@")
    names = [*OTHER_FILES, *(("*.safetensors",) if weights else ())]
    prefix = f"{glob.escape(subfolder.strip('/'))}/" if subfolder else ""
    options: dict[str, Any] = {
        "revision": revision or None,
        "local_files_only": HF_HUB_OFFLINE,  # older clients query the hub for a revision's files even then
    }
    try:
        snapshot = snapshot_download(
            repo,
            allow_patterns=[f"{prefix}{name}" for name in names],
            ignore_patterns=[f"{prefix}*/*.safetensors", f"{prefix}consolidated*"],  # other copies of the weights
            **options | client_options,
        )
    except Exception as error:  # the hub client's errors have no common base but Exception
        raise BadFile(
            f"{model}: is no folder and cannot be fetched from the hub: {str(error).splitlines()[0][:200]};"
            f" `ktx download {repo}` fetches a model and reports why it fails"
        ) from error
    return Path(snapshot)


def set_experts_per_token(config: PreTrainedConfig, count: int) -> None:
    """Sets a smaller number of experts per token, for speed. Raises UsageError unless it is 1 to the model's own."""
    trained = getattr(config, "num_experts_per_tok", None)
    if trained is None:
        raise UsageError(f"num_experts_per_tok={count}: {config.model_type} has no experts")
    if not 1 <= count <= trained:
        raise UsageError(
            f"num_experts_per_tok={count}: must be 1 to {trained}, the number that the model was trained with"
        )
    config.num_experts_per_tok = count


def build_meta_model(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns the transformers model on the meta device, where operators can replace modules before memory is needed.

    Families with a rule file use ktx's attention, whose masks are intervals; others use sdpa or eager with mask
    matrices.
    """
    from transformers import AutoModelForCausalLM

    import ktx.ops.attention as attention

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    if config.model_type in RULE_FILES:
        model.config._attn_implementation = attention.NAME
    else:  # an unknown family may read its mask elsewhere too (a sparse indexer), so the mask must be a matrix
        model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    model.eval()
    model.requires_grad_(False)
    return model


def read_tokenizer(model: str | Path, source: WeightSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Returns the folder's tokenizer, or the GGUF file's if the folder has none.

    Raises BadFile if it cannot be read.
    """
    from transformers import AutoTokenizer

    path = resolve_model(model)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if is_gguf(path) or (path.is_dir() and not any((path / name).exists() for name in names)):
        from ktx.weights.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(source.metadata, source.path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=trust_remote_code
        )
        return tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise BadFile(f"{model}: the tokenizer cannot be read: {str(error).strip().splitlines()[0][:300]}") from error


def set_generation_config(model: PreTrainedModel, folder: str | Path, source: WeightSource) -> None:
    """Sets the model's generation configuration from generation_config.json, else from the GGUF's metadata.

    Without generation_config.json all end-of-sequence tokens of the GGUF are added to the model's own.
    """
    from transformers import GenerationConfig

    from ktx.weights.gguf_tokenizer import eog_token_ids, recommended_sampling

    if (Path(folder).expanduser() / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    else:
        eos_ids = model.generation_config.eos_token_id
        eos_ids = [eos_ids] if isinstance(eos_ids, int) else eos_ids or []
        all_eos_ids = [
            *eos_ids,
            *(token_id for token_id in eog_token_ids(source.metadata, source.path) if token_id not in eos_ids),
        ]
        if len(all_eos_ids) > len(eos_ids):
            model.generation_config.eos_token_id = all_eos_ids if len(all_eos_ids) > 1 else all_eos_ids[0]
        model.generation_config.update(**recommended_sampling(source.metadata, source.path))
    # Kernels are opaque to the compiler; compiling around them costs minutes.
    model.generation_config.disable_compile = True
