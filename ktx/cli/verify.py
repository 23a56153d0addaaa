"""ktx verify: compare a loaded model with transformers on the dequantised weights, layer by layer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ktx.cli.arguments import (
    flag,
    load_options,
    lora_option,
    model_options,
    options_of,
    positive,
    refuse,
    require_model,
)

SUMMARY = "compare layer by layer with transformers on the dequantised weights, or measure perplexity"
BOUND_FLOAT, BOUND_BF16, BOUND_QUANTISED = 1e-3, 1e-2, 0.03
PILED = 10  # times a layer's bound: what all layers together may come to in the logits of the median token
MOST_CHANGED = 0.5  # of a layer's tokens: more than near ties
TOKENS = 64
Choice = tuple[Any, Any]
TEXT = "The quick brown fox jumps over the lazy dog. A rule file names modules and what replaces them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    lora_option(parser, "their sum counts with --perplexity")
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
    """One line a layer, then the logits; exit status 1 when an error is over its bound, 4 when the self-test fails. With --perplexity, that instead."""
    options = options_of(add_arguments)
    if args.perplexity:
        from ktx.cli import perplexity

        refuse(args, {"prompt": options["prompt"]}, "is not read with --perplexity, which predicts its FILE")
        return perplexity.run(args)
    refuse(args, {name: options[name] for name in ("against", "window")}, "goes with --perplexity FILE")
    refuse(
        args,
        {"lora": options["lora"]},
        "goes with --perplexity FILE: layers are compared with transformers' without any",
    )
    require_model(args)
    import torch

    import ktx
    from ktx.model import self_test

    untested = load_options(args) | {"self_test": False}  # what it finds is to be shown beside the layers
    model, tokenizer = ktx.load(args.model, args.weights, args.rules, **untested)
    ids = torch.tensor([tokenizer(args.prompt)["input_ids"][: args.tokens or TOKENS]])
    rows, summary = compare(model, args, ids)
    if args.json:
        for row in [*rows, summary]:
            print(json.dumps(row))
    else:
        _show(rows, summary)
    if not args.no_self_test:
        self_test.check(model)
    return 0 if summary["ok"] else 1


def compare(model: Any, args: argparse.Namespace, ids: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Per layer: error on the same input, and of the median token since the first layer; then error, KL divergence and top-1 of the logits.

    A rounding may send a token to another expert where a router is undecided. Such tokens are counted, and their experts compared on the reference's choice.
    """
    import torch

    from ktx.kernels.check import IN_BF16, in_bf16
    from ktx.weights.base import open_weights

    source = open_weights(args.weights or args.model, model.config)
    taken = _record(model, ids)
    reference = _Reference(model, source, args)
    matrices = {spec.qtype for step in model.ktx.plan for spec in step.specs if len(spec.shape) > 1}
    rounded = in_bf16() and any(qtype.name in IN_BF16 for qtype in matrices)
    made = {args.dtype, args.moe_dtype} - {None, "auto"}
    exact = all(qtype.is_float for qtype in matrices) and not made
    bound = BOUND_QUANTISED if not exact else BOUND_BF16 if rounded else BOUND_FLOAT
    stream = reference.embed(ids)
    embedded = _error(taken["inputs"][0], stream)
    rows: list[dict[str, Any]] = [{"layer": "embed_tokens", "same_input": embedded, "piled_up": embedded}]
    wanted: dict[str, Choice] = {}  # of the reference by itself
    for i in range(model.config.num_hidden_layers):
        with reference.layer(i) as layer:
            with choices(reference.built) as theirs:
                same = layer(taken["inputs"][i])
            with choices(reference.built) as own:
                stream = layer(stream)
        wanted |= own
        changed = _changed(taken["choices"], theirs, ids.numel())
        error = _error(taken["outputs"][i][:, ~changed], same[:, ~changed])
        if changed.any():
            with torch.inference_mode(), choices(model, theirs):
                words, more = taken["calls"][i]
                forced = _states(model.model.layers[i](*words, **more))
            error = max(error, _error(forced, same))
        rows.append(
            {
                "layer": f"layers.{i}",
                "same_input": error,
                "piled_up": _median_error(taken["outputs"][i], stream),
                "changed_choices": int(changed.sum()),
            }
        )
    head = _error(taken["logits"], reference.head(taken["outputs"][-1]))
    logits, mine = reference.head(stream).float(), taken["logits"].float()
    if _changed(taken["choices"], wanted, ids.numel()).any():
        with torch.inference_mode(), choices(model, wanted):
            mine = model(input_ids=ids, use_cache=False).logits.float()
    mine = mine.to(logits.device)
    kl = (
        torch.nn.functional.kl_div(mine.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .mean()
    )
    top = (mine.argmax(-1) == logits.argmax(-1)).float().mean()
    worst, most = max(row["same_input"] for row in rows), max(row.get("changed_choices", 0) for row in rows)
    far = _median_error(mine, logits)
    return rows, {
        "logits_error": far,
        "kl_divergence": max(0.0, float(kl)),  # rounding may make it a hair less
        "top1_agreement": float(top),
        "worst_layer": worst,
        "head_error": head,
        "bound": bound,
        "changed_choices": sum(row.get("changed_choices", 0) for row in rows),
        "choices": len(wanted) * ids.numel(),
        "ok": max(worst, head) <= bound and far <= PILED * bound and most <= MOST_CHANGED * ids.numel(),
    }


def _error(a: Any, b: Any) -> float:
    return float((a.float().to(b.device) - b.float()).norm() / b.float().norm().clamp(min=1e-30))


def _median_error(a: Any, b: Any) -> float:
    """Of the median token of [1, tokens, D]."""
    away = (a.float().to(b.device) - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp(min=1e-30)
    return float(away.median())


def _states(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _record(model: Any, ids: Any) -> dict[str, Any]:
    """Runs the loaded model and keeps what goes into and comes out of every decoder layer, and in a run of its own, which then goes module by module, the choices of experts."""
    import torch

    taken: dict[str, Any] = {"inputs": [], "outputs": [], "calls": []}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        taken["inputs"].append((args[0] if args else kwargs["hidden_states"]).clone())
        taken["outputs"].append(_states(output).clone())
        taken["calls"].append((args, kwargs))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in model.model.layers]
    try:
        with torch.inference_mode():
            taken["logits"] = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    with torch.inference_mode(), choices(model) as taken["choices"]:
        model(input_ids=ids, use_cache=False)
    return taken


@contextmanager
def choices(model: Any, given: Mapping[str, Choice] | None = None) -> Iterator[dict[str, Choice]]:
    """What reaches the experts of each block, by their path: ids and weights [tokens, chosen]. While it is entered they get `given` instead."""
    found: dict[str, Choice] = {}

    def hook(path: str, record: bool) -> Any:
        def look(module: Any, args: Any) -> Any:
            if len(args) < 3 or args[1].is_floating_point():
                return None  # not the contract of transformers 5
            if record:
                found[path] = args[1], args[2]
            ids, weights = (given or {}).get(path, (None, None))
            if ids is None or ids.shape != args[1].shape:
                return None
            return args[0], ids.to(args[1]), weights.to(args[2]), *args[3:]

        return look

    hooks = []
    for path, module in model.named_modules():
        whole = path.removesuffix(".on_gpu")  # a share of them
        if whole.endswith(".experts"):
            hooks.append(module.register_forward_pre_hook(hook(whole, whole == path)))
    try:
        yield found
    finally:
        for made in hooks:
            made.remove()


def _changed(mine: Mapping[str, Choice], theirs: Mapping[str, Choice], tokens: int) -> Any:
    """bool [tokens]: whether another set of experts was chosen anywhere."""
    import torch

    changed = torch.zeros(tokens, dtype=torch.bool)
    for path, (ids, _) in theirs.items():
        if path in mine and mine[path][0].shape == ids.shape:
            changed |= (mine[path][0].cpu().sort(-1)[0] != ids.cpu().sort(-1)[0]).any(-1)
    return changed


class _Reference:
    """transformers' own modules, filled from the file one at a time and emptied again."""

    def __init__(self, model: Any, source: Any, args: argparse.Namespace):
        import copy

        import torch

        from ktx.loader.meta_model import read_config, skeleton

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
    counts = summary["choices"]
    print(
        f"{'layer':16}{'error on the same input':>26}{'error piled up':>18}"
        + (f"{'other experts':>16}" if counts else "")
    )
    for row in rows:
        mark = "  <- over the bound" if row["same_input"] > summary["bound"] else ""
        changed = f"{row.get('changed_choices', 0):>16}" if counts else ""
        print(f"{row['layer']:16}{row['same_input']:>26.2e}{row['piled_up']:>18.2e}{changed}{mark}")
    print(
        f"logits: relative error {summary['logits_error']:.2e}, KL divergence {summary['kl_divergence']:.2e}, top-1 agreement {summary['top1_agreement']:.1%}; output layer {summary['head_error']:.2e}"
    )
    if summary["changed_choices"]:
        print(
            f"{summary['changed_choices']} of {counts} times a token went to other experts than in transformers; errors are with transformers' choice"
        )
    verdict = "agrees with" if summary["ok"] else "DIFFERS from"
    print(f"{verdict} transformers: worst layer {summary['worst_layer']:.2e}, bound {summary['bound']:.0e}")
