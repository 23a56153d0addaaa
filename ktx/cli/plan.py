"""ktx plan: show which module would be loaded where, or choose a placement for a memory budget; reads headers only."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from ktx.cli.arguments import (
    chunk_size_option,
    flag,
    infer_model_or_demo,
    load_arguments,
    lora_option,
    model_options,
    options_of,
    placement_kwargs,
    positive,
    rate,
    reject_options,
    size,
    sizes,
    tokens,
)
from ktx.errors import UsageError

SUMMARY = "show what the rules do to a model, or choose a placement by budget, without reading the weights"
EPILOG = (
    "Without --model the plan of the bundled demo model is printed."
    " With --vram or --ram, a placement for these memory budgets is chosen and its speed estimated; this machine need"
    " not have these devices. Sizes are in bytes, with the suffix K M G T (powers of 1000) or KiB MiB GiB TiB."
    " Example: ktx plan --model DIR --weights FILE.gguf --vram 24G --ram 420G --ctx 128K --write placed.yaml"
)
# options that only a placement by budget reads
BUDGET_OPTIONS = ("ctx", "batch", "chunk_size", "cpu_bandwidth", "gpu_bandwidth", "write")
# options that a placement by budget does not read
PLAN_OPTIONS = ("all", "defer_experts", "stream_experts_min_tokens", "packed_cache_dir", "lora")
DEFAULT_GPU_GB_S = 1000.0  # where no GPU can be measured: about an RTX 4090's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktx plan` to its parser."""
    parser.epilog = EPILOG
    model_options(parser)
    lora_option(parser, "the table shows the memory of each")
    flag(parser, "--all", help="print one row per module instead of one row for equal layers")
    flag(parser, "--json", help="print one JSON object instead of tables")
    group = parser.add_argument_group("budget")
    group.add_argument("--vram", type=sizes, metavar="SIZE[,SIZE]", help="memory of each GPU: 24G, or 24G,24G for two")
    group.add_argument("--ram", type=size, metavar="SIZE", help="CPU memory (default: the free memory of this machine)")
    group.add_argument(
        "--ctx", type=tokens, default=8192, metavar="N", help="context length per sequence: 8192 or 32K (default 8K)"
    )
    group.add_argument("--batch", type=positive, default=1, metavar="N", help="number of sequences (default 1)")
    chunk_size_option(group, "the largest that ktx serve uses for --ctx tokens, 2048 to 8192")
    group.add_argument(
        "--cpu-bandwidth",
        type=rate,
        metavar="GB/S",
        help="read bandwidth of the CPU's memory in GB/s (default: measured on this machine)",
    )
    group.add_argument(
        "--gpu-bandwidth",
        type=rate,
        metavar="GB/S",
        help="read bandwidth of a GPU's memory in GB/s (default: measured on this machine's GPU if there is one,"
        f" else {DEFAULT_GPU_GB_S:g})",
    )
    group.add_argument("--write", metavar="FILE", help="write the placement to FILE, a rule file for --rules")


def run(args: argparse.Namespace) -> int:
    """Prints a table of modules and their devices, or with --vram or --ram a placement chosen for that memory.

    Exit status 4 if tensors are missing or do not match the model, 3 if the model does not fit the budget.
    """
    infer_model_or_demo(args)
    options = options_of(add_arguments)
    if args.vram or args.ram:
        reject_options(
            args,
            {name: options[name] for name in PLAN_OPTIONS},
            "has no effect on a placement by budget (--vram, --ram): leave it out",
        )
        return place_by_budget(args)
    reject_options(
        args,
        {name: options[name] for name in BUDGET_OPTIONS},
        "needs a placement by budget: give --vram, --ram or both",
    )
    import ktx

    load_kwargs = load_arguments(args)
    load_kwargs = {name: load_kwargs[name] for name in inspect.signature(ktx.plan).parameters if name in load_kwargs}
    plan = ktx.plan(args.model, args.weights, args.rules, **load_kwargs)
    notes_shown = [note for note in plan.model_notes if note.code != "weights"]  # the table has these
    if args.json:
        rows = [
            {"module": s.path, "operator": s.operator, "device": s.device, "type": s.types, "bytes": s.nbytes}
            for s in plan
        ]
        notes = [note._asdict() for note in plan.model_notes]
        adapters = {name: {str(device): n for device, n in sizes.items()} for name, sizes in plan.adapters.items()}
        output = {"modules": rows, "sum": plan.totals(), "adapters": adapters, "notes": notes}
        print(json.dumps(output, indent=1))
    else:
        print(plan.table(fold=not args.all), *(f"note: {note.text}" for note in notes_shown), sep="\n")
    plan.check()
    return 0


def place_by_budget(args: argparse.Namespace) -> int:
    """Chooses a placement for the memory of --vram and --ram, prints its memory and estimated speed.

    Writes it as a rule file to --write if given. Raises UsageError if options place modules too.
    """
    if given := [f"--{name.replace('_', '-')}" for name, value in placement_kwargs(args).items() if value]:
        raise UsageError(f"{given[0]} places modules, but --vram and --ram choose the placement: give one or the other")
    from ktx.cache.kv import kv_type
    from ktx.engine.budget import max_step_tokens
    from ktx.hardware import memory
    from ktx.loader.build import measure_footprint
    from ktx.placement import solver
    from ktx.placement.suggest import fit

    model, rules = measure_footprint(
        args.model,
        args.weights,
        args.rules,
        trust_remote_code=args.trust_remote_code,
        quantize=args.quantize,
        quantize_experts=args.quantize_experts,
        num_experts_per_tok=args.num_experts_per_tok,
    )
    kv_dtype = kv_type(args.kv_dtype) or kv_type("f16")
    chunk_size = args.chunk_size or max_step_tokens(args.ctx)
    ram = args.ram or memory()[1]
    budget = solver.Budget(tuple(args.vram or ()), ram, args.ctx, args.batch, kv_dtype, chunk_size)
    placement, speeds = fit(model, budget), _measure_speeds(args)
    if args.json:
        print(json.dumps(solver.to_json(placement, speeds), indent=1))
    else:
        print("\n".join([*memory_table(placement), "", *_estimate_lines(placement, speeds)]))
    if args.write:
        write_rule_file(Path(args.write), placement, rules.base)
    return 0


def _measure_speeds(args: argparse.Namespace) -> Any:
    """Returns the bandwidths for the estimate, each with its source: measured, given as an option, or assumed.

    Decoding is limited by reading weights, so its estimated time is the bytes per token divided by these bandwidths.
    """
    from ktx.kernels.cpu import num_threads
    from ktx.kernels.microbench import (
        DEFAULT_PCIE_GB_S,
        free_read_bandwidth,
        gpu_read_bandwidth,
        link_bandwidth,
        prompt_rate,
    )
    from ktx.placement.solver import Speeds
    from ktx.quant.types import QTYPES

    cpu_read = None if args.cpu_bandwidth else free_read_bandwidth(num_threads())
    if cpu_read is None and not args.cpu_bandwidth:
        raise UsageError("too little memory is free to measure this machine's read bandwidth: give --cpu-bandwidth")
    gpu_gb_s = None if args.gpu_bandwidth else gpu_read_bandwidth()
    gpu_source = "given" if args.gpu_bandwidth else "assumed" if gpu_gb_s is None else "measured"
    link = link_bandwidth()
    return Speeds(
        cpu_gb_s=cpu_read.gb_s if cpu_read else args.cpu_bandwidth,
        gpu_gb_s=args.gpu_bandwidth or gpu_gb_s or DEFAULT_GPU_GB_S,
        cpu_from=f"measured: {cpu_read.size}" if cpu_read else "given",
        gpu_from=gpu_source,
        link_gb_s=link or DEFAULT_PCIE_GB_S,
        link_from="measured" if link else "assumed",
        cpu_gops=prompt_rate(QTYPES["Q4_K"]) if args.vram else 0.0,  # only for streaming experts to a GPU
    )


def memory_table(placement: Any) -> list[str]:
    """Returns the lines of the memory table: groups of modules by device, their sum and the budget."""
    from ktx.hardware import format_bytes

    columns = placement.device_names
    rows = [("", *columns)]
    for group, device_bytes in placement.bytes.items():
        if any(device_bytes.values()):
            rows.append(
                (group, *(format_bytes(device_bytes[name]) if device_bytes.get(name) else "" for name in columns))
            )
    rows.append(("sum", *(format_bytes(placement.total_bytes(name)) for name in columns)))
    rows.append(("budget", *(format_bytes(placement.budget.bytes_of(name)) for name in columns)))
    rows.append(("read per token", *(format_bytes(placement.read_bytes_per_token(name)) for name in columns)))
    first, widths = max(len(row[0]) for row in rows), [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _estimate_lines(placement: Any, speeds: Any) -> list[str]:
    """Returns the lines of the device map and of the speed that it allows at most.

    Times of the devices are added, because they work in turn.
    """
    budget, seconds = placement.budget, placement.seconds_per_token(speeds)
    lines = [f"{key}: {device}" for key, device in placement.device_map().items()]
    lines += [f"gpu_experts, {key}: {count}" for key, count in placement.gpu_experts_map().items()]
    count = placement.transfers_per_token()
    transfers = f", {count} device transfers {1e3 * seconds['crossings']:.1f} ms" if count else ""
    rates = {
        name: (speeds.cpu_gb_s, speeds.cpu_from) if name == "cpu" else (speeds.gpu_gb_s, speeds.gpu_from)
        for name in placement.device_names
    }
    devices = ", ".join(
        f"{name} {1e3 * seconds[name]:.1f} ms at {rates[name][0]:.0f} GB/s ({rates[name][1]})"
        for name in placement.device_names
    )
    what = "one token" if budget.batch == 1 else f"one token of each of {budget.batch} sequences"
    rate = budget.batch / sum(seconds.values())
    lines += ["", f"{what} at context {budget.context}: {devices}{transfers}", f"at most {rate:.1f} tokens/s"]
    if min_tokens := placement.min_streamed_tokens(speeds):
        link = f"{speeds.link_gb_s:.0f} GB/s ({speeds.link_from})"
        lines.append(
            f"prompts of at least {min_tokens} tokens: experts are copied to their GPU at {link};"
            f" shorter ones: computed on the CPU at {speeds.cpu_gops:.0f} GOPS (measured)"
        )
    return lines


def write_rule_file(path: Path, placement: Any, base: str) -> None:
    """Writes a rule file with this placement and a reference to the model's rules, by name or by path.

    Args:
        base: path of the model's rule file.

    Raises:
        UsageError: the file cannot be written.
    """
    import yaml

    from ktx.hardware import format_bytes
    from ktx.injection.rules import rule_folder

    is_shipped = Path(base).resolve().parent == rule_folder().resolve()
    budget = placement.budget
    usage = ", ".join(
        f"{name} {format_bytes(placement.total_bytes(name))} of {format_bytes(budget.bytes_of(name))}"
        for name in placement.device_names
    )
    lines = [
        f"# Placed by ktx plan for {budget.batch} x {budget.context} tokens: {usage}",
        yaml.safe_dump({"rules": Path(base).stem if is_shipped else str(Path(base).resolve())}, width=1000).rstrip(),
        yaml.safe_dump({"devices": placement.device_map()}, sort_keys=False, width=1000).rstrip(),
    ]
    if placement.num_gpu_experts:
        lines.append(yaml.safe_dump({"gpu_experts": placement.gpu_experts_map()}, sort_keys=False).rstrip())
    if budget.vram and not placement.streams_experts:
        lines.append("stream_experts_min_tokens: 'off'")
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--write {path}: cannot be written: {error.strerror}") from None
