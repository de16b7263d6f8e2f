"""`atcache plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from atcache.files.sizes import size_text

from ..pipelines.plan.config import PlanConfig
from ..pipelines.plan.verdict import duration, number
from . import options
from .fields import options_from

if TYPE_CHECKING:
    from rich.table import Table

    from ..pipelines.plan.run import Plan


@click.command()
@options_from(PlanConfig)
def plan(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of PlanConfig
    """Say what a cache would cost, and whether it would pay off.

    Measures sizes, fidelity and speeds on your images, teacher and disk in about a minute, and leaves nothing behind.

    Example:

    \b
        atcache plan --teacher mae-vit-l --data 'train-{000000..001281}.tar' --out /data/in1k.zarr
    """
    from ..pipelines.plan.run import plan as run_plan

    made = run_plan(PlanConfig(**config), say=lambda line: click.echo(f"{line} ...", err=True))
    _print(made)
    options.print_json(made.to_json())


def _print(plan: Plan) -> None:
    """The plan for a person, on stderr."""
    from rich.console import Console

    from ..pipelines.build.decode_cost import DecodeCost

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 120  # a log file has no width of its own
    console.print()
    for line in _facts(plan):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_cache_table(plan))
    for one in plan.assessments:
        if one.cost.decode_seconds is not None:
            cost = DecodeCost(operations=one.cost.decode_operations, seconds=one.cost.decode_seconds)
            console.print(f"{one.cost.codec}: {cost}", markup=False, soft_wrap=True)
    console.print(_training_table(plan))
    if plan.verdict is not None:
        for line in filter(None, (plan.verdict.line, plan.verdict.warning)):
            console.print(line, markup=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)
    console.print()
    console.print(plan.decision.sentence, style="bold", markup=False, soft_wrap=True)


def _facts(plan: Plan) -> list[str]:
    machine, workload = plan.machine, plan.workload
    loads = "" if machine.load_img_per_s is None else f"; loading images: {number(machine.load_img_per_s)} img/s"
    runs = f"{workload.runs} run{'s' if workload.runs > 1 else ''}"
    return [
        f"{workload.num_samples:,} samples x {workload.num_views} view{'s' if workload.num_views > 1 else ''}; "
        f"{runs} of {number(workload.epochs)} epochs, mode {plan.mode}",
        f"teacher {plan.teacher or 'not named'}: {number(machine.teacher_img_per_s)} img/s"
        f"{'' if plan.device is None else f' ({plan.device})'}{loads}",
        f"disk of {plan.out}: writes {size_text(machine.write_nbytes_per_s)}/s"
        f"{'' if machine.free_nbytes is None else f', {size_text(machine.free_nbytes)} free'}",
        *([f"assumed: {', '.join(plan.assumed)}"] if plan.assumed else []),
    ]


def _cache_table(plan: Plan) -> Table:
    headings = ["codec", "one view", "whole cache", "than float16 maps", "row KL", "features off", "encodes"]
    table = _table("What a cache would be", [*headings, "build takes", "build limited by"])
    for one in plan.assessments:
        cost = one.cost
        ratio = None if cost.map_nbytes_per_view is None else cost.map_nbytes_per_view / cost.nbytes_per_view
        table.add_row(
            cost.codec or "assumed",
            size_text(cost.nbytes_per_view),
            size_text(one.total_nbytes),
            "-" if ratio is None else options.compare_sizes(ratio),
            "-" if cost.row_kl_nats is None else f"{cost.row_kl_nats:.2g}",
            "-" if cost.injected_error is None else f"{cost.injected_error:.2g}",
            "-" if cost.encode_img_per_s is None else f"{number(cost.encode_img_per_s)} img/s",
            duration(one.build_s),
            one.build_limit,
        )
    return table


def _training_table(plan: Plan) -> Table:
    headings = ["training from", "steps alone", "must read", "disk reads", "one epoch", "limited by", "pays off after"]
    table = _table("What an epoch would take", [*headings, "verdict"])
    decision, machine = plan.decision, plan.machine
    live_step_s = 1 / machine.teacher_img_per_s + 1 / machine.student_img_per_s
    if plan.scratch_img_per_s is not None:
        table.add_row("no teacher", f"{number(plan.scratch_img_per_s)} img/s", *["-"] * 6)
    table.add_row(
        *("live teacher", f"{number(1 / live_step_s)} img/s", "-", "-"),
        *(duration(decision.live_epoch_s), decision.live_limit, "-", "-"),
    )
    for one in plan.assessments:
        cost = one.cost
        pays = "-" if one.payback_epochs is None else f"{number(one.payback_epochs)} epochs"
        table.add_row(
            f"{cost.codec or 'assumed'} cache",
            f"{number(cost.student_img_per_s)} img/s",
            f"{size_text(one.needed_nbytes_per_s)}/s",
            f"{size_text(cost.read_nbytes_per_s)}/s",
            *(duration(one.epoch_s), one.epoch_limit, pays, one.verdict),
        )
    return table


def _table(title: str, headings: list[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column else "left")
    return table
