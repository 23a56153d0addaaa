"""Export the trained network as a Hugging Face folder and a GGUF: ``python -m tools.demo.export --work DIR``.

The folder has DeepSeek's own tensor names (one tensor per expert, the MTP layer as layer 3); the GGUF has the layout
of llama.cpp's converter and ``llama-quantize``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ktx import demo
from ktx.demo.gguf_writer import State, write_gguf
from tools.demo.model import SETTINGS


def deepseek_names(state: State, layers: int) -> State:
    """Converts a training state dict to names and types of DeepSeek's checkpoints.

    Matrices and norms become BF16, the correction bias F32.
    """
    converted: State = {}
    for name, value in state.items():
        name = (
            name.replace("mtp.", f"model.layers.{layers}.", 1)
            if name.startswith("mtp.")
            else name.removeprefix("main.")
        )
        value = value.float() if name.endswith("e_score_correction_bias") else value.bfloat16()
        path, _, last = name.rpartition(".experts.")
        if last == "gate_up_proj":
            for expert, pair in enumerate(value):
                gate, up = pair.chunk(2)
                converted[f"{path}.experts.{expert}.gate_proj.weight"] = gate.contiguous()
                converted[f"{path}.experts.{expert}.up_proj.weight"] = up.contiguous()
        elif last == "down_proj":
            converted |= {f"{path}.experts.{e}.down_proj.weight": matrix.contiguous() for e, matrix in enumerate(value)}
        else:
            converted[name] = value.contiguous()
    return converted


def write_folder(state: State, settings: dict[str, Any], folder: Path) -> None:
    """Writes model.safetensors, config.json and generation_config.json next to the tokenizer that training wrote."""
    from safetensors.torch import save_file

    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **settings,
        "torch_dtype": "bfloat16",
    }
    special_ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    save_file(deepseek_names(state, settings["num_hidden_layers"]), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special_ids | {"do_sample": False}, indent=1) + "\n")


def main() -> None:
    """Exports the checkpoint of a training run, and prints the sizes of the files."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.export", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="folder with checkpoint.pt (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=demo.path(), help="folder to write to (default: %(default)s)")
    args = parser.parse_args()
    write_folder(torch.load(args.work / "checkpoint.pt", map_location="cpu")["net"], SETTINGS, args.out)
    write_gguf(args.out, args.out / demo.gguf().name, "Q4_K_M")
    for file in sorted(args.out.iterdir()):
        print(f"{file.stat().st_size:>10,}  {file}")


if __name__ == "__main__":
    main()
