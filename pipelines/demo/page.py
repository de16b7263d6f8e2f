"""The results of the demo as a page: a table, bars, a picture of maps, links to reports, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from atcache.choices import MODES
from atcache.files.durable import write_file

from ..pages.charts import bars
from ..pages.frame import commands, page, paragraph, section, table, text
from ..pages.images import encoded_image
from ..report.config import REPORT_FILE
from .summary import AVERAGED, DemoSummary, ModeResult

NEXT_COMMANDS = (
    "atcache pack --data photos/train --out tars/train",
    "atcache pack --data photos/val --classes tars/train --out tars/val",
    "atcache build --teacher mae-vit-b --data tars/train --out train.zarr --views 4",
    "atcache build --teacher mae-vit-b --data tars/val --out val.zarr --policy eval",
    "atcache train --mode copy --cache train.zarr --val-cache val.zarr --out runs/copy",
)
"""What to type with images of one's own, which lie in one folder a class."""
_WORDS = {
    "copy": "attends as the teacher does: its maps come from the cache",
    "distill": "learns to attend as the teacher does, and then needs no teacher",
    "scratch": "has no teacher",
    "finetune": "begins with the teacher's weights",
    AVERAGED: "the mean of two students' probabilities",
}


def write_page(summary: DemoSummary) -> None:
    """Write the page of a demo into its folder, from the results and the picture of maps that are there."""
    out = Path(summary.page).parent
    maps = encoded_image(
        (out / "maps.png").read_bytes(),
        "png",
        "Digits in rows; beside each, where the heads of the teacher's first and last layer look",
    )
    body = "\n".join(
        [
            f'<p class="lead">{text(_result(summary.modes))}</p>',
            section("Results", _bars(summary.modes), _table(summary)),
            section(
                "What was transferred",
                paragraph(
                    "Attention that patches get in the teacher, as the cache holds it: of the first and the last "
                    "layer, for each head."
                ),
                f"<figure>{maps}</figure>",
            ),
            section("The runs", _links(out)),
            section(
                "Next: your own images",
                paragraph("Put the images into one folder a class, in photos/train and photos/val, and type:"),
                commands(NEXT_COMMANDS),
                paragraph("The weights of this teacher come from the Hugging Face hub."),
            ),
            section("What the demo ran", commands(summary.commands)),
        ]
    )
    write_file(Path(summary.page), page("atcache demo", body).encode())


def _result(modes: Mapping[str, ModeResult]) -> str:
    top1 = {mode: result.top1 for mode, result in modes.items()}
    return (
        f"With 100 labels, a student without a teacher gets {top1['scratch']:.1f} % of 500 digits right. With nothing "
        f"but its teacher's attention it gets {top1['copy']:.1f} %, and with the teacher's weights "
        f"{top1['finetune']:.1f} %."
    )


def _bars(modes: Mapping[str, ModeResult]) -> str:
    ranked = sorted(modes, key=lambda mode: modes[mode].top1)
    values = {mode: modes[mode].top1 for mode in ranked}
    says = "Validation accuracy, %: " + ", ".join(f"{name} {value:.1f}" for name, value in values.items()) + "."
    return bars(values, title="Accuracy", says=says, unit="top-1 %")


def _table(summary: DemoSummary) -> str:
    rows = [
        (
            mode,
            _WORDS.get(mode, ""),
            f"{result.top1:.1f}",
            "" if result.gap_closed is None else f"{result.gap_closed:.0%}",
            f"{result.seconds:.0f}",
        )
        for mode, result in summary.modes.items()
    ]
    seeds = len(next(iter(summary.modes.values())).top1_per_seed)
    caption = "Students of 100 labels, validated on 500 digits; " + ("one seed" if seeds == 1 else f"{seeds} seeds")
    headings = ("student", "what it does", "top-1 %", "gap closed", "seconds to train")
    cached = (
        f"The cache takes {summary.cache_nbytes_per_view:.0f} bytes a view; the same maps as float16 would take "
        f"{summary.map_nbytes_per_view:,}. All took {summary.seconds:.0f} seconds."
    )
    return table(headings, rows, caption=caption, numbers=3) + paragraph(cached)


def _links(out: Path) -> str:
    found = [path for mode in MODES for path in sorted((out / "runs").glob(f"{mode}-*/{REPORT_FILE}"))]
    places = [(path.parent.name, quote(path.relative_to(out).as_posix())) for path in found]
    items = "".join(f'<li><a href="{place}">{text(name)}</a></li>' for name, place in places)
    return paragraph("Each run has a report: curves, worst classes, mistakes and maps.") + f"<ul>{items}</ul>"
