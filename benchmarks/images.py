"""What an image costs one core, and what reduced decoding changes in views and in a teacher's attention.

    python benchmarks/images.py --data 'tars/*.tar' [--weights dinov2-vit-s.safetensors] [--samples 24]

Photos are taken as they are and, enlarged and saved again as JPEGs of quality 90, at 4 and 8 times their sides. For
each size and policy, it prints the milliseconds a view of full decoding and of `--decoding reduced`, the share of views
that were reduced, and how far those are from the full ones: PSNR, and, with `--weights` of DINOv2 ViT-S, the mean row
KL between the teacher's maps of both. Then the milliseconds of decoding alone, by Pillow and by those decoders that are
installed (torchvision, simplejpeg), and whether they give Pillow's pixels in every bit.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

from atcache.attention.capture import FactorCapture
from atcache.codecs.fidelity import mean_row_kl
from atcache.images.decode import EncodedImage, decode_image
from atcache.images.source import Source, index_source
from atcache.teachers.run import TeacherRun
from atcache.views.apply import reduction_of, render_alone
from atcache.views.draw import draw_view
from atcache.views.policy import ViewPolicy

Decode = Callable[[bytes], np.ndarray]
_TRIES = 5


def enlarged(data: bytes, factor: int) -> bytes:
    """A JPEG whose sides are `factor` times as long."""
    if factor == 1:
        return data
    image = decode_image(data, where="a photo")
    file = io.BytesIO()
    image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def render(data: bytes, key: str, policy: ViewPolicy) -> tuple[np.ndarray, float, bool]:
    """A view, the seconds it took, and whether it was decoded reduced."""
    start_s = time.perf_counter()
    encoded = EncodedImage(data, where=key)
    parameters_P = draw_view(policy, key, 0, encoded.height, encoded.width)
    pixels_HWC = render_alone(encoded, parameters_P, policy)
    seconds = time.perf_counter() - start_s
    height, width, *resized = map(int, parameters_P[2:6])
    return pixels_HWC, seconds, encoded.can_reduce and reduction_of(height, width, *resized) > 1


def row_kl_of(weights: Path | None) -> Callable[[list[np.ndarray], list[np.ndarray]], str]:
    """A function that returns the mean row KL between the maps of two lists of views, as text."""
    if weights is None:
        return lambda full, reduced: "-"
    run = TeacherRun.load("vit_small_patch14_dinov2:img_size=224", weights, device="cpu", precision="fp32")
    capture = FactorCapture(run.teacher.model, *run.select(None, None))

    def row_kl(full: list[np.ndarray], reduced: list[np.ndarray]) -> str:
        layers = [run.factors(capture, torch.from_numpy(np.stack(views[:4]))) for views in (full, reduced)]
        return f"{statistics.fmean(mean_row_kl(one, other.select) for one, other in zip(*layers, strict=True)):.4f}"

    return row_kl


def decoders() -> dict[str, Decode]:
    """Each decoder by name; one that is not installed is left out with a line."""
    found: dict[str, Decode] = {"Pillow": lambda data: np.asarray(decode_image(data, where="x"))}
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        def by_torchvision(data: bytes) -> np.ndarray:
            data_N = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels_CHW = cast("torch.Tensor", decode_jpeg(data_N, mode=ImageReadMode.RGB))  # a list only for a list
            return pixels_CHW.permute(1, 2, 0).numpy()

        by_torchvision(_smallest_jpeg())
        found["torchvision"] = by_torchvision
    except (ImportError, RuntimeError) as error:
        print(f"torchvision: left out ({error})")
    try:
        import simplejpeg  # pyright: ignore[reportMissingImports]

        found["simplejpeg"] = simplejpeg.decode_jpeg
    except ImportError:
        print("simplejpeg: left out, not installed")
    return found


def _smallest_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 8])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    options = parse(arguments)
    torch.set_num_threads(1)
    source = Source(index_source(options.data))
    photos = [source.read_bytes(sample) for sample in range(source.index.num_samples)]
    photos = [data for data in photos if data.startswith(b"\xff\xd8\xff")][: options.samples]
    row_kl, ways = row_kl_of(options.weights), decoders()
    print("| pixels | policy | full: ms | reduced: ms | full / reduced | views reduced | PSNR | row KL |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    by_decoder: list[str] = []
    for factor in options.factors:
        datas = [enlarged(data, factor) for data in photos]
        first = EncodedImage(datas[0], where="x")
        size = f"{first.width} x {first.height}"
        for name in ("crop-flip", "eval"):
            full = ViewPolicy(name=name, image_height=224, image_width=224)
            seconds_2: tuple[list[float], list[float]] = ([], [])
            views_2: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
            num_reduced = 0
            for number, data in enumerate(datas):  # one right after the other: other processes slow down both
                pair = [render(data, str(number), policy) for policy in (full, replace(full, decoding="reduced"))]
                for seconds, (_, took_s, _) in zip(seconds_2, pair, strict=True):
                    seconds.append(1e3 * took_s)
                if pair[0][2]:
                    num_reduced += 1
                    for views, (pixels_HWC, _, _) in zip(views_2, pair, strict=True):
                        views.append(pixels_HWC)
            psnr = kl = "-"
            if num_reduced:
                squares = np.square(np.subtract(*(np.stack(views).astype(np.float64) for views in views_2)))
                psnr, kl = f"{10 * np.log10(255**2 / squares.mean()):.1f}", row_kl(*views_2)
            full_ms, reduced_ms = map(statistics.median, seconds_2)
            print(
                f"| {size} | {name} | {full_ms:.1f} | {reduced_ms:.1f} | {full_ms / reduced_ms:.2f} | "
                f"{num_reduced / len(datas):.0%} | {psnr} | {kl} |",
                flush=True,
            )
        times_ms: dict[str, list[float]] = {name: [] for name in ways}
        same = dict.fromkeys(ways, True)
        for data in datas:
            pillow_HWC = ways["Pillow"](data)
            for name, decode in ways.items():
                tries_ms: list[float] = []
                for _ in range(_TRIES):
                    start_s = time.perf_counter()
                    pixels_HWC = decode(data)
                    tries_ms.append(1e3 * (time.perf_counter() - start_s))
                    same[name] &= np.array_equal(pixels_HWC, pillow_HWC)
                times_ms[name].append(min(tries_ms))  # the rest is other processes
        by_decoder += [
            f"| {size} | {name} | {statistics.median(times_ms[name]):.1f} | {'yes' if same[name] else 'no'} |"
            for name in ways
        ]
    print("\n| pixels | decoder, whole image | ms | Pillow's pixels |\n|---|---|--:|---|")
    print("\n".join(by_decoder))


if __name__ == "__main__":
    main()
