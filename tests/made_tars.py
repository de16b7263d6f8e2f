"""Tars for tests, member by member."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def picture(seed: int = 0, size: tuple[int, int] = (13, 9)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path: Path, members, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, label: int = 0, size: int = 700) -> list:
    return [member(f"{key}.cls", str(label).encode()), member(f"{key}.png", os.urandom(size))]
