"""Other Zarr v3 libraries read a cache as our reader does: zarr-python, tensorstore, zarrs (Rust)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from atcache.images.source import SampleIndex
from atcache.store.layout import BLOSC, COMPRESSORS, ZSTD, Status, StoreLayout
from atcache.store.reader import CacheReader
from atcache.store.writer import TaskWriter, create_cache, encode_pixels, encode_view, finish_cache

BAD_SAMPLE = 5
NUM_SAMPLES = 11


TRANSPOSED = [(name, "int32") for name, how in COMPRESSORS.items() if how.is_transposed]


@pytest.fixture(
    scope="module", params=[(BLOSC, "int8"), (BLOSC, "int16"), (ZSTD, "uint8"), (ZSTD, "int32"), *TRANSPOSED]
)
def cache(request, tmp_path_factory):
    """A complete cache of random codes; its last shards stick out of the arrays, and one sample is bad."""
    compressor, codes_dtype = request.param
    layout = StoreLayout(
        num_views=2,
        num_samples=NUM_SAMPLES,
        num_layers=6,
        num_tokens=7,
        num_components=40,
        codes_dtype=codes_dtype,
        samples_per_shard=4,
        layers_per_chunk=3,
        parameter_names=("top", "left", "flip"),
        pixels=(16, 12),
        compressor=compressor,
    )
    rows = np.arange(NUM_SAMPLES)
    index = SampleIndex(
        tars=(Path("/data/a.tar"),),
        tar_nbytes=(10_240,),
        keys_S=np.array([f"key-{row}".encode() for row in rows]),
        tar_S=np.zeros(NUM_SAMPLES, np.int32),
        offset_S=rows * 512,
        nbytes_S=rows + 100,
        label_S=rows % 3,
        problem_S=np.where(rows == BAD_SAMPLE, 6, 0).astype(np.uint8),
    )
    path = tmp_path_factory.mktemp("interop") / "cache.zarr"
    steps = np.linspace(0, 1, 18, dtype=np.float32).reshape(6, 3)
    create_cache(path, layout, {"teacher": "tiny"}, index, {"steps": steps}, np.ones((6, 2, 7, 7), np.float32))
    rng = np.random.default_rng(0)
    for task in layout.tasks():
        writer = TaskWriter(path, layout, task)
        for sample in range(task.start, task.stop):
            if sample == BAD_SAMPLE:
                writer.add(sample, status=Status.UNDECODABLE)
                continue
            codes_LTC = rng.integers(0, 40, (6, 7, 40)).astype(codes_dtype)
            pixels_HWC = rng.integers(0, 256, (16, 12, 3)).astype(np.uint8)
            writer.add(
                sample,
                status=Status.STORED,
                parameters_P=rng.normal(size=3).astype(np.float32),
                pixel_hash=int(rng.integers(0, 2**63)) * 2 + 1,
                # Sample 0 is all zeros, the fill value: its chunks must be there all the same.
                chunks=encode_view(layout, codes_LTC * (sample > 0)),
                pixels_chunk=encode_pixels(layout, pixels_HWC),
            )
        writer.commit({})
    finish_cache(path)
    return path


def read_all(path):
    """Every array tasks write, by name, as our own reader gives it; fill values where nothing is stored."""
    reader = CacheReader(path)
    arrays = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in reader.layout.arrays()}
    for view in range(2):
        for sample in range(NUM_SAMPLES):
            arrays["views/parameters"][view, sample] = reader.parameters(view, sample)
            arrays["views/pixel_hash"][view, sample] = reader.pixel_hash(view, sample)
            arrays["views/status"][view, sample] = reader.status(view, sample)
            if sample != BAD_SAMPLE:
                arrays["attention/codes"][view, sample] = reader.read_codes(view, sample)
                arrays["pixels/rgb"][view, sample] = reader.read_pixels(view, sample)
    return arrays


def run_reader(code, path, *, python=sys.executable):
    """Read a cache in another process, which writes NAME.npy files: the libraries' threads and forks do not mix."""
    out = path.parent / "read"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", code, str(path), str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return {file.stem.replace("-", "/"): np.load(file) for file in out.glob("*.npy")}


def assert_same(read, path):
    expected = read_all(path)
    assert set(read) == set(expected)
    for name, values in expected.items():
        assert read[name].dtype == values.dtype, name
        assert np.array_equal(read[name], values), name


ZARR = """
import sys, numpy as np, zarr
from pathlib import Path
group = zarr.open_group(sys.argv[1], mode="r")
assert group.metadata.consolidated_metadata is not None
for name in ["attention/codes", "pixels/rgb", "views/parameters", "views/pixel_hash", "views/status"]:
    np.save(Path(sys.argv[2]) / (name.replace("/", "-") + ".npy"), group[name][...])
"""

ZARRS = """
import warnings
warnings.simplefilter("error")   # it warns when it falls back to Python
import zarr
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True})
""" + ZARR.replace("group = zarr", 'assert "zarrs" in zarr.config.get("codec_pipeline.path")\ngroup = zarr')

TENSORSTORE = """
import sys, numpy as np, tensorstore
from pathlib import Path
for name in ["attention/codes", "pixels/rgb", "views/parameters", "views/pixel_hash", "views/status"]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": sys.argv[1] + "/" + name + "/"}}
    array = tensorstore.open(spec, read=True).result()
    assert array.domain.labels[:2] == ("view", "sample")
    np.save(Path(sys.argv[2]) / (name.replace("/", "-") + ".npy"), array.read().result())
"""


@pytest.mark.parametrize("code", [ZARR, ZARRS, TENSORSTORE], ids=["zarr", "zarrs", "tensorstore"])
def test_another_library_reads_what_our_reader_reads(cache, code):
    assert_same(run_reader(code, cache), cache)


def test_the_newest_zarr_reads_what_our_reader_reads(cache):
    """zarr 3.2 and later need Python 3.12: `.ci/run` sets ATCACHE_OTHER_PYTHON to one that has it, if it finds one."""
    python = os.environ.get("ATCACHE_OTHER_PYTHON")
    if python is None:
        pytest.skip("ATCACHE_OTHER_PYTHON is not set")
    assert_same(run_reader(ZARR, cache, python=python), cache)


def test_zarr_names_the_axes_and_reads_what_was_written_at_creation(cache):
    group, reader = zarr.open_group(cache, mode="r"), CacheReader(cache)
    names = {spec.name: spec.dimension_names for spec in reader.layout.arrays()}
    names |= {"samples/label": ("sample",), "samples/key": ("sample", "key_byte")}
    names |= {"attention/bias": ("layer", "head", "query", "key")}
    for name, axes in names.items():
        assert group[name].metadata.dimension_names == axes, name
    assert np.array_equal(group["samples/label"][...], reader.labels_S)
    assert group["samples/key"][...].tobytes() == reader.samples.keys_S.tobytes()
    assert np.array_equal(group["attention/state/steps"][...], reader.state["steps"])
    assert np.array_equal(group["attention/bias"][...], reader.bias_LHQK)
    assert group.attrs["atcache"]["complete"] == reader.attributes["complete"]


def test_consolidated_metadata_says_what_the_files_say(cache):
    consolidated = dict(zarr.open_group(cache, mode="r", use_consolidated=True).members(max_depth=None))
    files = {file.parent.relative_to(cache).as_posix(): file for file in cache.glob("*/**/zarr.json")}
    assert set(consolidated) == set(files)
    arrays = [name for name, node in consolidated.items() if isinstance(node, zarr.Array)]
    assert len(arrays) == 5 + 6 + 2
    for name in arrays:
        assert consolidated[name].metadata == zarr.open_array(cache / name, mode="r").metadata, name


def test_zarr_notices_a_flipped_byte_in_a_chunk(cache, tmp_path):
    copy = Path(shutil.copytree(cache, tmp_path / "copy.zarr"))
    shard = copy / "attention/codes/c/0/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[30] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(copy, mode="r")["attention/codes"][0, 0]


def test_xarray_opens_a_group_with_named_axes(cache):
    import xarray as xr

    views = xr.open_zarr(cache, group="views", consolidated=False, chunks=None)
    assert views["status"].dims == ("view", "sample")
    assert np.array_equal(views["parameters"].to_numpy(), read_all(cache)["views/parameters"])
