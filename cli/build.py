"""`atcache build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options


@click.command()
@options.recipe
@click.option("--teacher", required=True, help="An alias such as mae-vit-l, or a timm name with arguments.")
@options.data
@click.option("--out", required=True, type=options.OUT, help="The cache; an unfinished one is continued.")
@click.option("--weights", type=click.Path(path_type=Path), help="The teacher's weights; without it, timm's.")
@options.policy
@options.mixup
@options.cutmix
@options.mix_prob
@options.views
@options.seed
@click.option(
    "--codec", help="transform, int8, exact, exact:dtype=float32 or logmap; without it, what suits the teacher."
)
@click.option("--target-kl", type=float, help="Mean row KL to meet, in nats; codec transform's default is 0.005.")
@click.option("--target-mb-per-view", type=float, help="Megabytes a view to meet, instead of a KL.")
@click.option("--budget", metavar="BYTES", help="Bytes of all codes to meet, such as 2TB, instead of a KL.")
@options.layers
@options.heads
@options.store
@options.pixels
@click.option(
    "--on-bad-image",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="skip records a bad sample in the cache and goes on.",
)
@click.option("--batch-size", default=32, show_default=True, help="Views a forward of the teacher.")
@click.option("--workers", type=int, help="Processes that decode images; without it, one less than processors.")
@click.option("--samples-per-shard", type=int, help="Samples a task; without it, shards of about 256 MiB.")
@click.option("--calibration-samples", default=256, show_default=True, help="Samples the codec is fitted on.")
@options.device
@options.precision
@click.option("--dry-run", is_flag=True, help="Print the plan and stop before anything is written.")
def build(recipe: str | None, **config: Any) -> None:  # noqa: ANN401 - one keyword a field of BuildConfig
    """Run the teacher once over a dataset and keep its attention in a cache.

    Typing the same command again continues a build that was stopped.

    Example:

    \b
        atcache build --teacher mae-vit-l --data 'train-{000000..001281}.tar' --out in1k.zarr
    """
    del recipe  # its settings are the other options' defaults
    from ..pipelines.build.config import BuildConfig
    from ..pipelines.build.plan import BuildPlan
    from ..pipelines.build.run import build as run_build
    from ..pipelines.running.ranks import Ranks

    def print_plan(plan: BuildPlan) -> None:
        ratio = plan.map_nbytes_per_view / plan.nbytes_per_view
        click.echo(
            f"teacher {plan.teacher}; licence of its weights: {plan.licence or 'not known'}\n"
            f"{plan.num_samples} samples x {plan.num_views} views, {plan.num_layers} layers x {plan.num_heads} heads x "
            f"{plan.num_tokens} tokens\n"
            f"{plan.nbytes_per_view} bytes a view ({options.size_against_maps(ratio)}) and "
            f"{plan.state_nbytes / 2**20:.1f} MiB once; "
            f"{plan.remaining_nbytes / 2**20:.1f} MiB to write, {plan.free_nbytes / 2**20:.0f} MiB free\n"
            f"row KL {plan.row_kl_nats:.2g} nats, features off by {plan.injected_error:.2g} with decoded maps"
            f"{'' if plan.v_error is None else f'; decoded v off by {plan.v_error:.2g}'}\n"
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
