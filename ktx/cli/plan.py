"""ktx plan: what would be loaded where, from headers alone; with budgets, where it should be."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from ktx.cli.arguments import (
    batched_option,
    flag,
    load_options,
    lora_option,
    model_options,
    options_of,
    placed,
    positive,
    rate,
    refuse,
    require_model,
    size,
    sizes,
    tokens,
)
from ktx.errors import UsageError

SUMMARY = "show what rules do to a model, or place it by budget, without reading its weights"
EPILOG = (
    "With --vram or --ram the placement is chosen: budgets stand for devices that this machine need not have. "
    "Sizes are bytes with K M G T (of 10^9 and so on) or KiB MiB GiB TiB."
)
OF_BUDGETS = (
    "ctx",
    "batch",
    "chunk_size",
    "cpu_bandwidth",
    "gpu_bandwidth",
    "write",
)  # options that only a placement by budget reads
OF_PLANS = ("all", "defer_experts", "stream_experts", "cache_dir", "lora")  # and that it does not
GPU_GB_S = 1000.0  # where no GPU can be measured: about an RTX 4090's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    model_options(parser)
    lora_option(parser, "the table shows the memory of each")
    flag(parser, "--all", help="one row a module instead of one for layers that are alike")
    flag(parser, "--json", help="one JSON object instead of tables")
    group = parser.add_argument_group("budget")
    group.add_argument("--vram", type=sizes, metavar="SIZE[,SIZE]", help="memory of each GPU: 24G, or 24G,24G")
    group.add_argument("--ram", type=size, metavar="SIZE", help="memory of the CPU (default: what is free here)")
    group.add_argument(
        "--ctx", type=tokens, default=8192, metavar="N", help="tokens of each sequence: 8192 or 32K (default 8K)"
    )
    group.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at once (default 1)")
    batched_option(group, "the largest step that ktx serve takes of --ctx tokens, 2048 or more")
    group.add_argument(
        "--cpu-bandwidth", type=rate, metavar="GB/S", help="of reads from memory (default: measured here)"
    )
    group.add_argument(
        "--gpu-bandwidth",
        type=rate,
        metavar="GB/S",
        help=f"of reads from a GPU's memory (default: measured where there is one, else {GPU_GB_S:g})",
    )
    group.add_argument("--write", metavar="FILE", help="save the placement as a rule file, for --rules")


def run(args: argparse.Namespace) -> int:
    """Prints the table; exit status 4 when tensors are missing or do not fit the model, 3 when the model does not fit the budget."""
    require_model(args)
    options = options_of(add_arguments)
    if args.vram or args.ram:
        refuse(
            args,
            {name: options[name] for name in OF_PLANS},
            "is not read where --vram or --ram have the placement chosen",
        )
        return by_budget(args)
    refuse(
        args,
        {name: options[name] for name in OF_BUDGETS},
        "goes with a placement by budget: give --vram, --ram or both",
    )
    import ktx

    loaded = load_options(args)
    loaded = {name: loaded[name] for name in inspect.signature(ktx.plan).parameters if name in loaded}
    plan = ktx.plan(args.model, args.weights, args.rules, **loaded)
    told = [note for note in plan.said if note.code != "weights"]  # which the table has
    if args.json:
        rows = [
            {"module": s.path, "operator": s.new, "device": s.device, "type": s.types, "bytes": s.nbytes} for s in plan
        ]
        notes = [note._asdict() for note in plan.said]
        adapters = {name: {str(device): n for device, n in sizes.items()} for name, sizes in plan.adapters.items()}
        told_of = {"modules": rows, "sum": plan.totals(), "adapters": adapters, "notes": notes}
        print(json.dumps(told_of, indent=1))
    else:
        print(plan.table(fold=not args.all), *(f"note: {note.text}" for note in told), sep="\n")
    plan.check()
    return 0


def by_budget(args: argparse.Namespace) -> int:
    """Chooses a placement, shows what it takes and what a token costs, and writes it if asked."""
    if given := [f"--{name.replace('_', '-')}" for name, value in placed(args).items() if value]:
        raise UsageError(f"{given[0]} says where modules are, --vram and --ram have it chosen: give one or the other")
    from ktx.cache.kv import kv_type
    from ktx.engine.budget import longest_step
    from ktx.hardware import memory
    from ktx.loader.build import measure
    from ktx.placement import solver
    from ktx.placement.suggest import fit

    model, rules = measure(
        args.model, args.weights, args.rules, args.trust_remote_code, args.dtype, args.moe_dtype, args.moe_experts
    )
    kept = kv_type(args.kv_dtype) or kv_type("f16")
    step = args.chunk_size or longest_step(args.ctx)
    ram = args.ram or memory()[1]
    budget = solver.Budget(tuple(args.vram or ()), ram, args.ctx, args.batch, kept, step)
    made, speeds = fit(model, budget), _speeds(args)
    if args.json:
        print(json.dumps(solver.summary(made, speeds), indent=1))
    else:
        print("\n".join([*table(made), "", *_words(made, speeds)]))
    if args.write:
        write(Path(args.write), made, rules.base)
    return 0


def _speeds(args: argparse.Namespace) -> Any:
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

    reading = None if args.cpu_bandwidth else free_read_bandwidth(num_threads())
    if reading is None and not args.cpu_bandwidth:
        raise UsageError("too little memory is free to measure this machine's: give --cpu-bandwidth")
    measured = None if args.gpu_bandwidth else gpu_read_bandwidth()
    how = "given" if args.gpu_bandwidth else "assumed" if measured is None else "measured"
    link = link_bandwidth()
    return Speeds(
        reading.gb_s if reading else args.cpu_bandwidth,
        args.gpu_bandwidth or measured or GPU_GB_S,
        f"measured: {reading.size}" if reading else "given",
        how,
        link or DEFAULT_PCIE_GB_S,
        "measured" if link else "assumed",
        prompt_rate(QTYPES["Q4_K"]) if args.vram else 0.0,
    )


def table(made: Any) -> list[str]:
    """Groups of modules by device, against the budget."""
    from ktx.hardware import format_bytes

    columns = made.names
    rows = [("", *columns)]
    for group, of in made.bytes.items():
        if any(of.values()):
            rows.append((group, *(format_bytes(of[name]) if of.get(name) else "" for name in columns)))
    rows.append(("sum", *(format_bytes(made.total(name)) for name in columns)))
    rows.append(("budget", *(format_bytes(made.budget.of(name)) for name in columns)))
    rows.append(("a token reads", *(format_bytes(made.reads(name)) for name in columns)))
    first, widths = max(len(row[0]) for row in rows), [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _words(made: Any, speeds: Any) -> list[str]:
    budget, seconds = made.budget, made.seconds(speeds)
    lines = [f"{key}: {device}" for key, device in made.map().items()]
    lines += [f"gpu_experts, {key}: {count}" for key, count in made.shares().items()]
    count = made.crossings()
    ways = f", {count} crossings {1e3 * seconds['crossings']:.1f} ms" if count else ""
    rates = {
        name: (speeds.cpu, speeds.cpu_from) if name == "cpu" else (speeds.gpu, speeds.gpu_from) for name in made.names
    }
    sides = ", ".join(
        f"{name} {1e3 * seconds[name]:.1f} ms at {rates[name][0]:.0f} GB/s ({rates[name][1]})" for name in made.names
    )
    alone = "a token" if budget.batch == 1 else f"a token of each of {budget.batch} sequences"
    rate = budget.batch / sum(seconds.values())
    lines += ["", f"{alone} after {budget.context} others: {sides}{ways}", f"at most {rate:.1f} tokens a second"]
    if least := made.streamed_from(speeds):
        link = f"{speeds.link:.0f} GB/s ({speeds.link_from})"
        lines.append(
            f"prompts of {least} tokens or more: experts are copied to their GPU at {link}; fewer: the CPU's {speeds.rate:.0f} GOPS (measured)"
        )
    return lines


def write(path: Path, made: Any, base: str) -> None:
    """A rule file with this placement, and the model's rules by name or by path."""
    import yaml

    from ktx.hardware import format_bytes
    from ktx.injection.rules import rule_folder

    shipped = Path(base).resolve().parent == rule_folder().resolve()
    budget = made.budget
    needs = ", ".join(
        f"{name} {format_bytes(made.total(name))} of {format_bytes(budget.of(name))}" for name in made.names
    )
    lines = [
        f"# Placed by ktx plan for {budget.batch} x {budget.context} tokens: {needs}",
        yaml.safe_dump({"rules": Path(base).stem if shipped else str(Path(base).resolve())}, width=1000).rstrip(),
        yaml.safe_dump({"devices": made.map()}, sort_keys=False, width=1000).rstrip(),
    ]
    if made.share:
        lines.append(yaml.safe_dump({"gpu_experts": made.shares()}, sort_keys=False).rstrip())
    if budget.vram and not made.stream:
        lines.append("stream_experts: 'off'")
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--write {path}: cannot be written: {error.strerror}") from None
