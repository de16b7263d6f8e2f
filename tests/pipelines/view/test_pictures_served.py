"""The images that `atcache view` serves are what the teacher saw, in whatever format they are in the tars."""

from __future__ import annotations

import io

import numpy as np
import pytest
from builds import write_tar
from PIL import Image

import atcache
from atcache.pipelines.build.run import build
from atcache.pipelines.view.images import Pictures

SIDE = 32


def encode(kind, mode, **options) -> bytes:
    """Random colours; half of the pixels are fully transparent where the mode has alpha."""
    colours_HWC = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    colours_HWC[..., 3] = np.arange(SIDE) % 2 * 255
    image = Image.fromarray(colours_HWC[..., :3] if mode == "P" else colours_HWC).convert(mode)
    encoded = io.BytesIO()
    image.save(encoded, format=kind, **options)
    return encoded.getvalue()


FILES = {
    "rgba": ("png", encode("PNG", "RGBA")),
    "grey-alpha": ("png", encode("PNG", "LA")),
    "palette": ("png", encode("PNG", "P", transparency=3)),
    "webp-lossless": ("webp", encode("WEBP", "RGBA", lossless=True, exact=True)),
    "webp-lossy": ("webp", encode("WEBP", "RGBA", exact=True)),
}
OPAQUE = {
    "png": ("png", encode("PNG", "RGB")),
    "webp-lossless": ("webp", encode("WEBP", "RGB", lossless=True)),
    "webp": ("webp", encode("WEBP", "RGB")),
}


@pytest.fixture
def pictures(digits_build, tmp_path):
    """A function: files by their names -> the images of a cache that is built from them."""
    from dataclasses import replace

    def pictures(files):
        samples = [{kind: data, "cls": "0"} for kind, data in files.values()]
        write_tar(tmp_path / "alpha.tar", samples)
        build(replace(digits_build, data=str(tmp_path / "alpha.tar"), out=tmp_path / "alpha.zarr"))
        return Pictures(tmp_path / "alpha.zarr")

    return pictures


def test_a_file_with_alpha_is_sent_with_the_colours_that_the_teacher_saw(pictures):
    served = pictures(FILES)
    for row, (name, (_, data)) in enumerate(FILES.items()):
        file, mime = served.image(row)
        sent = Image.open(io.BytesIO(file.pread(file.nbytes, 0)))
        assert (mime, sent.mode) == ("image/png", "RGB"), name
        assert np.array_equal(sent, atcache.images.decode.decode_image(data, where=name)), name


def test_a_file_without_alpha_is_sent_as_it_is(pictures):
    served = pictures(OPAQUE)
    for row, (kind, data) in enumerate(OPAQUE.values()):
        file, mime = served.image(row)
        assert (mime, file.pread(file.nbytes, 0)) == (f"image/{kind}", data)
