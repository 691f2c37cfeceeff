"""The command-line options of `azrecipe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from azrecipe.cli.option_types import parse_hours, parse_positive_int


def add_plan_verb(verbs: Any) -> Any:
    """Add plan to argparse's subparsers; returns its parser."""
    plan = verbs.add_parser(
        "plan",
        help="memory, time and price of a recipe on machines that you do not have yet",
        description="Runs the recipe's training step where tensors have shapes only. Needs no GPU, no weights and no data.",
    )
    plan.add_argument("recipe", nargs="?", help="a pretrain or sft recipe, or a pipeline (YAML)")
    plan.add_argument(
        "--hardware",
        metavar="NAME",
        help="a machine or cards by name: p5.48xlarge, ml.g5.8xlarge, 'h100-80g x8', rtx-4090, one of --hardware-file",
    )
    plan.add_argument("--nodes", type=parse_positive_int, default=1, metavar="N", help="machines (default: 1)")
    plan.add_argument("--compare", metavar="NAME,NAME,…", help="the same on several machines, side by side")
    plan.add_argument("--cheapest", action="store_true", help="rank all machines with a known price by what the recipe costs on them")
    plan.add_argument("--within", type=parse_hours, metavar="TIME", help="with --cheapest: leave out what may take longer: 24h, 3d")
    plan.add_argument("--provider", metavar="NAME,…", help="with --cheapest: only machines of these: aws,gcp,lambda")
    plan.add_argument("--largest-batch", action="store_true", help="print only the largest batch of each loop: surely, and perhaps")
    plan.add_argument("--no-levers", action="store_true", help="leave out what single changes would do")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.add_argument(
        "--accelerate-config", metavar="NAME", help="a file in accelerate_configs/ by name or path (default: fsdp, or one process)"
    )
    plan.add_argument("--config-json", type=Path, metavar="FILE", help="the base model's config.json, where the hub cannot be reached")
    plan.add_argument(
        "--vocab-size", type=parse_positive_int, metavar="N", help="plan with so many tokens, whatever the recipe's tokenizer will have"
    )
    plan.add_argument(
        "--hardware-file", type=Path, metavar="FILE", help="machines, cards and prices of your own, laid over those that ship"
    )
    plan.add_argument("--price-per-hour", type=float, metavar="USD", help="of one machine, instead of the list price")
    plan.add_argument("--calibrate", type=Path, metavar="RUN", help="learn from a run of your own on a GPU how fast that card is here")
    return plan
