"""What a corrupted view costs one core, and how far it is from the clean one.

    python benchmarks/corruptions.py [--data 'tars/*.tar'] [--size 224] [--samples 8]

For each of the 15 corruptions, it prints the milliseconds an image (the fastest of all images, severity by severity,
then the slowest severity), and the mean PSNR of the corrupted views at severities 1 to 5, in dB. Without `--data`, the
images are made.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from atcache.images.source import Source, index_source
from atcache.views.apply import apply_view
from atcache.views.corrupt import NAMES, SEVERITIES, Corruption
from atcache.views.draw import draw_view
from atcache.views.policy import ViewPolicy


def made_views(num_samples: int, size: int) -> list[np.ndarray]:
    """Smooth waves of colour with some noise."""
    y, x = np.mgrid[0:size, 0:size] / size
    draw = np.random.default_rng(0)
    waves = [np.sin(6 * (y * (1 + n) + x)[..., None] + np.arange(3)) for n in range(num_samples)]
    return [np.clip(127 + 90 * wave + draw.normal(0, 12, wave.shape), 0, 255).astype(np.uint8) for wave in waves]


def views_of(data: str, num_samples: int, size: int) -> list[np.ndarray]:
    """The clean evaluation views of the first samples."""
    source, policy = (
        Source(index_source(data, labels="none")),
        ViewPolicy(name="eval", image_height=size, image_width=size),
    )
    views: list[np.ndarray] = []
    for sample in range(min(num_samples, source.index.num_samples)):
        image = source.read_image(sample)
        views.append(apply_view(image, draw_view(policy, "", 0, image.height, image.width), policy))
    return views


def measure(views: list[np.ndarray], corruption: Corruption) -> tuple[float, float]:
    """Milliseconds an image, of the fastest, and the mean PSNR in dB."""
    seconds, psnrs = [], []
    for seed, clean in enumerate(views):
        start_s = time.perf_counter()
        found = corruption.apply(clean, seed)
        seconds.append(time.perf_counter() - start_s)
        squares = np.square(found.astype(float) - clean).mean()
        psnrs.append(10 * np.log10(255**2 / max(squares, 1e-9)))
    return 1000 * min(seconds), float(np.mean(psnrs))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="tars of images; without it, images are made")
    parser.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
    parser.add_argument("--samples", type=int, default=8, help="number of images")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.data:
        views = views_of(options.data, options.samples, options.size)
    else:
        views = made_views(options.samples, options.size)
    print(f"{len(views)} views of {options.size} x {options.size} pixels")
    print(f"{'corruption':<18} {'ms an image, severity 1 to 5':>34} {'most':>6}   {'PSNR, severity 1 to 5, dB'}")
    for name in NAMES:
        found = [measure(views, Corruption(name, severity)) for severity in SEVERITIES]
        times = "".join(f"{ms:7.1f}" for ms, _ in found)
        print(
            f"{name:<18} {times:>34} {max(ms for ms, _ in found):6.1f}  {''.join(f'{psnr:6.1f}' for _, psnr in found)}"
        )


if __name__ == "__main__":
    main()
