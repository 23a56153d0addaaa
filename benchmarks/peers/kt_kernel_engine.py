"""kt-kernel's process for compare.py: the expert kernels of the kt-kernel wheel (0.7).

It speaks the protocol of ktx.cli.bench_layer. kt-kernel's Python wrapper pins memory and needs CUDA; the classes below
it do not. If its workers use all cores, its waiting caller takes one away from them: so each layer is also built with
one worker fewer, and the better result counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from ktx.cli.bench_moe_layer import (
    CHECKED_TOKENS,
    MoELayer,
    milliseconds,
    parse_engine_args,
    reference_output,
    serve_tests,
)
from ktx.kernels.check import relative_error

ROUND = 32  # numbers of tokens are rounded up to this: its kernels write whole tiles
GROUP_SIZE = 32  # weights per scale of RAWINT4
CLASSES = {
    "AMXINT8": "AMXInt8_MOE",
    "AMXINT4": "AMXInt4_MOE",
    "BF16": "AMXBF16_MOE",
}  # take bf16 weights and quantize them


def main() -> int:
    """Builds layers from the same weights as ktx and measures them."""
    args = parse_engine_args()
    layer: MoELayer = args.layer
    out = os.fdopen(os.dup(1), "w")  # the wheel prints to standard output
    os.dup2(2, 1)
    try:
        import kt_kernel
        from kt_kernel import kt_kernel_ext as ext
    except ImportError as error:
        text = f"kt-kernel is not installed ({error}): pip install --no-deps kt-kernel"
        print(json.dumps({"error": text, "exit": 1}), file=out, flush=True)
        return 1
    import torch

    torch.set_num_threads(args.threads)
    weights, pools = layer.weights(), []
    for threads in range(max(1, args.threads - 1), args.threads + 1):
        pool = ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        pools.append(ext.CPUInfer(pool))

    def build(name: str) -> Callable[[int], dict[str, float]]:
        layers = [build_layer(ext, workers, layer, weights, name) for workers in pools]

        def best(tokens: int) -> dict[str, float]:
            return min((measure(tokens) for measure in layers), key=lambda row: row["ms"])

        return best

    version = f"{kt_kernel.__version__} {kt_kernel.__cpu_variant__}"
    serve_tests({"ready": True, "version": version, "formats": [*CLASSES, "RAWINT4", "LLAMAFILE"]}, build, out)
    return 0


def build_layer(
    ext: Any, workers: Any, layer: MoELayer, weights: list[Any], name: str
) -> Callable[[int], dict[str, float]]:
    """Builds a layer in one of kt-kernel's formats and returns a function that measures it with a number of tokens."""
    import torch

    from ktx.quant.types import QTYPES

    max_tokens = 4096
    config = ext.moe.MOEConfig(layer.experts, layer.top, layer.hidden, layer.width, 0)
    config.layer_idx, config.pool, config.max_len = 0, workers.backend_, max_tokens
    names, tensors = ("gate_proj", "up_proj", "down_proj"), [*weights]
    if name in CLASSES:
        config.gate_scale = 0
        cls = getattr(ext.moe, CLASSES[name])
    elif name == "RAWINT4":
        pairs = [int4(w) for w in weights]
        tensors = [codes for codes, _ in pairs]
        for field, (_, scale) in zip(("gate_scale", "up_scale", "down_scale"), pairs, strict=True):
            setattr(config, field, scale.data_ptr())
        tensors += [scale for _, scale in pairs]
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, GROUP_SIZE, False
        cls = ext.moe.AMXInt4_KGroup_MOE
    else:
        types = ("Q4_K", "Q4_K", "Q6_K")
        # the same blocks as ktx
        tensors = [QTYPES[t].quantize(w.flatten(0, 1).float()) for w, t in zip(weights, types, strict=True)]
        config.gate_type, config.up_type, config.down_type = (getattr(ext.kvcache.ggml_type, t) for t in types)
        config.hidden_type = ext.kvcache.ggml_type.BF16
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, max_tokens
        cls = ext.moe.MOE
    for field, data in zip(names, tensors, strict=False):
        setattr(config, field, data.data_ptr())
    moe = cls(config)
    order = torch.arange(layer.experts, dtype=torch.int64)
    workers.submit(moe.load_weights_task(order.data_ptr()))
    workers.sync()

    # the default argument keeps the tensors alive, because the layer may point into them
    def measure(tokens: int, tensors_alive: Any = tensors) -> dict[str, float]:
        """Returns milliseconds per forward of kt-kernel, and its relative error against the f32 reference."""
        x, ids, routing_weights = layer.call(tokens)
        ids, routing_weights, result = ids.contiguous(), routing_weights.contiguous(), torch.zeros_like(x)

        def forward() -> None:
            count = torch.tensor([tokens], dtype=torch.int32)  # the kernel may write to it
            args = (
                count.data_ptr(),
                layer.top,
                ids.data_ptr(),
                routing_weights.data_ptr(),
                x.data_ptr(),
                result.data_ptr(),
                False,
            )
            workers.submit(moe.forward_task(*args))
            workers.sync()

        forward()
        checked = slice(0, CHECKED_TOKENS)
        error = relative_error(
            result[checked], reference_output(weights, x[checked], ids[checked], routing_weights[checked])
        )
        return {"ms": milliseconds(forward), "relative_error": error}

    return measure


def int4(w: Any) -> tuple[Any, Any]:
    """Quantizes to 4 bits, as RAWINT4 stores them.

    Returns:
        Codes plus 8, the even column in the low half of a byte; and a bf16 scale per GROUP_SIZE columns.
    """
    import torch

    blocks = w.float().unflatten(-1, (-1, GROUP_SIZE))
    scale = (blocks.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).bfloat16()
    codes = ((blocks / scale.float()).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2))
    return (codes[..., 0] | codes[..., 1] << 4).contiguous(), scale.squeeze(-1).contiguous()


if __name__ == "__main__":
    raise SystemExit(main())
