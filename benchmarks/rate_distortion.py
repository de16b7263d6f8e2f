"""Bytes against fidelity: atcache's codecs and what a user would otherwise choose, on the maps of one teacher.

    python benchmarks/rate_distortion.py --teacher NAME --weights FILE --data TARS --out FOLDER

Codecs, and the rival that stores factors (`kvtc.py`), are fitted on views of some samples. Everything is measured on
views of other samples of the same data. The script prints a table; what decoding costs beside the teacher's own
forward; and, for each codec, the fewest bytes that any general-purpose compressor of maps needs for the same KL, and
those that the rival needs. It writes all numbers to FOLDER/rate_distortion.json, the tables to
FOLDER/rate_distortion.md, and a plot of bytes against KL to FOLDER/rate_distortion.png.

Everything runs on one thread. A codec encodes factors to stored bytes and decodes them to factors; a compressor of maps
encodes maps and decodes to maps. Speeds of both are in megabytes of float16 maps per second.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from equal_kl import equal_kl_table, equal_kls
from kvtc import FAMILY as KVTC, kvtc_ways
from map_compressors import FLOOR, map_compressors
from numcodecs import blosc
from storage_ways import CodecWay, MapWay, Measured, Scales, Way
from torch import Tensor

from atcache.attention.capture import CaptureCheck, check_capture
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.registry import parse_codec
from atcache.errors import AtcacheError
from atcache.images.source import Source, index_source
from atcache.teachers.devices import autocast, resolve_precision
from atcache.teachers.load import Teacher, load_teacher
from atcache.teachers.run import TeacherRun
from atcache.teachers.weight_files import read_weights
from atcache.views.apply import apply_view
from atcache.views.draw import draw_view

CODECS = (
    "exact",
    "int8",
    "logmap:bits=8",
    "logmap:bits=6",
    "logmap:bits=4",
    *(f"transform:target_kl={kl}" for kl in (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)),
    "transform:predict=False",
    "transform:dct=False",
)
"""The default of `--codec`. The last two are `transform` without one of its parts."""
_CHECKED_VIEWS = 2
_SMALLEST_PLOTTED_KL = 1e-8


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    options = parse(arguments)
    torch.set_num_threads(1)
    blosc.use_threads = False
    teacher = load_teacher(options.teacher, weights=options.weights)
    run = TeacherRun(teacher=teacher, device=torch.device("cpu"), dtype=resolve_precision(options.precision, "cpu"))
    calibration_NHWC, held_back_NHWC = _pixels(teacher, options)
    with autocast(run.device, run.dtype):
        check = check_capture(teacher.model, run.images(calibration_NHWC[:_CHECKED_VIEWS]), with_inputs=True)
    geometry = check.geometry
    has_classes = _has_trained_head(teacher, options.weights)
    scales = Scales(run, check, held_back_NHWC, options.batch_size, has_classes=has_classes)
    codecs, skipped = options.codec or CODECS, {}
    rows: list[Measured] = []
    for way in _ways(codecs, options.rivals, run, check, calibration_NHWC, skipped):
        try:
            rows.append(scales.measure(way))
        except AtcacheError as error:
            skipped[way.name] = str(error)
            continue
        print(_progress(rows[-1]), file=sys.stderr)
    mean_map_kl, teacher_macs = scales.mean_map_kl(calibration_NHWC), scales.teacher_macs()
    report = {
        "command": shlex.join(["python", "benchmarks/rate_distortion.py", *(arguments or sys.argv[1:])]),
        "torch": torch.__version__,
        "precision": str(run.dtype).removeprefix("torch."),
        "teacher": str(teacher.name),
        "weights_sha256": teacher.weights_sha256,
        "teacher_macs_per_view": teacher_macs,
        "geometry": geometry.to_json(),
        "map_nbytes_per_view": geometry.map_nbytes,
        "mean_map_row_kl_nats": mean_map_kl,
        "num_calibration_views": len(calibration_NHWC),
        "num_held_back_views": len(held_back_NHWC),
        "crops": options.crops,
        "rows": [asdict(row) for row in rows],
        "equal_kl": [asdict(equal) for equal in equal_kls(rows)],
        "skipped": skipped,
    }
    sizes = _sizes(geometry, options)
    text = "\n".join(
        [
            f"{sizes}; float16 maps take {geometry.map_nbytes:,} bytes a view. KL in nats; "
            "MB of float16 maps a second on one core.",
            "",
            *_main_table(rows),
            "",
            *_cost_table(rows, teacher_macs),
            "",
            *equal_kl_table(equal_kls(rows)),
            "",
            *_notes(skipped, mean_map_kl),
        ]
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rate_distortion.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "rate_distortion.md").write_text(text + "\n")
    draw(rows, f"{teacher.name}\n{sizes}", options.out / "rate_distortion.png")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a name as for `atcache build`")
    parser.add_argument("--weights", type=Path, help="file with the teacher's weights (default: timm's)")
    parser.add_argument("--data", required=True, help="tars, as for `atcache build`")
    parser.add_argument("--samples-fit", type=int, default=80, help="samples to fit on (default 80)")
    parser.add_argument("--samples-measured", type=int, default=12, help="other samples to measure on (default 12)")
    parser.add_argument("--crops", type=int, default=3, help="views of each sample (default 3)")
    parser.add_argument("--policy", choices=("crop-flip", "eval"), default="crop-flip", help="how views are drawn")
    parser.add_argument("--codec", action="append", help=f"may be repeated (default {', '.join(CODECS)})")
    parser.add_argument(
        "--rivals", choices=("all", "kvtc", "none"), default="all", help="compressors of maps take most of the time"
    )
    parser.add_argument("--batch-size", type=int, default=2, help="views in memory at a time, as maps (default 2)")
    parser.add_argument("--precision", default="auto", help="the teacher's: auto, fp32 or bf16")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, table and plot")
    options = parser.parse_args(arguments)
    if options.policy == "eval" and options.crops > 1:
        parser.error("--policy eval draws the same view of a sample every time: use it with --crops 1.")
    if min(options.samples_fit * options.crops, options.samples_measured * options.crops) < 2:
        parser.error("at least 2 views are needed to fit on, and 2 to measure on.")
    return options


def _pixels(teacher: Teacher, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Calibration views and held-back views, all of a sample's views together.

    They are of different samples, so that what is measured was never seen in fitting, not even in another crop. Both
    are spread evenly over the data.
    """
    index = index_source(options.data, labels="optional", on_bad="skip")
    policy, source = teacher.input.view_policy(options.policy, 0), Source(index)
    good = np.flatnonzero(index.problem_S == 0)
    num_wanted = options.samples_fit + options.samples_measured
    if len(good) < num_wanted:
        sys.exit(
            f"{options.data} has {len(good)} good samples, but {num_wanted} are needed. Lower --samples-fit or "
            "--samples-measured."
        )
    chosen = good[np.linspace(0, len(good) - 1, num_wanted).astype(int)]
    is_held_back = np.zeros(num_wanted, bool)
    is_held_back[np.linspace(0, num_wanted - 1, options.samples_measured).astype(int)] = True

    def views(samples: np.ndarray) -> Tensor:
        pixels: list[np.ndarray] = []
        for sample in samples.tolist():
            image, key = source.read_image(sample), index.sample_key(sample)
            for view in range(options.crops):
                parameters_P = draw_view(policy, key, view, image.height, image.width)
                pixels.append(apply_view(image, parameters_P, policy))
        return torch.from_numpy(np.stack(pixels))

    return views(chosen[~is_held_back]), views(chosen[is_held_back])


def _has_trained_head(teacher: Teacher, weights: Path | None) -> bool:
    """Whether the weights contain the classifier. If not, as in MAE's, loading leaves it with random weights."""
    head = teacher.model.state_dict().get("head.weight")
    if head is None or weights is None:
        return head is not None
    given = read_weights(weights).get("head.weight")
    return given is not None and given.shape == head.shape


def _ways(
    codecs: Sequence[str],
    rivals: str,
    run: TeacherRun,
    check: CaptureCheck,
    calibration_NHWC: Tensor,
    skipped: dict[str, str],
) -> Iterator[Way]:
    """Codecs first, then rivals. Adds those that are not available, with the reason, to `skipped`."""
    for name in codecs:
        try:
            yield CodecWay(name, parse_codec(name), run, calibration_NHWC)
        except AtcacheError as error:
            skipped[name] = str(error)
    if rivals != "none":
        try:
            yield from kvtc_ways(run, check, calibration_NHWC)
        except AtcacheError as error:
            skipped[KVTC] = str(error)
    if rivals != "all":
        return
    compressors, missing = map_compressors()
    skipped.update(missing)
    for compressor in compressors:
        yield MapWay(compressor, check.geometry)


def _main_table(rows: Sequence[Measured]) -> list[str]:
    """Bytes, fidelity and speed of every way."""
    lines = [
        "| stored as | bytes a view | smaller than float16 | mean KL | 99th percentile | total variation "
        "| injected error | top-1 kept | encode MB/s (views/s) | decode MB/s (views/s) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        top1 = "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}"
        lines.append(
            f"| {_shown(row)} | {row.nbytes_per_view:,.0f} | {row.times_smaller:.1f}x | {row.row_kl_nats:.2g} "
            f"| {row.row_kl_p99_nats:.2g} | {row.total_variation:.2g} | {100 * row.injected_error:.2g}% | {top1} "
            f"| {row.encode_mb_per_s:.0f} ({row.encode_views_per_s:.0f}) "
            f"| {row.decode_mb_per_s:.0f} ({row.decode_views_per_s:.0f}) |"
        )
    return lines


def _cost_table(rows: Sequence[Measured], teacher_macs: int) -> list[str]:
    """What decoding and fitting cost, of all but the compressors of maps, beside the teacher's forward of a view."""
    lines = [
        f"The teacher's forward of a view has {teacher_macs / 1e9:.3g}e9 multiply-adds. Its time is measured in turns "
        "with decoding, on the same core.",
        "",
        "| stored as | decode, ms a view | teacher forward, ms a view | decode / teacher forward "
        "| multiply-adds / teacher's | state, MB | fit, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.kind == "maps":
            continue
        macs = "" if row.decode_macs_per_view is None else f"{row.decode_macs_per_view / teacher_macs:.2g}"
        lines.append(
            f"| {_shown(row)} | {row.decode_ms:.3g} | {row.teacher_forward_ms:.3g} | {row.decode_per_forward:.2g} "
            f"| {macs} | {row.state_nbytes / 1e6:.3g} | {row.fit_s:.3g} |"
        )
    return lines


def _notes(skipped: dict[str, str], mean_map_kl: float) -> list[str]:
    return [
        f"In KL, probabilities that a compressor made 0 count as {FLOOR:.1g}, the smallest float16. A rival's bytes at "
        "a codec's KL are interpolated between its settings.",
        f"For comparison: using one mean map for every image, which needs no bytes, has a KL of {mean_map_kl:.2g}.",
        *(f"Not measured: {name}: {reason}" for name, reason in skipped.items()),
    ]


def _shown(row: Measured) -> str:
    return f"**{row.name}**" if row.kind == "codec" else row.name


def _sizes(geometry: FactorGeometry, options: argparse.Namespace) -> str:
    return (
        f"{geometry.tokens.num_tokens} tokens, {len(geometry.layers)} layers x {len(geometry.heads)} heads of "
        f"{geometry.head_dim}, {options.crops} views each of {options.samples_fit} samples fitted on and of "
        f"{options.samples_measured} others measured"
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
        marker, marker_size, width, style, label = _looks(points[0], number)
        axes.plot(
            [max(row.row_kl_nats, _SMALLEST_PLOTTED_KL) for row in points],
            [row.nbytes_per_view for row in points],
            color=f"C{number % 10}",
            marker=marker,
            markersize=marker_size,
            linewidth=width,
            linestyle=style,
            label=label,
        )
    axes.set(xscale="log", yscale="log", ylabel="bytes a view")
    axes.set_xlabel(f"mean row KL, nats ({_SMALLEST_PLOTTED_KL:g} or less at the left)")
    axes.grid(which="both", alpha=0.25)
    axes.set_title("\n".join(part for line in title.split("\n") for part in textwrap.wrap(line, 90)), fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def _looks(row: Measured, number: int) -> tuple[str, float, float, str, str]:
    """Marker and its size, width and style of the line, and label of the family that `row` belongs to."""
    if row.kind == "codec":
        return "*", 13, 2.2, "-", f"{row.family} (atcache)"
    if row.kind == "factors":
        return "P", 8, 2.2, "-.", f"{row.family} (factors)"
    return "os^vD"[number // 10 % 5], 4, 1, "--", row.family


if __name__ == "__main__":
    main()
