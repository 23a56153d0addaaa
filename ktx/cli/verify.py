"""ktx verify: compare a loaded model with transformers on the dequantized weights, layer by layer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ktx.cli.arguments import (
    flag,
    infer_model_or_demo,
    load_arguments,
    lora_option,
    model_options,
    options_of,
    positive,
    reject_options,
)

SUMMARY = "compare layer by layer with transformers on the dequantized weights, or measure perplexity"
EPILOG = (
    "Without --model the bundled demo model is compared."
    " Example: ktx verify --model DIR --weights FILE.gguf --rules my_rules.yaml"
)
MAX_ERROR_FLOAT, MAX_ERROR_BF16, MAX_ERROR_QUANTIZED = 1e-3, 1e-2, 0.03  # relative, of a layer on the same input
LOGITS_ERROR_FACTOR = 10  # times a layer's bound: the bound on the median token's logits, after all layers
MAX_REROUTED = 0.5  # fraction of a layer's tokens; more than near ties of the router explain
DEFAULT_TOKENS = 64
Routing = tuple[Any, Any]  # ids and weights of the chosen experts, both [tokens, top-k]
DEFAULT_PROMPT = "The quick brown fox jumps over the lazy dog. A rule file names modules and what replaces them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktx verify` to its parser."""
    parser.epilog = EPILOG
    model_options(parser)
    lora_option(parser, "the sum of all adapters is applied, with --perplexity only")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        default=DEFAULT_PROMPT,
        help="text on which both models are compared (default: two English sentences)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=None,
        metavar="N",
        help="max tokens of the text to use (default 64; with --perplexity all)",
    )
    parser.add_argument(
        "--perplexity",
        metavar="FILE",
        help="measure the perplexity on the text in FILE instead; without a model: of the demo model in every format"
        " that ktx can quantize to",
    )
    parser.add_argument(
        "--against",
        metavar="PATH",
        help="with --perplexity: weights of the same model to compare with, by KL divergence and top-1 agreement",
    )
    parser.add_argument(
        "--window", type=positive, default=512, metavar="N", help="with --perplexity: tokens per forward (default 512)"
    )
    flag(parser, "--json", help="print JSON lines instead of tables")


def run(args: argparse.Namespace) -> int:
    """Compares the model with transformers on the dequantized weights: prints each layer's error, then the logits'.

    With --perplexity, measures perplexity instead.

    Exit status 1 when an error exceeds its bound, 4 when the self-test fails.
    """
    options = options_of(add_arguments)
    if args.perplexity:
        from ktx.cli import perplexity

        reject_options(
            args, {"prompt": options["prompt"]}, "has no effect with --perplexity, which uses the text of its FILE"
        )
        return perplexity.run(args)
    reject_options(args, {name: options[name] for name in ("against", "window")}, "needs --perplexity FILE")
    reject_options(
        args,
        {"lora": options["lora"]},
        "needs --perplexity FILE: the layer-by-layer comparison runs without adapters",
    )
    infer_model_or_demo(args)
    import torch

    import ktx
    from ktx.model import self_test

    load_kwargs = load_arguments(args) | {"self_test": False}  # it runs below, after the layers' errors are printed
    model, tokenizer = ktx.load(args.model, args.weights, args.rules, **load_kwargs)
    ids = torch.tensor([tokenizer(args.prompt)["input_ids"][: args.tokens or DEFAULT_TOKENS]])
    rows, summary = compare(model, args, ids)
    if args.json:
        for row in [*rows, summary]:
            print(json.dumps(row))
    else:
        _print_report(rows, summary)
    if args.self_test:
        self_test.check(model)
    return 0 if summary["ok"] else 1


def compare(model: Any, args: argparse.Namespace, ids: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Compares a loaded model with transformers' modules, layer by layer.

    Rounding may send a token to another expert where a router is nearly tied. Such tokens are counted, and their
    experts are compared on the reference's routing.

    Args:
        model: the model that ktx loaded.
        ids: token ids [1, tokens].

    Returns:
        A row per layer, with the relative error on the same input (`same_input`) and the median token's error
        accumulated since the first layer (`piled_up`); and a summary with error, KL divergence and top-1 agreement
        of the logits.
    """
    import torch

    from ktx.kernels.check import multiplies_in_bf16
    from ktx.quant.types import BF16_EXACT_TYPES
    from ktx.weights.open import open_weights

    source = open_weights(args.weights or args.model, model.config)
    recorded = _record(model, ids)
    reference = _Reference(model, source, args)
    matrices = {spec.qtype for step in model.ktx.plan for spec in step.specs if len(spec.shape) > 1}
    in_bf16_products = multiplies_in_bf16() and any(qtype.name in BF16_EXACT_TYPES for qtype in matrices)
    quantized_types = {args.quantize, args.quantize_experts} - {None, "auto"}
    is_exact = all(qtype.is_float for qtype in matrices) and not quantized_types
    bound = MAX_ERROR_QUANTIZED if not is_exact else MAX_ERROR_BF16 if in_bf16_products else MAX_ERROR_FLOAT
    hidden = reference.embed(ids)
    embedding_error = _error(recorded["inputs"][0], hidden)
    rows: list[dict[str, Any]] = [{"layer": "embed_tokens", "same_input": embedding_error, "piled_up": embedding_error}]
    reference_routing: dict[str, Routing] = {}  # the routing of the reference on its own hidden states
    for i in range(model.config.num_hidden_layers):
        with reference.load_layer(i) as layer:
            with record_routing(reference.model) as routing_same_input:
                expected = layer(recorded["inputs"][i])
            with record_routing(reference.model) as routing_accumulated:
                hidden = layer(hidden)
        reference_routing |= routing_accumulated
        changed = _rerouted_tokens(recorded["choices"], routing_same_input, ids.numel())
        error = _error(recorded["outputs"][i][:, ~changed], expected[:, ~changed])
        if changed.any():
            with torch.inference_mode(), record_routing(model, routing_same_input):
                call_args, kwargs = recorded["calls"][i]
                rerouted = _states(model.model.layers[i](*call_args, **kwargs))
            error = max(error, _error(rerouted, expected))
        rows.append(
            {
                "layer": f"layers.{i}",
                "same_input": error,
                "piled_up": _median_error(recorded["outputs"][i], hidden),
                "changed_choices": int(changed.sum()),
            }
        )
    head_error = _error(recorded["logits"], reference.compute_logits(recorded["outputs"][-1]))
    logits, logits_ours = reference.compute_logits(hidden).float(), recorded["logits"].float()
    if _rerouted_tokens(recorded["choices"], reference_routing, ids.numel()).any():
        with torch.inference_mode(), record_routing(model, reference_routing):
            logits_ours = model(input_ids=ids, use_cache=False).logits.float()
    logits_ours = logits_ours.to(logits.device)
    kl_divergence = (
        torch.nn.functional.kl_div(
            logits_ours.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none"
        )
        .sum(-1)
        .mean()
    )
    top1_agreement = (logits_ours.argmax(-1) == logits.argmax(-1)).float().mean()
    worst_error, max_rerouted = (
        max(row["same_input"] for row in rows),
        max(row.get("changed_choices", 0) for row in rows),
    )
    logits_error = _median_error(logits_ours, logits)
    return rows, {
        "logits_error": logits_error,
        "kl_divergence": max(0.0, float(kl_divergence)),  # rounding may make it slightly negative
        "top1_agreement": float(top1_agreement),
        "worst_layer": worst_error,
        "head_error": head_error,
        "bound": bound,
        "changed_choices": sum(row.get("changed_choices", 0) for row in rows),
        "choices": len(reference_routing) * ids.numel(),
        "ok": max(worst_error, head_error) <= bound
        and logits_error <= LOGITS_ERROR_FACTOR * bound
        and max_rerouted <= MAX_REROUTED * ids.numel(),
    }


def _error(a: Any, b: Any) -> float:
    """Returns the relative error of `a` against the reference `b`, in the Frobenius norm."""
    return float((a.float().to(b.device) - b.float()).norm() / b.float().norm().clamp(min=1e-30))


def _median_error(a: Any, b: Any) -> float:
    """Returns the relative error of the median token; both tensors are [1, tokens, columns]."""
    errors = (a.float().to(b.device) - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp(min=1e-30)
    return float(errors.median())


def _states(output: Any) -> Any:
    """The hidden states in a layer's output, which some versions of transformers return in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _record(model: Any, ids: Any) -> dict[str, Any]:
    """Runs the loaded model and records inputs and outputs of every decoder layer, and the routing, for `compare`.

    The routing is recorded in a second forward, because its hooks make the model run module by module, without
    fused layers.
    """
    import torch

    recorded: dict[str, Any] = {"inputs": [], "outputs": [], "calls": []}

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        recorded["inputs"].append((args[0] if args else kwargs["hidden_states"]).clone())
        recorded["outputs"].append(_states(output).clone())
        recorded["calls"].append((args, kwargs))

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in model.model.layers]
    try:
        with torch.inference_mode():
            recorded["logits"] = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    with torch.inference_mode(), record_routing(model) as recorded["choices"]:
        model(input_ids=ids, use_cache=False)
    return recorded


@contextmanager
def record_routing(model: Any, replacement: Mapping[str, Routing] | None = None) -> Iterator[dict[str, Routing]]:
    """Records the routing that the experts of each block receive while the context is entered, or replaces it.

    Errors of experts can only be compared when both models send a token to the same experts.

    Args:
        replacement: routing by the path of the experts, to pass to them instead of the router's.

    Yields:
        The recorded routing by path: ids and weights [tokens, top-k].
    """
    recorded: dict[str, Routing] = {}

    def make_hook(path: str, store: bool) -> Any:
        """Returns a pre-hook for the experts at `path`, which records the routing that they get if `store`.

        The hook then replaces the routing by that of `replacement`, if it has one for this path.

        `store` is false for the part of a layer's experts that is on a GPU, because it receives the same routing.
        """

        def hook(module: Any, args: Any) -> Any:
            if len(args) < 3 or args[1].is_floating_point():
                return None  # not called with (hidden states, ids, weights) as in transformers 5
            if store:
                recorded[path] = args[1], args[2]
            ids, weights = (replacement or {}).get(path, (None, None))
            if ids is None or ids.shape != args[1].shape:
                return None
            return args[0], ids.to(args[1]), weights.to(args[2]), *args[3:]

        return hook

    hooks = []
    for path, module in model.named_modules():
        experts_path = path.removesuffix(".on_gpu")  # the experts that are placed on the GPU; they get the same routing
        if experts_path.endswith(".experts"):
            hooks.append(module.register_forward_pre_hook(make_hook(experts_path, experts_path == path)))
    try:
        yield recorded
    finally:
        for handle in hooks:
            handle.remove()


def _rerouted_tokens(ours: Mapping[str, Routing], theirs: Mapping[str, Routing], tokens: int) -> Any:
    """Returns a bool tensor [tokens]: whether any block chose a different set of experts for the token."""
    import torch

    changed = torch.zeros(tokens, dtype=torch.bool)
    for path, (ids, _) in theirs.items():
        if path in ours and ours[path][0].shape == ids.shape:
            changed |= (ours[path][0].cpu().sort(-1)[0] != ids.cpu().sort(-1)[0]).any(-1)
    return changed


class _Reference:
    """transformers' own modules, whose weights are loaded one module at a time and freed again."""

    def __init__(self, model: Any, source: Any, args: argparse.Namespace):
        """Builds the model to compare with: transformers' own, with eager attention and the tested model's top-k.

        It is on the meta device, so that it needs no memory for all its weights: a module's weights are loaded when
        the module runs. Only the rotary tables are computed here.
        """
        import copy

        import torch

        from ktx.loader.meta_model import build_meta_model, read_config

        config = copy.deepcopy(read_config(args.model, args.trust_remote_code))
        config.num_experts_per_tok = getattr(model.config, "num_experts_per_tok", None)
        self.model, self.source = build_meta_model(config, torch.float32, args.trust_remote_code), source
        self.model.config._attn_implementation = "eager"
        self.tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        for module in self.model.modules():  # rotary tables are not in the checkpoint
            buffers = dict(module.named_buffers(recurse=False))
            names = [name for name in buffers if name in module._non_persistent_buffers_set]
            for name in names:
                module._buffers[name] = torch.empty_like(buffers[name], device="cpu")
            if names:
                self.model._init_weights(module)

    def load(self, path: str) -> Any:
        """Loads the module at `path`: fills its meta tensors with the tested file's dequantized weights; returns it.

        With the same weights on both sides, a difference comes from the computation and not from quantization.
        """
        import torch

        module = self.model.get_submodule(path)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_meta:
                owner = module.get_submodule(name.rpartition(".")[0])
                values = self.read_values(f"{path}.{name}").reshape(tensor.shape)
                owner_tensors = owner._parameters if name.rpartition(".")[2] in owner._parameters else owner._buffers
                owner_tensors[name.rpartition(".")[2]] = (
                    torch.nn.Parameter(values, requires_grad=False) if owner_tensors is owner._parameters else values
                )
        return module

    def read_values(self, name: str) -> Any:
        """Returns a parameter's values in float32, dequantized, in transformers' layout.

        Raises:
            BadFile: the checkpoint has no tensor for it.
        """
        import torch

        # a tied parameter that the checkpoint lacks has its origin's values
        name = self.tied.get(name, name) if self.source.spec(name) is None else name
        if name.endswith(
            ("experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj")  # fused in transformers
        ) and self._has_separate_gate(name):
            return self._fuse_experts(name)
        if self.source.spec(name) is None:
            from ktx.errors import BadFile

            raise BadFile(f"{self.source.path}: no tensor for {name}")
        values = self.source.get(name).dequantize()
        return values.to(torch.float32)

    def _has_separate_gate(self, name: str) -> bool:
        """Whether the source has gate and up of these experts separately, as ktx requests them."""
        return self.source.spec(name.replace("gate_up_proj", "gate_proj")) is not None

    def _fuse_experts(self, name: str) -> Any:
        """Returns transformers' fused parameter of all experts, from the separate matrices that ktx reads.

        Gate and up are concatenated; in gpt-oss they are interleaved, and all matrices are transposed.
        """
        import torch

        is_gpt_oss = self.model.config.model_type == "gpt_oss"
        if "gate_up" not in name:
            down = self.source.get(name).dequantize()
            return down.transpose(1, 2).contiguous() if is_gpt_oss else down
        gate, up = (
            self.source.get(name.replace("gate_up_proj", projection)).dequantize()
            for projection in ("gate_proj", "up_proj")
        )
        if not is_gpt_oss:
            return torch.cat([gate, up], 1)
        if name.endswith("_bias"):
            return torch.stack([gate, up], 2).flatten(1, 2)
        return torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous()

    def free(self, path: str) -> None:
        """Frees the weights of the module at `path`."""
        import torch

        module = self.model.get_submodule(path)
        for owner in module.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    owner._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    def embed(self, ids: Any) -> Any:
        """Returns the embeddings [1, tokens, columns] of token ids [1, tokens]."""
        import torch

        self.ids = ids
        with torch.inference_mode():
            out = self.load("model.embed_tokens")(ids)
        self.free("model.embed_tokens")
        return out

    def load_layer(self, index: int) -> Any:
        """Returns a context in which a decoder layer is loaded; it yields the layer as a function of hidden states."""
        from contextlib import contextmanager

        import torch

        @contextmanager
        def loaded() -> Any:
            """Loads the layer's weights on entry and frees them on exit, so that one layer is in memory at a time."""
            path = f"model.layers.{index}"
            module = self.load(path)

            def call(hidden: Any) -> Any:
                with torch.inference_mode():
                    return _call_layer(self.model, module, index, hidden)

            try:
                yield call
            finally:
                self.free(path)

        return loaded()

    def compute_logits(self, hidden: Any) -> Any:
        """Returns the logits of the last layer's hidden states."""
        import torch

        with torch.inference_mode():
            return self.load("lm_head")(self.load("model.norm")(hidden))


def _call_layer(model: Any, layer: Any, index: int, hidden: Any) -> Any:
    """Calls a decoder layer as its model does, with the masks and position embeddings that the model computes.

    Runs the model's own forward, in which the other layers are replaced by ones that do nothing and the final norm
    by the identity.
    """
    import torch

    inner = model.model
    saved = inner.layers, inner.norm, inner.config.num_hidden_layers
    outputs: list[Any] = []

    class Recorder(torch.nn.Module):
        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            out = layer(hidden_states, *args, **kwargs)
            outputs.append(out[0] if isinstance(out, tuple) else out)
            return out

    recorder, identity = Recorder(), torch.nn.Identity()
    for name in ("attention_type", "layer_type", "layer_idx"):  # read by some models to choose a layer's mask
        if hasattr(layer, name):
            setattr(recorder, name, getattr(layer, name))
    skipped = [_skip_layer() for _ in range(index)]
    inner.layers, inner.norm = torch.nn.ModuleList([*skipped, recorder]), identity
    inner.config.num_hidden_layers = index + 1
    try:
        inner(inputs_embeds=hidden, use_cache=False)
    finally:
        inner.layers, inner.norm, inner.config.num_hidden_layers = saved
    return outputs[0]


def _skip_layer() -> Any:
    """Returns a decoder layer that does nothing, in the place of one that is not measured (see `_call_layer`)."""
    import torch

    class Skip(torch.nn.Module):
        attention_type = layer_type = "full_attention"

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states

    return Skip()


def _print_report(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Prints a row per layer, the error of the logits, and whether the model agrees with transformers."""
    counts = summary["choices"]
    print(
        f"{'layer':16}{'error on the same input':>26}{'accumulated error':>18}"
        + (f"{'other experts':>16}" if counts else "")
    )
    for row in rows:
        mark = "  <- exceeds the bound" if row["same_input"] > summary["bound"] else ""
        changed = f"{row.get('changed_choices', 0):>16}" if counts else ""
        print(f"{row['layer']:16}{row['same_input']:>26.2e}{row['piled_up']:>18.2e}{changed}{mark}")
    print(
        f"logits: relative error {summary['logits_error']:.2e}, KL divergence {summary['kl_divergence']:.2e},"
        f" top-1 agreement {summary['top1_agreement']:.1%}; output layer {summary['head_error']:.2e}"
    )
    if summary["changed_choices"]:
        print(
            f"{summary['changed_choices']} of {counts} routing decisions chose other experts than transformers;"
            " errors are computed with transformers' choice"
        )
    verdict = "agrees with" if summary["ok"] else "DIFFERS from"
    print(f"{verdict} transformers: worst layer {summary['worst_layer']:.2e}, bound {summary['bound']:.0e}")
