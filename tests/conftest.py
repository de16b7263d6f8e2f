"""What several test files share: a small real dataset, the name of a small real model, and calm threads."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch or matplotlib is imported by any test. Tiny models gain nothing from threads, and on a busy machine
# wait for each other's; there is no screen.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# `make test` gives the same results on every machine, so it hides a GPU, and interprets the kernels written for one.
# `make test-gpu` runs the tests that need one.
WITH_GPU = os.environ.get("ATCACHE_TEST_GPU") == "1"
if not WITH_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """Refuse to skip every test for want of a GPU."""
    if WITH_GPU:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("ATCACHE_TEST_GPU=1 runs the tests that need a GPU, and torch finds none here.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU, or all others."""
    for item in items:
        needs_gpu = item.get_closest_marker("gpu") is not None
        if needs_gpu != WITH_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu" if needs_gpu else "needs no GPU"))


# A busy machine is no reason for a property to fail: speed is measured in benchmarks/.
settings.register_profile("atcache", parent=settings(), deadline=None)
settings.load_profile("atcache")

NUM_TARS = 3
SAMPLES_PER_TAR = 16


@pytest.fixture(scope="session")
def digits_tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three tars of 16 handwritten digits each: 8 x 8 RGB PNGs with labels, keys "digit-00000" to "digit-00047"."""
    import webdataset
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = tmp_path_factory.mktemp("digits")
    paths = [folder / f"digits-{tar:04d}.tar" for tar in range(NUM_TARS)]
    for tar, path in enumerate(paths):
        with path.open("wb") as file, webdataset.TarWriter(file) as writer:
            for sample in range(tar * SAMPLES_PER_TAR, (tar + 1) * SAMPLES_PER_TAR):
                png = io.BytesIO()
                Image.fromarray((digits.images[sample] * 15).astype("uint8")).convert("RGB").save(png, format="PNG")
                label = int(digits.target[sample])
                writer.write({"__key__": f"digit-{sample:05d}", "png": png.getvalue(), "cls": str(label).encode()})
    return paths


@pytest.fixture(scope="session")
def tiny_vit() -> str:
    """A two-block ViT for the 8 x 8 digits: 16 patches, 2 heads, no weights to download."""
    return "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=2,num_classes=10"


@pytest.fixture(scope="session")
def tiny_weights(tiny_vit: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of `tiny_vit`, large enough that its maps are far from uniform."""
    import torch
    from safetensors.torch import save_file

    from atcache.teachers.load import create_student
    from atcache.teachers.names import parse_model_name

    torch.manual_seed(0)
    model = create_student(parse_model_name(tiny_vit), num_classes=10)
    weights = {name: tensor * 8 if "qkv.weight" in name else tensor for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="session")
def tiny_cache(digits_tars: list[Path], tiny_vit: str, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function: fields of `BuildConfig` -> a cache of the digits by the tiny teacher, the same for equal fields."""
    from atcache.pipelines.build.config import BuildConfig
    from atcache.pipelines.build.run import build

    built: dict[tuple[tuple[str, object], ...], Path] = {}

    def tiny_cache(**fields) -> Path:
        key = tuple(sorted(fields.items()))
        if key not in built:
            built[key] = tmp_path_factory.mktemp("caches") / "digits.zarr"
            common = {"teacher": tiny_vit, "weights": tiny_weights, "data": str(digits_tars[0].parent)}
            settings = {"codec": "exact", "workers": 0, "device": "cpu", "precision": "fp32", "samples_per_shard": 20}
            build(BuildConfig(**{**common, **settings, **fields, "out": built[key]}))
        return built[key]

    return tiny_cache


@pytest.fixture
def digits_build(digits_tars: list[Path], tiny_vit: str, tiny_weights: Path, tmp_path: Path):
    """The `BuildConfig` of a build of 48 digits in 6 tasks, with batches that do not divide them."""
    from atcache.pipelines.build.config import BuildConfig

    return BuildConfig(
        teacher=tiny_vit,
        weights=tiny_weights,
        data=str(digits_tars[0].parent),
        out=tmp_path / "cache.zarr",
        samples_per_shard=8,
        batch_size=3,
        workers=0,
        device="cpu",
        precision="fp32",
    )
