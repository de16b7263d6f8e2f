"""`atcache build`."""

from __future__ import annotations

from typing import Any

import click

from ..pipelines.build.config import BuildConfig
from . import options
from .fields import options_from


@click.command()
@options.recipe
@options_from(BuildConfig, without=("recipe",))
def build(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of BuildConfig
    """Run the teacher once over a dataset and keep its attention in a cache.

    Typing the same command again continues a build that was stopped.

    Example:

    \b
        atcache build --teacher mae-vit-l --data 'train-{000000..001281}.tar' --out in1k.zarr
    """
    from ..pipelines.build.decode_cost import DecodeCost
    from ..pipelines.build.plan import BuildPlan
    from ..pipelines.build.run import build as run_build
    from ..pipelines.running.ranks import Ranks

    def print_plan(plan: BuildPlan) -> None:
        ratio = plan.map_nbytes_per_view / plan.nbytes_per_view
        click.echo(
            f"teacher {plan.teacher}; licence of its weights: {plan.licence or 'not known'}\n"
            f"{plan.num_samples} samples x {plan.num_views} views, {plan.num_layers} layers x {plan.num_heads} heads x "
            f"{options.name_tokens(plan.num_tokens, plan.num_queries)}\n"
            f"{plan.nbytes_per_view} bytes a view ({options.compare_sizes(ratio)} than float16 maps) and "
            f"{plan.state_nbytes / 2**20:.1f} MiB once; "
            f"{plan.remaining_nbytes / 2**20:.1f} MiB to write, {plan.free_nbytes / 2**20:.0f} MiB free\n"
            f"row KL {plan.row_kl_nats:.2g} nats, features off by {plan.injected_error:.2g} with decoded maps"
            f"{'' if plan.v_error is None else f'; decoded v off by {plan.v_error:.2g}'}"
            f"{'' if plan.x_error is None else f'; decoded x off by {plan.x_error:.2g}'}\n"
            f"{DecodeCost(operations=plan.decode_operations, seconds=plan.decode_seconds)}\n"
            f"teacher: {plan.teacher_views_per_s:.1f} views/s; "
            f"{plan.num_tasks - plan.num_done_tasks} of {plan.num_tasks} tasks to do",
            err=True,
        )

    ranks = Ranks.from_environment()
    summary = run_build(ranks.refused_once(lambda: BuildConfig(**config)), on_plan=print_plan)
    if not ranks.leads:
        return
    if summary.complete is not None:
        click.echo(
            f"{summary.out} is complete: {summary.complete['num_stored']} views stored, "
            f"{summary.complete['num_bad']} bad, {summary.complete['nbytes'] / 2**20:.1f} MiB; "
            f"{summary.num_built_views} views in {summary.seconds:.1f} s now",
            err=True,
        )
    if summary.warning is not None:
        click.echo(summary.warning, err=True)
    options.print_json(summary.to_json())
