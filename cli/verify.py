"""`atcache verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from atcache.files.sizes import size_text

from ..pipelines.pages.plain import plain
from ..pipelines.verify.config import VerifyConfig
from . import options
from .fields import options_from

if TYPE_CHECKING:
    from ..pipelines.verify.files import Finding
    from ..pipelines.verify.run import VerifySummary


@click.command()
@options_from(VerifyConfig)
def verify(**config: Any) -> None:  # noqa: ANN401 - one keyword a field of VerifyConfig
    """Check that a cache is whole and, given its teacher, that it is faithful.

    Reads every byte of it, and compares the images of some views with what the teacher saw. Each problem is one line
    on stderr; the exit code is 1 if there is any, even after --repair.

    Example:

    \b
        atcache verify in1k.zarr
        atcache verify in1k.zarr --repair
        atcache verify in1k.zarr --teacher mae-vit-l
    """
    from ..pipelines.verify.run import verify as run_verify

    def print_finding(finding: Finding) -> None:
        click.echo(plain(finding.message), err=True)

    summary = run_verify(VerifyConfig(**config), on_finding=print_finding)
    for line in (*(f"note: {note}" for note in summary.notes), *_closing_lines(summary, repair=config["repair"])):
        click.echo(plain(line), err=True)
    options.print_json(summary.to_json())
    if summary.problems:
        raise click.exceptions.Exit(1)


def _closing_lines(summary: VerifySummary, *, repair: bool) -> list[str]:
    lines: list[str] = []
    fidelity = summary.fidelity
    if fidelity is not None:
        layers = ", ".join(f"{layer}: {kl:.2g}" for layer, kl in fidelity.layer_row_kl_nats.items())
        lines += [
            f"row KL {fidelity.row_kl_nats:.3g} nats over {fidelity.num_views} views (at most "
            f"{fidelity.row_kl_limit_nats:.3g}), by layer {layers}",
            f"features off by {fidelity.injected_error:.3g} with decoded maps (at most "
            f"{fidelity.injected_error_limit:.3g})",
        ]
        if fidelity.v_error is not None:
            lines.append(f"v off by {fidelity.v_error:.3g} (at most {fidelity.v_error_limit:.3g})")
    looked_at = (
        f"{summary.num_committed} of {summary.num_tasks} tasks, {size_text(summary.nbytes)}; pixels of "
        f"{summary.num_views} views"
    )
    if not summary.problems:
        return [*lines, f"{summary.path} is {'whole' if summary.is_complete else 'whole as far as built'}: {looked_at}"]
    tasks = {finding.task for finding in summary.problems if finding.task is not None}
    num_of_tars = sum(finding.is_of_tars for finding in summary.problems)
    num_others = sum(finding.task is None for finding in summary.problems) - num_of_tars
    lines.append(f"{summary.path}: {_count(len(summary.problems), 'problem')}; looked at {looked_at}")
    if repair and not summary.is_metadata_whole:
        lines.append("nothing was repaired: its zarr.json files are damaged, so it is not known what the tasks are")
    elif repair and tasks:
        lines.append(
            f"deleted {_count(len(summary.repaired_tasks), 'commit record')}: type the same `atcache build` or "
            f"`atcache pull` command again; it redoes only {_count(len(tasks), 'task')}"
        )
    elif tasks:
        lines.append(
            f"{_count(len(tasks), 'task')} can be redone: run `atcache verify {summary.path} --repair`, then the same "
            "`atcache build` or `atcache pull` command"
        )
    if num_of_tars == len(summary.problems):
        lines.append("the images could not be compared; all else that was looked at is whole")
    if num_others:
        lines.append(
            f"{_count(num_others, 'problem')} in files that a build does not write again: restore them from a copy, or "
            "build the cache again"
        )
    return lines


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
