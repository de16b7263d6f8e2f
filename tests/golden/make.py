"""Write golden caches of the format this version writes. Run once a cache, then keep: they must decode for ever.

    python tests/golden/make.py

Adds to `format-N/` here what it lacks: the tar, the caches, and what they decode to. What is there stays as it is.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
# The caches record where their tars and weights were: a path that says nothing of whoever ran this.
WORKSHOP = Path("/tmp/atcache-golden")

VIT = "vit_tiny_patch16_224:img_size=12,patch_size=4,embed_dim=32,depth=2,num_heads=2,num_classes=10"
BEIT = "beit_base_patch16_224:img_size=12,patch_size=4,embed_dim=32,depth=2,num_heads=2,num_classes=10"
# Registers and a grid that is not square: prefix tokens, rows and columns that cannot be taken for each other.
REGISTERS = (
    "vit_tiny_patch16_224:img_size=(16,12),patch_size=4,reg_tokens=2,embed_dim=16,depth=2,num_heads=2,num_classes=10"
)
# Rotary position embedding: q and k follow from a layer's input by a product and a rotation.
ROPE = (
    "eva02_tiny_patch14_224:img_size=12,patch_size=4,embed_dim=32,depth=2,num_heads=2,num_classes=10,ref_feat_shape=3"
)
CAIT = "cait_xxs24_224:img_size=12,patch_size=4,embed_dim=32,depth=2,num_heads=2,num_classes=10"
CACHES = {
    "exact": {"teacher": VIT, "codec": "exact", "policy": "crop-flip"},
    "int8-pixels": {"teacher": VIT, "codec": "int8", "policy": "randaug", "views": 2, "pixels": "store"},
    "int8-bias": {"teacher": BEIT, "codec": "int8", "policy": "eval"},
    "exact-part": {"teacher": VIT, "codec": "exact:dtype=float32", "policy": "eval", "layers": "1", "heads": "1"},
    "mixed": {"teacher": VIT, "codec": "int8", "policy": "randaug", "views": 2, "mixup": 0.8, "cutmix": 1.0},
    "logmap": {"teacher": CAIT, "codec": "logmap", "policy": "eval"},
    "values": {"teacher": VIT, "codec": "int8", "policy": "eval", "store": "v"},
    "inputs": {"teacher": REGISTERS, "codec": "int8", "policy": "eval", "store": "x"},
    "rows": {"teacher": REGISTERS, "policy": "eval", "queries": "prefix"},
    "transform": {"teacher": REGISTERS, "codec": "transform", "policy": "crop-flip", "views": 2},
    "transform-rope": {"teacher": ROPE, "codec": "transform", "policy": "crop-flip"},
}
BAD_SAMPLE = 2


def write_tar(path: Path) -> None:
    """Five images of 10 x 12 in two formats and one that is none."""
    import webdataset
    from PIL import Image

    rows, columns = np.mgrid[0:10, 0:12]
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for number in range(6):
            waves = np.sin(rows[..., None] * (number + 1) / 3 + columns[..., None] / (number + 2) + np.arange(3))
            pixels = (127.5 + 127.5 * waves).astype(np.uint8)
            kind = "jpg" if number % 2 else "png"
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, format={"jpg": "JPEG", "png": "PNG"}[kind])
            data = b"no image" if number == BAD_SAMPLE else encoded.getvalue()
            writer.write({"__key__": f"wave-{number}", kind: data, "cls": str(number).encode()})


def write_weights(path: Path, teacher: str) -> None:
    """Random weights with maps that are far from uniform, and a bias that is not 0."""
    import torch
    from safetensors.torch import save_file

    from atcache.teachers.load import create_student
    from atcache.teachers.names import parse_model_name

    torch.manual_seed(0)
    weights = create_student(parse_model_name(teacher), num_classes=10).state_dict()
    for name, tensor in weights.items():
        if "qkv.weight" in name:
            tensor *= 24
        if "proj_l.weight" in name or "proj_w.weight" in name:
            tensor += torch.eye(len(tensor))
        if "relative_position_bias_table" in name:
            tensor += torch.linspace(-1, 1, tensor.numel()).view_as(tensor)
    save_file(weights, path)


def main() -> None:
    """Build what is missing in the workshop, then put it here."""
    # MKL draws normal numbers differently on each kind of processor, unless it is told not to.
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    import atcache
    from atcache.pipelines.build.config import BuildConfig
    from atcache.pipelines.build.run import build
    from atcache.store.layout import FORMAT

    target = FOLDER / f"format-{FORMAT}"
    shutil.rmtree(WORKSHOP, ignore_errors=True)
    (WORKSHOP / "tars").mkdir(parents=True)
    # Caches that are added later are made of the same tar, whatever libraries would write today.
    tar = target / "tars" / "waves.tar"
    if tar.exists():
        shutil.copy(tar, WORKSHOP / "tars")
    else:
        write_tar(WORKSHOP / "tars" / tar.name)
    missing = {name: fields for name, fields in CACHES.items() if not (target / f"{name}.zarr").exists()}
    for name, fields in missing.items():
        weights = WORKSHOP / f"{name}.safetensors"
        write_weights(weights, fields["teacher"])
        config = BuildConfig(
            data=str(WORKSHOP / "tars"),
            weights=weights,
            out=WORKSHOP / f"{name}.zarr",
            samples_per_shard=4,
            on_bad_image="skip",
            workers=0,
            device="cpu",
            precision="fp32",
            **fields,
        )
        build(config)
        weights.unlink()
        cache = atcache.open(config.out)
        maps = np.stack([cache.maps(layer=layer).compute() for layer in cache.geometry.layers])
        good = [sample for sample in range(6) if sample != BAD_SAMPLE]
        images = [[cache.image(sample, view) for sample in good] for view in range(config.views)]
        np.save(WORKSHOP / f"{name}.maps_LVSHQK.npy", maps[:, :, [0, 5]])
        np.save(WORKSHOP / f"{name}.images_VSHWC.npy", np.stack(images))
        if cache.geometry.input_width:
            np.save(WORKSHOP / f"{name}.inputs_SLNTC.npy", np.stack([cache.view(row).inputs_LNTC for row in (0, 5)]))
        if cache.geometry.v_head_dim:
            v_LVSHTD = np.stack([cache.factors(layer=layer).v_VSHTD.compute() for layer in cache.geometry.layers])
            np.save(WORKSHOP / f"{name}.v_LVSHTD.npy", v_LVSHTD[:, :, [0, 5]])
    for path in WORKSHOP.rglob("*"):
        copied = target / path.relative_to(WORKSHOP)
        if path.is_file() and not copied.exists():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied)
    shutil.rmtree(WORKSHOP)


if __name__ == "__main__":
    main()
