"""Bad images are skipped and recorded, or stop the build with one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builds import differences, picture, write_tar

import atcache
from atcache.errors import BadImageError, CacheMissError, ConfigError, SourceError
from atcache.pipelines.build.run import build
from atcache.store.layout import Status
from atcache.store.manifest import list_commits


def bad_tar(folder: Path) -> Path:
    samples = [{"jpg": picture(seed), "cls": b"3"} for seed in range(12)]
    samples[4]["jpg"] = b"\xff\xd8\xff\xe0 this is no JPEG"
    del samples[7]["cls"]
    del samples[9]["jpg"]
    samples[10]["__key__"] = "sample-000"
    return write_tar(folder / "bad.tar", samples)


def test_skipped_images_are_recorded_counted_and_left_out(config, tmp_path):
    config = replace(config, data=str(bad_tar(tmp_path)), on_bad_image="skip", pixels="store", samples_per_shard=5)
    summary = build(config)
    assert summary.complete is not None
    assert (summary.complete["num_stored"], summary.complete["num_bad"]) == (8, 4)
    cache = atcache.open(config.out)
    expected = {4: Status.UNDECODABLE, 7: Status.NO_LABEL, 9: Status.NO_IMAGE, 10: Status.DUPLICATE_KEY}
    assert {s: status for s, status in enumerate(cache.reader.status_VS[0]) if status != Status.STORED} == expected
    maps = cache.maps(layer=0)[0].compute()
    assert [int(s) for s in np.flatnonzero(np.isnan(maps).all(axis=(1, 2, 3)))] == sorted(expected)
    for sample, reason in ((4, "undecodable"), (7, "no label"), (9, "no image"), (10, "duplicate key")):
        with pytest.raises(CacheMissError, match=f"of sample {sample} .* is not stored in .*: {reason}"):
            cache.view(sample)
    description = cache.describe()
    assert (description["num_bad"], description["is_complete"]) == (4, True)


def test_skipping_changes_nothing_for_good_images(config, tmp_path):
    build(config)
    build(replace(config, on_bad_image="skip", out=tmp_path / "skip.zarr"))
    assert differences(tmp_path / "skip.zarr", config.out) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_image_stops_the_build_with_one_sentence(config, tmp_path, workers):
    samples = [{"jpg": picture(seed), "cls": b"3"} for seed in range(12)]
    samples[8]["jpg"] = b"\xff\xd8\xff\xe0 this is no JPEG"
    tar = write_tar(tmp_path / "bad.tar", samples)
    config = replace(config, data=str(tar), workers=workers, calibration_samples=1, samples_per_shard=4)
    with pytest.raises(BadImageError, match=r"^\S*bad.tar: key 'sample-008': the image cannot be decoded: [^\n]*$"):
        build(config)
    assert "v0000-b000000" in list_commits(config.out)
    build(replace(config, on_bad_image="skip"))
    build(replace(config, on_bad_image="skip", out=tmp_path / "skipped.zarr"))
    assert differences(config.out, tmp_path / "skipped.zarr") == []


def test_a_bad_sample_the_headers_show_stops_the_build_before_the_teacher_is_loaded(config, tmp_path):
    samples = [{"jpg": picture(0), "cls": b"1"}, {"jpg": picture(1)}]
    with pytest.raises(SourceError, match=r"nolabel.tar: key 'sample-001'"):
        build(replace(config, data=str(write_tar(tmp_path / "nolabel.tar", samples)), teacher="no_such_teacher"))
    assert not config.out.exists()


def test_a_source_without_one_good_image_is_refused(config, tmp_path):
    tar = write_tar(tmp_path / "bad.tar", [{"jpg": b"nothing", "cls": b"1"}])
    with pytest.raises(ConfigError, match="none of 1 calibration images can be read"):
        build(replace(config, data=str(tar), on_bad_image="skip"))
    assert not config.out.exists()
