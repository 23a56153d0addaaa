"""Answers with and without a LoRA adapter: in an engine each request chooses its adapter, or none.

    python examples/lora.py [--adapter DIR_OR_FILE] [--prompt TEXT]

The adapter is a PEFT folder or a llama.cpp GGUF file for the demo model. Without --adapter, examples/train_lora.py
trains one first, which needs peft.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import ktx
import ktx.demo
from ktx.engine.request import Finished, TokenEvent
from ktx.engine.sampler import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", metavar="PATH", help="PEFT folder or GGUF file (default: train one)")
    parser.add_argument(
        "--prompt", default="Where does the lighthouse keeper sleep?", metavar="TEXT", help="text to continue"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapter = args.adapter or str(Path(folder) / "lighthouse")
        if not args.adapter:
            script = Path(__file__).with_name("train_lora.py")
            subprocess.run([sys.executable, str(script), "--out", adapter], check=True)
        model, _ = ktx.load(ktx.demo.path(), ktx.demo.gguf(), lora=f"mine={adapter}")
    with model.ktx.engine(cache_lens=4096) as engine:
        for label, lora in (("with the adapter", "mine"), ("without", ())):
            events = engine.generate([args.prompt], SamplingParams(max_new_tokens=24), lora=lora)
            text = "".join(event.text for _, event in events if isinstance(event, TokenEvent | Finished))
            print(f"{label}: {args.prompt}{text}")


if __name__ == "__main__":
    main()
