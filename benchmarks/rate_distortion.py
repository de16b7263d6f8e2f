"""Bytes against fidelity: atcache's codecs and what a user would otherwise choose, on the maps of one teacher.

    python benchmarks/rate_distortion.py --teacher NAME --weights FILE --data TARS --views 32 --out FOLDER

Codecs are fitted on calibration views. Everything is measured on other, held-back views of the same data. The script
prints a table and, for each codec, the fewest bytes that any general-purpose compressor needs for the same KL. It
writes all numbers to FOLDER/rate_distortion.json, the tables to FOLDER/rate_distortion.md, and a plot of bytes against
KL to FOLDER/rate_distortion.png.

Everything runs on one thread. A codec encodes factors to stored bytes and decodes them to factors; a compressor of maps
encodes maps and decodes to maps. Speeds of both are in megabytes of float16 maps per second.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from map_compressors import FLOOR, map_compressors
from numcodecs import blosc
from storage_ways import CodecWay, MapWay, Measured, Scales, Way
from torch import Tensor

from atcache.attention.capture import check_capture
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.registry import parse_codec
from atcache.errors import AtcacheError
from atcache.images.source import Source, index_source
from atcache.teachers.devices import autocast, resolve_precision
from atcache.teachers.load import Teacher, load_teacher
from atcache.teachers.run import TeacherRun
from atcache.teachers.weights import read_weights
from atcache.views.apply import apply_view
from atcache.views.draw import draw_view

CODECS = (
    "exact",
    "int8",
    "logmap:bits=8",
    "logmap:bits=6",
    "logmap:bits=4",
    *(f"transform:target_kl={kl}" for kl in (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)),
    "transform:basis=layer",
    "transform:basis=head",
    "transform:positions=False",
    "transform:dct=False",
    "transform:basis=head,positions=False,dct=False",
)
"""The default of `--codec`. The last five are `transform` without one or all of its parts."""
_CHECKED_VIEWS = 2
_SMALLEST_PLOTTED_KL = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualKl:
    """A codec, and the best general-purpose compressor at the codec's KL."""

    codec: str
    row_kl_nats: float
    nbytes_per_view: float
    rival: str | None
    """The family that needs the fewest bytes; None if no family reaches so small a KL."""
    rival_nbytes_per_view: float | None
    """Interpolated between the family's settings, so that the choice of measured settings does not matter."""
    rival_setting: str | None
    """The measured setting with the fewest bytes among those with at most the codec's KL."""
    rival_setting_nbytes_per_view: float | None
    times_smaller: float | None
    """rival_nbytes_per_view / nbytes_per_view."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    blosc.use_threads = False
    teacher = load_teacher(options.teacher, weights=options.weights)
    run = TeacherRun(teacher=teacher, device=torch.device("cpu"), dtype=resolve_precision(options.precision, "cpu"))
    calibration_NHWC, held_back_NHWC = _pixels(teacher, options)
    with autocast(run.device, run.dtype):
        geometry = check_capture(teacher.model, run.images(calibration_NHWC[:_CHECKED_VIEWS])).geometry
    has_classes = _has_trained_head(teacher, options.weights)
    scales = Scales(run, geometry, held_back_NHWC, options.batch_size, has_classes=has_classes)
    codecs, skipped = options.codec or CODECS, {}
    rows: list[Measured] = []
    for way in _ways(codecs, run, geometry, calibration_NHWC, skipped):
        try:
            rows.append(scales.measure(way))
        except AtcacheError as error:
            skipped[way.name] = str(error)
            continue
        print(_progress(rows[-1]), file=sys.stderr)
    mean_map_kl = scales.mean_map_kl(calibration_NHWC)
    report = {
        "command": shlex.join(["python", "benchmarks/rate_distortion.py", *(arguments or sys.argv[1:])]),
        "torch": torch.__version__,
        "precision": str(run.dtype).removeprefix("torch."),
        "teacher": str(teacher.name),
        "weights_sha256": teacher.weights_sha256,
        "geometry": geometry.to_json(),
        "map_nbytes_per_view": geometry.map_nbytes,
        "mean_map_row_kl_nats": mean_map_kl,
        "num_calibration_views": len(calibration_NHWC),
        "num_held_back_views": len(held_back_NHWC),
        "rows": [asdict(row) for row in rows],
        "equal_kl": [asdict(equal) for equal in equal_kls(rows)],
        "skipped": skipped,
    }
    text = _text(geometry, len(held_back_NHWC), rows, skipped, mean_map_kl)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rate_distortion.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "rate_distortion.md").write_text(text + "\n")
    draw(rows, f"{teacher.name}\n{_sizes(geometry, len(held_back_NHWC))}", options.out / "rate_distortion.png")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a name as for `atcache build`")
    parser.add_argument("--weights", type=Path, help="file with the teacher's weights (default: timm's)")
    parser.add_argument("--data", required=True, help="tars, as for `atcache build`")
    parser.add_argument("--views", type=int, default=32, help="held-back views to measure on (default 32)")
    parser.add_argument("--calibration-views", type=int, default=256, help="other views to fit on (default 256)")
    parser.add_argument("--policy", choices=("crop-flip", "eval"), default="crop-flip", help="how views are drawn")
    parser.add_argument("--codec", action="append", help=f"may be repeated (default {', '.join(CODECS)})")
    parser.add_argument("--batch-size", type=int, default=2, help="views in memory at a time, as maps (default 2)")
    parser.add_argument("--precision", default="auto", help="the teacher's: auto, fp32 or bf16")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, table and plot")
    return parser.parse_args(arguments)


def _pixels(teacher: Teacher, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Calibration views and held-back views of different samples, both spread evenly over the data."""
    index = index_source(options.data, labels="optional", on_bad="skip")
    policy, source = teacher.input.view_policy(options.policy, 0), Source(index)
    good = np.flatnonzero(index.problem_S == 0)
    num_wanted = options.calibration_views + options.views
    if len(good) < num_wanted:
        sys.exit(
            f"{options.data} has {len(good)} good samples, but {num_wanted} are needed. Lower --views or "
            "--calibration-views."
        )
    chosen = good[np.linspace(0, len(good) - 1, num_wanted).astype(int)]
    is_held_back = np.zeros(num_wanted, bool)
    is_held_back[np.linspace(0, num_wanted - 1, options.views).astype(int)] = True

    def view(sample: int) -> Tensor:
        image = source.read_image(sample)
        parameters_P = draw_view(policy, index.sample_key(sample), 0, image.height, image.width)
        return torch.from_numpy(apply_view(image, parameters_P, policy))

    calibration, held_back = (
        torch.stack([view(int(sample)) for sample in samples])
        for samples in (chosen[~is_held_back], chosen[is_held_back])
    )
    return calibration, held_back


def _has_trained_head(teacher: Teacher, weights: Path | None) -> bool:
    """Whether the weights contain the classifier. If not, as in MAE's, loading leaves it with random weights."""
    head = teacher.model.state_dict().get("head.weight")
    if head is None or weights is None:
        return head is not None
    given = read_weights(weights).get("head.weight")
    return given is not None and given.shape == head.shape


def _ways(
    codecs: Sequence[str],
    run: TeacherRun,
    geometry: FactorGeometry,
    calibration_NHWC: Tensor,
    skipped: dict[str, str],
) -> Iterator[Way]:
    """Codecs first, then the compressors of maps. Adds those that are not available, with the reason, to `skipped`."""
    for name in codecs:
        codec = parse_codec(name)
        try:
            yield CodecWay(name, codec, run, calibration_NHWC)
        except AtcacheError as error:
            skipped[name] = str(error)
    compressors, missing = map_compressors()
    skipped.update(missing)
    for compressor in compressors:
        yield MapWay(compressor, geometry)


def equal_kls(rows: Sequence[Measured]) -> list[EqualKl]:
    """For each codec, the general-purpose compressor with the fewest bytes at the same mean KL."""
    rivals = [row for row in rows if not row.is_codec]
    families = {row.family: [other for other in rivals if other.family == row.family] for row in rivals}
    found: list[EqualKl] = []
    for row in rows:
        if not row.is_codec:
            continue
        nbytes = {name: interpolated_nbytes(family, row.row_kl_nats) for name, family in families.items()}
        reached = {name: value for name, value in nbytes.items() if value is not None}
        rival = min(reached, key=lambda name: reached[name], default=None)
        settings = [other for other in rivals if other.row_kl_nats <= row.row_kl_nats]
        setting = min(settings, key=lambda other: other.nbytes_per_view, default=None)
        found.append(
            EqualKl(
                codec=row.name,
                row_kl_nats=row.row_kl_nats,
                nbytes_per_view=row.nbytes_per_view,
                rival=rival,
                rival_nbytes_per_view=None if rival is None else reached[rival],
                rival_setting=None if setting is None else setting.name,
                rival_setting_nbytes_per_view=None if setting is None else setting.nbytes_per_view,
                times_smaller=None if rival is None else reached[rival] / row.nbytes_per_view,
            )
        )
    return found


def interpolated_nbytes(family: Sequence[Measured], row_kl_nats: float) -> float | None:
    """Fewest bytes of a family at a KL, interpolated on logarithmic axes; None if all its settings have a larger KL."""
    reached = [row for row in family if row.row_kl_nats <= row_kl_nats]
    if not reached:
        return None
    nbytes = min(row.nbytes_per_view for row in reached)
    beyond = [row for row in family if row.row_kl_nats > row_kl_nats]
    if beyond:
        low, high = max(reached, key=lambda row: row.row_kl_nats), min(beyond, key=lambda row: row.row_kl_nats)
        low_log, log, high_log = (math.log(max(kl, 1e-12)) for kl in (low.row_kl_nats, row_kl_nats, high.row_kl_nats))
        share = (log - low_log) / (high_log - low_log) if high_log > low_log else 0.0
        nbytes = min(nbytes, low.nbytes_per_view ** (1 - share) * high.nbytes_per_view**share)
    return nbytes


def _text(
    geometry: FactorGeometry, num_views: int, rows: Sequence[Measured], skipped: dict[str, str], mean_map_kl: float
) -> str:
    """The tables, as markdown."""
    lines = [
        f"{_sizes(geometry, num_views)}; float16 maps take {geometry.map_nbytes:,} bytes a view. KL in nats; "
        "MB of float16 maps a second on one core.",
        "",
        "| stored as | bytes a view | smaller than float16 | mean KL | 99th percentile | total variation "
        "| injected error | top-1 kept | encode MB/s (views/s) | decode MB/s (views/s) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        name = f"**{row.name}**" if row.is_codec else row.name
        top1 = "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}"
        lines.append(
            f"| {name} | {row.nbytes_per_view:,.0f} | {row.times_smaller:.1f}x | {row.row_kl_nats:.2g} "
            f"| {row.row_kl_p99_nats:.2g} | {row.total_variation:.2g} | {100 * row.injected_error:.2g}% | {top1} "
            f"| {row.encode_mb_per_s:.0f} ({row.encode_views_per_s:.0f}) "
            f"| {row.decode_mb_per_s:.0f} ({row.decode_views_per_s:.0f}) |"
        )
    lines += ["", "| codec | mean KL | bytes a view | best compressor of maps at this KL | its bytes a view | ratio |"]
    lines += ["|---|--:|--:|---|--:|--:|"]
    for equal in equal_kls(rows):
        beside = (
            f"{equal.rival} | {equal.rival_nbytes_per_view:,.0f} | {equal.times_smaller:.1f}x"
            if equal.rival is not None
            else "none is as close | | "
        )
        lines.append(f"| {equal.codec} | {equal.row_kl_nats:.2g} | {equal.nbytes_per_view:,.0f} | {beside} |")
    lines += [
        "",
        f"In KL, probabilities that a compressor made 0 count as {FLOOR:.1g}, the smallest float16. A compressor's "
        "bytes at a codec's KL are interpolated between its settings.",
        f"For comparison: using one mean map for every image, which needs no bytes, has a KL of {mean_map_kl:.2g}.",
    ]
    lines += [f"Not measured: {name}: {reason}" for name, reason in skipped.items()]
    return "\n".join(lines)


def _sizes(geometry: FactorGeometry, num_views: int) -> str:
    return (
        f"{geometry.tokens.num_tokens} tokens, {len(geometry.layers)} layers x {len(geometry.heads)} heads of "
        f"{geometry.head_dim}, {num_views} held-back views"
    )


def _progress(row: Measured) -> str:
    return f"{row.name}: {row.nbytes_per_view:.0f} bytes a view, {row.times_smaller:.1f}x, KL {row.row_kl_nats:.2g}"


def draw(rows: Sequence[Measured], title: str, path: Path) -> None:
    """Plot bytes a view against mean KL on logarithmic axes, with one curve for each family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6), layout="constrained")
    axes = figure.subplots()
    families = list(dict.fromkeys(row.family for row in rows))
    for number, family in enumerate(families):
        points = sorted((row for row in rows if row.family == family), key=lambda row: row.row_kl_nats)
        is_codec = points[0].is_codec
        axes.plot(
            [max(row.row_kl_nats, _SMALLEST_PLOTTED_KL) for row in points],
            [row.nbytes_per_view for row in points],
            color=f"C{number % 10}",
            marker="*" if is_codec else "os^vD"[number // 10 % 5],
            markersize=13 if is_codec else 4,
            linewidth=2.2 if is_codec else 1,
            linestyle="-" if is_codec else "--",
            label=f"{family} (atcache)" if is_codec else family,
        )
    axes.set(xscale="log", yscale="log", ylabel="bytes a view")
    axes.set_xlabel(f"mean row KL, nats ({_SMALLEST_PLOTTED_KL:g} or less at the left)")
    axes.grid(which="both", alpha=0.25)
    axes.set_title("\n".join(part for line in title.split("\n") for part in textwrap.wrap(line, 90)), fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
