"""Codec transform on many kinds of teacher: is the target met, how long does the fit take, how large is the state?

    python benchmarks/any_teacher.py --data TARS [--views 24] [--measure 16] [--target-kl 0.005 2e-5] [--teacher NAME]

Teachers have random weights, and those of q and k are four times as large as usual, so that maps are sharp and of full
rank: the hardest case for a codec that looks for what components have in common. The KL is measured on views of other
images than those that the codec is fitted to and its step is searched on. A line says "missed" where the KL is over 1.5
times the target, of which `atcache build` warns too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from atcache.codecs.base import Coder
from atcache.codecs.transform.codec import TransformCodec
from atcache.codecs.transform.coder import TransformCoder
from atcache.errors import AtcacheError
from atcache.images.source import index_source
from atcache.pipelines.build.calibrate import calibrate, render_calibration_views
from atcache.pipelines.build.sizes import codes_nbytes
from atcache.pipelines.fidelity import Expectation, layer_row_kl
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name
from atcache.teachers.run import TeacherRun

TEACHERS = (
    "vit_small_patch16_224:depth=24",
    "vit_small_patch14_reg4_dinov2:img_size=224",
    "beit_base_patch16_224:depth=4",
    "eva02_small_patch14_224:depth=6",
    "vit_small_patch16_rope_mixed_224:depth=6",
    "vit_small_patch14_dinov2:img_size=518,depth=2",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
)
_TIMES = 4.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="tars, as for `atcache build`")
    parser.add_argument("--views", type=int, default=24, help="views to fit to (default 24)")
    parser.add_argument("--measure", type=int, default=16, help="views of other images to measure on (default 16)")
    parser.add_argument("--target-kl", type=float, nargs="+", default=[0.005, 2e-5])
    parser.add_argument("--teacher", action="append", help=f"may be repeated (default {', '.join(TEACHERS)})")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    if min(options.views, options.measure) < 1:
        parser.error(f"--views {options.views} --measure {options.measure}: expected at least 1 each.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, measure and print a line for each teacher and target."""
    options = parse(arguments)
    print(
        "| teacher | tokens | target KL | KL | bytes a view | state, MB | components, most a layer | inputs | fit, s |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|---|--:|", flush=True)
    for name in options.teacher or TEACHERS:
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.pth"
            torch.manual_seed(0)
            state = create_student(parse_model_name(name), num_classes=10).state_dict()
            torch.save({key: value * _TIMES if _is_of_q_and_k(key) else value for key, value in state.items()}, weights)
            run = TeacherRun.load(name, weights, device=options.device, precision="fp32")
        policy = run.teacher.input.view_policy("crop-flip", 0)
        index = index_source(options.data, labels="optional", on_bad="skip")
        num_views = options.views + options.measure
        pixels_NHWC = render_calibration_views(index, policy, num_views, skip_bad=True).pixels_NHWC
        if len(pixels_NHWC) < num_views:
            raise SystemExit(
                f"{options.data}: only {len(pixels_NHWC)} images can be read, and --views {options.views} --measure "
                f"{options.measure} need {num_views}. Give more images, or smaller numbers."
            )
        fitted_NHWC, measured_NHWC = split(pixels_NHWC, options.measure)
        for target in options.target_kl:
            print(row(name, run, fitted_NHWC, measured_NHWC, target), flush=True)


def split(pixels_NHWC: torch.Tensor, num_measured: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The views to fit to, and `num_measured` others, evenly spaced: tars may be sorted by class."""
    measured_M = torch.linspace(0, len(pixels_NHWC) - 1, num_measured).round().long()
    is_measured_N = torch.zeros(len(pixels_NHWC), dtype=torch.bool)
    is_measured_N[measured_M] = True
    return pixels_NHWC[~is_measured_N], pixels_NHWC[is_measured_N]


def _is_of_q_and_k(key: str) -> bool:
    return any(part in key for part in ("qkv.weight", "q_proj.weight", "k_proj.weight"))


def row(name: str, run: TeacherRun, fitted_NHWC: torch.Tensor, measured_NHWC: torch.Tensor, target: float) -> str:
    """A line of the table: the codec fitted to some views, and measured on others."""
    start_s, codec = time.perf_counter(), TransformCodec(target_kl=target)
    try:
        found = calibrate(run, codec, fitted_NHWC, layers=None, heads=None, batch_size=8)
    except AtcacheError as error:
        return f"| {name} | | {target:g} | {error} | | | | | |"
    seconds = time.perf_counter() - start_s
    coder = found.coder
    assert isinstance(coder, TransformCoder), "that codec was asked for"
    row_kl_nats, codes_BLTC = measure(run, coder, measured_NHWC)
    limit_nats = Expectation.of(codec, target, run.dtype).limit_nats
    kl = f"{row_kl_nats:.2g}" + ("" if row_kl_nats <= limit_nats else " missed")
    return (
        f"| {name} | {coder.geometry.tokens.num_tokens} | {target:g} | {kl} | {codes_nbytes(codes_BLTC):,.0f} "
        f"| {found.state_nbytes / 1e6:.1f} | {max(coder.packing.num_components)} "
        f"| {'of the blocks' if coder.projections is not None else 'q and k'} | {seconds:.0f} |"
    )


def measure(
    run: TeacherRun, coder: Coder, pixels_NHWC: torch.Tensor, batch_size: int = 8
) -> tuple[float, torch.Tensor]:
    """Mean row KL of decoded maps of these views over all layers, in nats, and the views' codes."""
    capture = run.capture(coder.geometry, coder.input_calls)
    total, codes = 0.0, []
    for pixels_BHWC in pixels_NHWC.split(batch_size):
        layers = run.factors(capture, pixels_BHWC)
        codes.append(coder.encode(layers))
        kl_L = layer_row_kl(coder, layers, codes[-1])
        total += sum(kl_L) / len(kl_L) * len(pixels_BHWC)
    return total / len(pixels_NHWC), torch.cat(codes).cpu()


if __name__ == "__main__":
    main()
