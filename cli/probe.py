"""`atcache probe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..pipelines.probe.config import ProbeConfig
from . import options
from .fields import options_from

if TYPE_CHECKING:
    from ..pipelines.probe.run import ProbeResult


@click.command()
@options_from(ProbeConfig)
def probe(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of ProbeConfig
    """Measure in minutes whether a teacher's attention helps on your images.

    Trains pairs of students on few samples, one with the teacher's attention and one from scratch, and prints how far
    the first is ahead, with its uncertainty. Typing the same command again continues; more --seeds add pairs.

    Example:

    \b
        atcache probe --teacher mae-vit-b --data 'train-{0000..0099}.tar' --out probe
        atcache probe --cache in1k.zarr --val-cache in1k-val.zarr --mode distill --minutes 60 --out probe
    """
    from ..pipelines.probe.run import probe as run_probe

    result = run_probe(ProbeConfig(**config), say=lambda line: click.echo(line, err=True))
    _print(result)
    options.print_json(result.to_json())


def _print(result: ProbeResult) -> None:
    """The result for a person, on stderr."""
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{result.num_samples:,} training samples, {result.steps} steps; top-1 % on {result.num_val_images:,} others"
    )
    table = Table()
    for column in ("seed", result.mode, "scratch", "difference"):
        table.add_column(column, justify="right")
    for pair in result.pairs:
        numbers = (f"{pair.transfer:.2f}", f"{pair.scratch:.2f}", f"{pair.transfer - pair.scratch:+.2f}")
        table.add_row(str(pair.seed), *numbers)
    console = Console(stderr=True, highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    for note in result.notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)
    console.print(result.sentence, style="bold", markup=False, soft_wrap=True)
