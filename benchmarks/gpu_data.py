"""What the stages of `benchmarks/gpu.py` work on: made photos in tars, and random weights of a ViT-S.

    python benchmarks/gpu_data.py FOLDER [--samples 2048]

A photo is 1/f noise of 500 x 375 pixels, the size of ImageNet's, as a JPEG of quality 90: of about as many bytes and as
dear to decode. So speeds are right; fidelity is not that of real photos and weights. 128 photos repeat under new keys.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name

TEACHER = "vit_small_patch16_224"
HEIGHT, WIDTH, NUM_PHOTOS, SAMPLES_A_TAR = 375, 500, 128, 256


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG whose spectrum falls as that of photos does: amplitude 1/f (Field 1987)."""
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, HEIGHT, WIDTH))) / frequency
    noise = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
    # Colours of photos are much alike in all channels.
    mixed = 0.8 * noise[:1] + 0.2 * noise
    pixels = 128 + 50 * (mixed - mixed.mean()) / mixed.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=2048)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rng = np.random.default_rng(0)
    photos = [photo(rng) for _ in range(NUM_PHOTOS)]
    tars = options.folder / "photos"
    tars.mkdir(parents=True, exist_ok=True)
    for first in range(0, options.samples, SAMPLES_A_TAR):
        path = tars / f"photos-{first // SAMPLES_A_TAR:04d}.tar"
        with path.open("wb") as file, webdataset.TarWriter(file) as writer:
            for sample in range(first, min(first + SAMPLES_A_TAR, options.samples)):
                label = str(sample % 10).encode()
                writer.write({"__key__": f"photo-{sample:06d}", "jpg": photos[sample % NUM_PHOTOS], "cls": label})
    torch.manual_seed(0)
    model = create_student(parse_model_name(TEACHER), num_classes=10)
    save_file(dict(model.state_dict()), options.folder / "weights.safetensors")
    nbytes = sum(map(len, photos)) / len(photos)
    print(f"{options.samples} samples of {nbytes / 1000:.0f} kB each in {tars}, and random weights of {TEACHER}")


if __name__ == "__main__":
    main()
