"""Caches that earlier versions wrote still open, decode to the same maps, and replay to the same images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import atcache
from atcache.errors import CacheMismatchError, CacheMissError
from atcache.store.layout import FORMAT, Status
from atcache.store.manifest import check_commit, read_commits
from atcache.views.apply import library_versions, render_alone
from atcache.views.mixing import NOT_MIXED, mix_pixels
from atcache.views.policy import PARAMETER_NAMES
from atcache.views.rendering import stored_mix

GOLDEN = Path(__file__).parent.parent / "golden"
CACHES = sorted(GOLDEN.glob("format-*/*.zarr"))
BAD_SAMPLE = 2
GOOD_SAMPLES = (0, 1, 3, 4, 5)
MAPS_OF_SAMPLES = (0, 5)
"""Whose maps are kept as they were decoded by the version that wrote them."""

every_cache = pytest.mark.parametrize("path", CACHES, ids=[f"{path.parent.name}-{path.stem}" for path in CACHES])


def open_golden(path: Path) -> atcache.Cache:
    return atcache.open(path, data=path.parent / "tars")


def expected(path: Path, what: str) -> np.ndarray:
    return np.load(path.with_name(f"{path.stem}.{what}.npy"))


def test_each_format_has_caches_of_every_kind():
    kinds = [
        "exact",
        "exact-part",
        "inputs",
        "int8-bias",
        "int8-pixels",
        "logmap",
        "mixed",
        "rows",
        "transform",
        "transform-rope",
        "values",
    ]
    for number in range(1, FORMAT + 1):
        assert sorted(path.stem for path in CACHES if path.parent.name == f"format-{number}") == kinds


@every_cache
def test_maps_are_what_they_were(path):
    """Only the sums in logits and softmax may round differently, which processors do.

    Logits reach 25 here. A few roundings of such a number to float32 (25 * 2**-24) change a map by 1e-5 of itself.
    """
    cache, attn_LVSHQK = open_golden(path), expected(path, "maps_LVSHQK")
    for position, layer in enumerate(cache.geometry.layers):
        decoded = cache.maps(layer=layer)[:, list(MAPS_OF_SAMPLES)].compute()
        assert np.allclose(decoded, attn_LVSHQK[position], atol=1e-10, rtol=1e-5)
        assert np.isnan(cache.maps(layer=layer)[:, BAD_SAMPLE].compute()).all()
    assert np.allclose(attn_LVSHQK.sum(axis=-1), 1, atol=1e-5)
    assert attn_LVSHQK.max() > 0.3, "maps near uniform would prove little"


def documented_reader() -> dict[str, Any]:
    """What the code in docs/format.md and the page of codec transform defines, by name."""
    docs = Path(__file__).parent.parent.parent / "docs"
    names: dict[str, Any] = {}
    for page in ("format.md", "format/transform.md"):
        (code,) = re.findall(r"```python\n(.*?)```", (docs / page).read_text(), re.DOTALL)
        assert "atcache import" not in code
        exec(code, names)
    return names


@every_cache
def test_the_documented_reader_gives_the_same_maps_without_atcache(path):
    names = documented_reader()
    for position, attn_VSHQK in enumerate(expected(path, "maps_LVSHQK")):
        for row, sample in enumerate(MAPS_OF_SAMPLES):
            assert np.allclose(names["read_maps"](path, 0, sample, position), attn_VSHQK[0, row], atol=1e-5, rtol=0)


def replayed(cache: atcache.Cache, sample: int, view: int) -> np.ndarray:
    """The image as it is replayed here, whatever its hash."""
    mix = stored_mix(cache.policy, cache.reader.parameters(view, sample))

    def alone(row: int) -> np.ndarray:
        parameters_P = cache.reader.parameters(view, row)
        if cache.policy.mixing is not None:
            parameters_P = parameters_P[: len(PARAMETER_NAMES)]
        return render_alone(cache.source.read_encoded(row), parameters_P, cache.policy)

    return alone(sample) if mix == NOT_MIXED else mix_pixels(alone(sample), alone(sample + mix.partner), mix)


@every_cache
def test_images_are_what_they_were(path):
    """Bit for bit; where a library has changed since, a replay may differ a little, but it must be noticed."""
    cache = open_golden(path)
    # A later version may record more libraries.
    recorded, here = cache.attributes["created_by"]["views"], library_versions()
    is_as_then = {name: here.get(name) for name in recorded} == recorded
    problems = []
    for view, images_SHWC in enumerate(expected(path, "images_VSHWC")):
        for sample, image in zip(GOOD_SAMPLES, images_SHWC, strict=True):
            differences = np.abs(replayed(cache, sample, view).astype(int) - image)
            assert differences.mean() < 4, "another decoder rounds otherwise, and no more"
            try:
                assert np.array_equal(cache.image(sample, view), image)
            except CacheMismatchError as error:
                if is_as_then:
                    raise
                assert differences.any()
                problems.append(str(error))
    if problems:
        pytest.skip(problems[0])


@every_cache
def test_every_byte_is_as_committed_and_every_sample_accounted_for(path):
    reader = open_golden(path).reader
    assert reader.is_complete
    commits = read_commits(path)
    assert sum(len(check_commit(path, commit, reader.layout, deep=True)) for commit in commits.values()) == 0
    statuses = [Status.UNDECODABLE if sample == BAD_SAMPLE else Status.STORED for sample in range(6)]
    assert reader.status_VS.tolist() == [statuses] * reader.layout.num_views
    assert reader.samples.sample_key(5) == "waves.tar/wave-5"
    assert reader.labels_S.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(CacheMissError, match=r"sample 2 \('waves.tar/wave-2'\) is not stored .*: undecodable"):
        reader.read_codes(0, BAD_SAMPLE)


@every_cache
def test_zarr_python_reads_the_same_codes(path):
    reader, group = open_golden(path).reader, zarr.open_group(path, mode="r")
    codes_VSLTC = np.asarray(group["attention/codes"])
    for view in range(reader.layout.num_views):
        for sample in GOOD_SAMPLES:
            assert np.array_equal(reader.read_codes(view, sample), codes_VSLTC[view, sample])


def test_values_are_what_they_were_and_the_documented_reader_gives_them():
    for path in GOLDEN.glob("format-*/values.zarr"):
        cache, reader = open_golden(path), documented_reader()
        for position, v_VSHTD in enumerate(expected(path, "v_LVSHTD")):
            decoded = cache.factors(layer=cache.geometry.layers[position]).v_VSHTD[:, list(MAPS_OF_SAMPLES)].compute()
            assert np.array_equal(decoded, v_VSHTD)
            for row, sample in enumerate(MAPS_OF_SAMPLES):
                assert np.array_equal(reader["read_values"](path, 0, sample, position), v_VSHTD[0, row])
        assert np.ptp(v_VSHTD) > 0.1


def test_inputs_are_what_they_were_and_the_documented_reader_gives_them():
    for path in GOLDEN.glob("format-*/inputs.zarr"):
        cache, reader = open_golden(path), documented_reader()
        for sample, inputs_LNTC in zip(MAPS_OF_SAMPLES, expected(path, "inputs_SLNTC"), strict=True):
            for position, layer in enumerate(cache.geometry.layers):
                decoded = [cache.inputs(layer, of=of)[0, sample].compute() for of in ("attention", "mlp")]
                assert np.array_equal(decoded, inputs_LNTC[position])
                assert np.array_equal(reader["read_inputs"](path, 0, sample, position), inputs_LNTC[position])
            assert np.ptp(inputs_LNTC) > 1


def test_a_bias_is_part_of_the_maps():
    for path in GOLDEN.glob("format-*/int8-bias.zarr"):
        bias_LHQK = open_golden(path).reader.bias_LHQK
        assert bias_LHQK.shape == (2, 2, 10, 10)
        assert np.ptp(bias_LHQK) > 1


def test_golden_caches_stay_small():
    assert sum(file.stat().st_size for file in GOLDEN.glob("format-*/**/*") if file.is_file()) < 600_000
