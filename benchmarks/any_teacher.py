"""Codec transform on many kinds of teacher: is the target met, how long does the fit take, how large is the state?

    python benchmarks/any_teacher.py --data TARS [--views 24] [--target-kl 0.005 0.00002] [--teacher NAME ...]

Teachers have random weights, and those of q and k are four times as large as usual, so that maps are sharp and of full
rank: the hardest case for a codec that looks for what components have in common. The KL is measured on every eighth
view, which the codec is not fitted to. A line says "missed" where the KL is above the target.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from atcache.codecs.transform.codec import TransformCodec
from atcache.codecs.transform.coder import TransformCoder
from atcache.errors import AtcacheError
from atcache.images.source import index_source
from atcache.pipelines.build.calibrate import calibrate, render_calibration_views
from atcache.pipelines.build.sizes import codes_nbytes
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, measure and print a line for each teacher and target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="tars, as for `atcache build`")
    parser.add_argument("--views", type=int, default=24, help="views to fit and to measure on (default 24)")
    parser.add_argument("--target-kl", type=float, nargs="+", default=[0.005, 2e-5])
    parser.add_argument("--teacher", action="append", help=f"may be repeated (default {', '.join(TEACHERS)})")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
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
        pixels_NHWC = render_calibration_views(index, policy, options.views, skip_bad=True).pixels_NHWC
        for target in options.target_kl:
            print(_row(name, run, pixels_NHWC, target), flush=True)


def _is_of_q_and_k(key: str) -> bool:
    return any(part in key for part in ("qkv.weight", "q_proj.weight", "k_proj.weight"))


def _row(name: str, run: TeacherRun, pixels_NHWC: torch.Tensor, target: float) -> str:
    start_s = time.perf_counter()
    try:
        found = calibrate(run, TransformCodec(target_kl=target), pixels_NHWC, layers=None, heads=None, batch_size=8)
    except AtcacheError as error:
        return f"| {name} | | {target:g} | {error} | | | | | |"
    coder = found.coder
    assert isinstance(coder, TransformCoder), "that codec was asked for"
    held_back = found.codes_BLTC[: found.num_held_back]
    kl = f"{found.row_kl_nats:.2g}" + ("" if found.row_kl_nats <= 1.1 * target else " missed")
    return (
        f"| {name} | {coder.geometry.tokens.num_tokens} | {target:g} | {kl} | {codes_nbytes(held_back):,.0f} "
        f"| {found.state_nbytes / 1e6:.1f} | {max(coder.packing.num_components)} "
        f"| {'of the blocks' if coder.projections is not None else 'q and k'} | {time.perf_counter() - start_s:.0f} |"
    )


if __name__ == "__main__":
    main()
