"""`atcache demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atcache.files.durable import disk_errors_explained, make_folder

from ..pipelines.demo.config import DemoConfig
from .fields import options_from
from .paths import OUT

if TYPE_CHECKING:
    from ..pipelines.demo.summary import DemoSummary


@click.command()
@options_from(DemoConfig)
@click.option("--json", "json_file", type=OUT, help="Also write the numbers here, as JSON.")
def demo(json_file: Path | None, **config: Any) -> None:  # noqa: ANN401 - one keyword a field of DemoConfig
    """Show attention transfer end to end on a small dataset, without a download.

    Example:

    \b
        atcache demo --seeds 3 --json demo.json
    """
    from ..pipelines.demo.run import demo as run_demo

    if json_file is not None:  # a folder that cannot be made is an error now, not after minutes
        make_folder(json_file.absolute().parent)
    summary = run_demo(DemoConfig(**config), say=lambda command: click.echo(f"$ {command}", err=True))
    if json_file is not None:
        with disk_errors_explained(json_file):
            json_file.write_text(json.dumps(summary.to_json(), indent=2) + "\n")
    _print_table(summary)


def _print_table(summary: DemoSummary) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..pipelines.demo.page import NEXT_COMMANDS

    table = Table(title="100 labels, 8 x 8 digits, ViT of 4 layers; validation on 500 others")
    for column in ("student", "top-1 %", "gap closed", "seconds to train"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for mode, result in summary.modes.items():
        closed = "" if result.gap_closed is None else f"{result.gap_closed:.0%}"
        table.add_row(mode, f"{result.top1:.1f}", closed, f"{result.seconds:.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"cache: {summary.cache_nbytes_per_view:.0f} bytes a view (float16 maps: {summary.map_nbytes_per_view}), "
        f"{summary.num_views} views; {summary.seconds:.0f} s in all"
    )
    console.print(f"left in {summary.out}: {' '.join(sorted(_names_in(Path(summary.out))))}", highlight=False)
    console.print(f"the results with pictures: open {summary.page} in a browser", soft_wrap=True)
    console.print("next, with your own images, one folder a class:")
    for command in NEXT_COMMANDS:
        console.print(f"  {command}", soft_wrap=True, highlight=False)


def _names_in(folder: Path) -> list[str]:
    return [f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()]
