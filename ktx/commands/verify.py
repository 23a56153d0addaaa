"""ktx verify: compare a loaded model with transformers on the dequantised weights, layer by layer."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ktx.commands.arguments import flag, load_options, model_options, options_of, positive, refuse, require_model

SUMMARY = "compare layer by layer with transformers on the dequantised weights, or measure perplexity"
BOUND_FLOAT, BOUND_BF16, BOUND_QUANTISED = 1e-3, 1e-2, 0.03
TOKENS = 64
TEXT = "The quick brown fox jumps over the lazy dog. A rule file names modules and what replaces them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--prompt", metavar="TEXT", default=TEXT, help="text that is run through the model")
    parser.add_argument(
        "--tokens",
        type=positive,
        default=None,
        metavar="N",
        help="most tokens of it (default 64; of a --perplexity text all)",
    )
    parser.add_argument(
        "--perplexity",
        metavar="FILE",
        help="how well FILE's text is predicted; without a model: by the demo model in every format that can be made here",
    )
    parser.add_argument(
        "--against",
        metavar="PATH",
        help="with --perplexity: other weights of the model, to measure the KL divergence from",
    )
    parser.add_argument(
        "--window", type=positive, default=512, metavar="N", help="tokens predicted at once (default 512)"
    )
    flag(parser, "--json", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """One line a layer, then the logits; exit status 1 when an error is over its bound. With --perplexity, that instead."""
    options = options_of(add_arguments)
    if args.perplexity:
        from ktx.commands import perplexity

        refuse(args, {"prompt": options["prompt"]}, "is not read with --perplexity, which predicts its FILE")
        return perplexity.run(args)
    refuse(args, {name: options[name] for name in ("against", "window")}, "goes with --perplexity FILE")
    require_model(args)
    import torch

    import ktx

    model, tokenizer = ktx.load(args.model, args.weights, args.rules, **load_options(args))
    ids = torch.tensor([tokenizer(args.prompt)["input_ids"][: args.tokens or TOKENS]])
    rows, summary = compare(model, args, ids)
    if args.json:
        for row in [*rows, summary]:
            print(json.dumps(row))
    else:
        _show(rows, summary)
    return 0 if summary["ok"] else 1


def compare(model: Any, args: argparse.Namespace, ids: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Per layer: error on the same input, and error piled up since the first layer; then KL divergence and top-1 of the logits."""
    import torch

    from ktx.kernels.check import IN_BF16, in_bf16
    from ktx.weights.source import open_weights

    source = open_weights(args.weights or args.model, model.config)
    taken = _record(model, ids)
    reference = _Reference(model, source, args)
    matrices = {spec.qtype for step in model.ktx.plan for spec in step.specs if len(spec.shape) > 1}
    rounded = in_bf16() and any(qtype.name in IN_BF16 for qtype in matrices)
    made = {args.dtype, args.moe_dtype} - {None, "auto"}
    exact = all(qtype.is_float for qtype in matrices) and not made
    bound = BOUND_QUANTISED if not exact else BOUND_BF16 if rounded else BOUND_FLOAT
    rows: list[dict[str, Any]] = []
    stream = reference.embed(ids)
    rows.append(
        {
            "layer": "embed_tokens",
            "same_input": _error(taken["inputs"][0], stream),
            "piled_up": _error(taken["inputs"][0], stream),
        }
    )
    for i in range(model.config.num_hidden_layers):
        with reference.layer(i) as layer:
            same = layer(taken["inputs"][i])
            stream = layer(stream)
        rows.append(
            {
                "layer": f"layers.{i}",
                "same_input": _error(taken["outputs"][i], same),
                "piled_up": _error(taken["outputs"][i], stream),
            }
        )
    logits = reference.head(stream).float()
    mine = taken["logits"].float()
    kl = (
        torch.nn.functional.kl_div(mine.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .mean()
    )
    top = (mine.argmax(-1) == logits.argmax(-1)).float().mean()
    worst = max(row["same_input"] for row in rows)
    return rows, {
        "logits_error": _error(mine, logits),
        "kl_divergence": max(0.0, float(kl)),  # rounding may make it a hair less
        "top1_agreement": float(top),
        "worst_layer": worst,
        "bound": bound,
        "ok": worst <= bound,
    }


def _error(a: Any, b: Any) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))


def _record(model: Any, ids: Any) -> dict[str, Any]:
    """Runs the loaded model once and keeps what goes into and comes out of every decoder layer."""
    import torch

    taken: dict[str, Any] = {"inputs": [], "outputs": []}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        taken["inputs"].append((args[0] if args else kwargs["hidden_states"]).clone())
        taken["outputs"].append((output[0] if isinstance(output, tuple) else output).clone())

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in model.model.layers]
    try:
        with torch.inference_mode():
            taken["logits"] = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return taken


class _Reference:
    """transformers' own modules, filled from the file one at a time and emptied again."""

    def __init__(self, model: Any, source: Any, args: argparse.Namespace):
        import copy

        import torch

        from ktx.skeleton import read_config, skeleton

        config = copy.deepcopy(read_config(args.model, args.trust_remote_code))
        config.num_experts_per_tok = getattr(model.config, "num_experts_per_tok", None)
        self.built, self.source = skeleton(config, torch.float32, args.trust_remote_code), source
        self.built.config._attn_implementation = "eager"
        self.tied = dict(getattr(self.built, "all_tied_weights_keys", None) or {})
        for module in self.built.modules():  # rotary tables are no weights
            names = [n for n, b in module.named_buffers(recurse=False) if n in module._non_persistent_buffers_set]
            for name in names:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if names:
                self.built._init_weights(module)

    def fill(self, path: str) -> Any:
        """The module with its weights dequantised."""
        import torch

        module = self.built.get_submodule(path)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_meta:
                owner = module.get_submodule(name.rpartition(".")[0])
                values = self.values(f"{path}.{name}").reshape(tensor.shape)
                table = owner._parameters if name.rpartition(".")[2] in owner._parameters else owner._buffers
                table[name.rpartition(".")[2]] = (
                    torch.nn.Parameter(values, requires_grad=False) if table is owner._parameters else values
                )
        return module

    def values(self, name: str) -> Any:
        import torch

        name = self.tied.get(name, name) if self.source.spec(name) is None else name
        if name.endswith(
            ("experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj")
        ) and self._made_of_halves(name):
            return self._experts(name)
        if self.source.spec(name) is None:
            from ktx.errors import BadFile

            raise BadFile(f"{self.source.path}: no tensor for {name}")
        values = self.source.get(name).dequantize()
        return values.to(torch.float32)

    def _made_of_halves(self, name: str) -> bool:
        return self.source.spec(name.replace("gate_up_proj", "gate_proj")) is not None

    def _experts(self, name: str) -> Any:
        """transformers' fused form: gate over up, or gpt-oss's interleaved and transposed one."""
        import torch

        oss = self.built.config.model_type == "gpt_oss"
        if "gate_up" not in name:
            down = self.source.get(name).dequantize()
            return down.transpose(1, 2).contiguous() if oss else down
        gate, up = (
            self.source.get(name.replace("gate_up_proj", half)).dequantize() for half in ("gate_proj", "up_proj")
        )
        if not oss:
            return torch.cat([gate, up], 1)
        if name.endswith("_bias"):
            return torch.stack([gate, up], 2).flatten(1, 2)
        return torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous()

    def empty(self, path: str) -> None:
        import torch

        module = self.built.get_submodule(path)
        for owner in module.modules():
            for name, p in list(owner._parameters.items()):
                if p is not None:
                    owner._parameters[name] = torch.nn.Parameter(p.to("meta"), requires_grad=False)

    def embed(self, ids: Any) -> Any:
        import torch

        self.ids = ids
        with torch.inference_mode():
            out = self.fill("model.embed_tokens")(ids)
        self.empty("model.embed_tokens")
        return out

    def layer(self, index: int) -> Any:
        """A context that holds one filled layer as a function of hidden states."""
        from contextlib import contextmanager

        import torch

        @contextmanager
        def filled() -> Any:
            path = f"model.layers.{index}"
            module = self.fill(path)

            def call(hidden: Any) -> Any:
                with torch.inference_mode():
                    return _call_layer(self.built, module, index, hidden)

            try:
                yield call
            finally:
                self.empty(path)

        return filled()

    def head(self, hidden: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.fill("lm_head")(self.fill("model.norm")(hidden))


def _call_layer(built: Any, layer: Any, index: int, hidden: Any) -> Any:
    """A decoder layer as its model calls it: the model's own forward with all other layers, embedding and norm taken out."""
    import torch

    inner = built.model
    kept = inner.layers, inner.norm, inner.config.num_hidden_layers
    taken: list[Any] = []

    class Here(torch.nn.Module):
        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            out = layer(hidden_states, *args, **kwargs)
            taken.append(out[0] if isinstance(out, tuple) else out)
            return out

    here, idle = Here(), torch.nn.Identity()
    for name in ("attention_type", "layer_type", "layer_idx"):
        if hasattr(layer, name):
            setattr(here, name, getattr(layer, name))
    skip = [_Skip() for _ in range(index)]
    inner.layers, inner.norm = torch.nn.ModuleList([*skip, here]), idle
    inner.config.num_hidden_layers = index + 1
    try:
        inner(inputs_embeds=hidden, use_cache=False)
    finally:
        inner.layers, inner.norm, inner.config.num_hidden_layers = kept
    return taken[0]


def _Skip() -> Any:  # noqa: N802
    import torch

    class Skip(torch.nn.Module):
        attention_type = layer_type = "full_attention"

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states

    return Skip()


def _show(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    print(f"{'layer':16}{'error on the same input':>26}{'error piled up':>18}")
    for row in rows:
        mark = "  <- over the bound" if row["same_input"] > summary["bound"] else ""
        print(f"{row['layer']:16}{row['same_input']:>26.2e}{row['piled_up']:>18.2e}{mark}")
    print(
        f"logits: relative error {summary['logits_error']:.2e}, KL divergence {summary['kl_divergence']:.2e}, top-1 agreement {summary['top1_agreement']:.1%}"
    )
    verdict = "agrees with" if summary["ok"] else "DIFFERS from"
    print(f"{verdict} transformers: worst layer {summary['worst_layer']:.2e}, bound {summary['bound']:.0e}")
