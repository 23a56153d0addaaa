"""ktx plan: what would be loaded where, from headers alone."""

from __future__ import annotations

import argparse

from ktx.commands.arguments import flag, model_options, require_model

SUMMARY = "show what rules do to a model, without reading its weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    flag(parser, "--all", help="one row a module instead of one for layers that are alike")


def run(args: argparse.Namespace) -> int:
    """Prints the table; exit status 4 when tensors are missing or do not fit."""
    require_model(args)
    import ktx

    plan = ktx.plan(args.model, args.weights, args.rules, args.trust_remote_code, args.dtype, args.moe_dtype)
    print(plan.table(fold=not args.all))
    plan.check()
    return 0
