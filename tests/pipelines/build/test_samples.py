"""Builds of images without labels, with labels elsewhere, and of a chosen part."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from builds import MIXED, picture, run_cli, write_tar

import atcache
from atcache.errors import CacheMismatchError, ConfigError, SourceError
from atcache.images.source import index_source
from atcache.pipelines.build.run import build
from atcache.pipelines.build.samples import index_samples
from atcache.pipelines.plan.config import PlanConfig
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.verify.run import verify
from atcache.store.reader import CacheReader


def captioned_tar(folder):
    """Images as img2dataset writes them: captions and JSON, no `.cls`."""
    samples = [
        {"jpg": picture(seed), "txt": "a digit", "json": json.dumps({"class_id": seed % 3}).encode()}
        for seed in range(12)
    ]
    return write_tar(folder / "00000.tar", samples)


def test_images_without_labels_are_built_looked_at_and_verified(config, tmp_path):
    config = replace(config, data=str(captioned_tar(tmp_path)))
    refused = run_cli(config)
    assert refused.exit_code == 1
    assert "none of its 12 samples has a label (.cls)" in refused.output
    assert "--labels none" in refused.output
    assert run_cli(config, labels="none").exit_code == 0
    cache = atcache.open(config.out)
    assert cache.samples.label.values.tolist() == 12 * [-1]
    assert cache.samples.class_name.values.tolist() == 12 * [""]
    assert (cache.view(3).label, cache.view(3).class_name) == (-1, "")
    assert verify(VerifyConfig(cache=config.out)).problems == ()
    with pytest.raises(SourceError, match="none of its 12 samples has a label"):
        build(config)  # continued without the option
    build(replace(config, labels="none"))


def test_labels_from_json_are_those_of_the_cache(config, tmp_path):
    config = replace(config, data=str(captioned_tar(tmp_path)), label_key="class_id")
    build(config)
    assert CacheReader(config.out).labels_S.tolist() == [seed % 3 for seed in range(12)]


def test_names_of_classes_are_in_the_cache(config, digits_tars, tmp_path):
    tar = shutil.copy(digits_tars[0], tmp_path / "digits.tar")
    (tmp_path / "classes.txt").write_text("".join(f"digit {label}\n" for label in range(10)))
    config = replace(config, data=str(tar))
    build(config)
    cache = atcache.open(config.out)
    expected = [f"digit {label}" for label in cache.reader.labels_S]
    assert cache.samples.class_name.values.tolist() == expected
    assert cache.view(5).class_name == expected[5]
    assert verify(VerifyConfig(cache=config.out)).problems == ()
    (tmp_path / "classes.txt").unlink()
    build(config)  # the names are in the cache
    (tmp_path / "classes.txt").write_text("zero\n" + "digit\n" * 9)
    with pytest.raises(CacheMismatchError, match=r"class 0 is .*'(zero|digit 0)' in .* and '(zero|digit 0)' in "):
        build(config)


def test_a_part_is_spread_over_classes_and_the_same_for_every_seed(config, digits_tars):
    part = replace(config, data=str(digits_tars[0].parent), max_samples=10)
    build(part)
    samples = CacheReader(part.out).samples
    assert sorted(samples.label_S.tolist()) == list(range(10))
    more = index_samples(part.data, replace(part, max_samples=20, seed=5), on_bad="raise")
    whole = index_source(part.data)
    keys, more_keys, all_keys = (
        [index.sample_key(row) for row in range(index.num_samples)] for index in (samples, more, whole)
    )
    assert set(keys) < set(more_keys) < set(all_keys)
    assert keys == sorted(keys)
    cache = atcache.open(part.out)
    view = cache.view(4)
    whole_row = all_keys.index(view.sample_key)
    assert view.label == whole.label_S[whole_row]
    assert verify(VerifyConfig(cache=part.out)).problems == ()


def test_a_part_of_more_samples_than_there_are_is_all_of_them(config, digits_tars):
    choice = replace(config, max_samples=1000)
    assert index_samples(str(digits_tars[0]), choice, on_bad="raise").num_samples == 16


def test_a_build_and_a_plan_take_the_keys_of_a_file(config, digits_tars, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("digit-00017\ndigits-0000.tar/digit-00003\n")
    config = replace(config, data=str(digits_tars[0].parent), keys=keys)
    build(config)
    samples = CacheReader(config.out).samples
    assert [samples.sample_key(row) for row in range(2)] == [
        "digits-0000.tar/digit-00003",
        "digits-0001.tar/digit-00017",
    ]
    plan = PlanConfig(teacher="any", data=config.data, keys=keys)
    assert index_samples(config.data, plan, on_bad="skip").num_samples == 2
    keys.write_text("nothing\n")
    with pytest.raises(ConfigError, match="the data lack 1 of its 1 keys"):
        build(config)


def test_a_key_for_labels_that_are_not_read_is_refused(config):
    with pytest.raises(ConfigError, match="label_key=a: with labels none, no label is read"):
        replace(config, labels="none", label_key="a")
    with pytest.raises(ConfigError, match=r"label_key='a\.\.b'"):
        replace(config, label_key="a..b")
    with pytest.raises(ConfigError, match="labels='perhaps'"):
        index_source("x.tar", labels="perhaps")  # type: ignore[arg-type]


def test_a_part_can_be_taken_of_images_without_labels(config, tmp_path):
    choice = replace(config, labels="none", max_samples=5)
    index = index_samples(str(captioned_tar(tmp_path)), choice, on_bad="raise")
    assert index.label_S.tolist() == 5 * [-1]


def test_a_label_that_training_would_refuse_is_noted_before_the_build(config, tmp_path, caplog):
    samples = [{"jpg": picture(seed), "cls": b"99999" if seed == 2 else b"1"} for seed in range(4)]
    tar = str(write_tar(tmp_path / "typing.tar", samples))
    index_samples(tar, config, on_bad="raise")
    assert "NOTE: typing.tar/sample-002 has the label 99999, and the next lower label is 1." in caplog.text
    caplog.clear()
    index_samples(tar, replace(config, labels="none"), on_bad="raise")
    assert caplog.text == ""


def test_keys_may_have_spaces_and_other_programs_may_add_some(config, tmp_path):
    samples = [{"__key__": key, "jpg": picture(seed), "cls": 0} for seed, key in enumerate(("a ", " b", "a", "c"))]
    tar, keys = write_tar(tmp_path / "x.tar", samples), tmp_path / "keys.txt"
    config = replace(config, data=str(tar), keys=keys)
    for lines, chosen in (("a \n b\r\n", ["x.tar/a ", "x.tar/ b"]), ("x.tar/a\n c \n", ["x.tar/a", "x.tar/c"])):
        keys.write_text(lines, newline="")
        index = index_samples(config.data, config, on_bad="raise")
        assert [index.sample_key(row) for row in range(index.num_samples)] == chosen


def test_a_folder_whose_name_no_cache_can_record_is_refused_at_once(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    tar = write_tar(folder / "x.tar", [{"jpg": picture(0), "cls": 0}])
    with pytest.raises(SourceError, match=r"caf.udce9.x\.tar': the name is no UTF-8 text, .*Rename it"):
        index_source(str(tar))


def test_views_are_not_mixed_with_samples_that_have_no_label(config, tmp_path):
    samples = [{"jpg": picture(seed), **({"cls": seed} if seed % 2 else {})} for seed in range(8)]
    config = replace(config, data=str(write_tar(tmp_path / "x.tar", samples)), samples_per_shard=8, **MIXED)
    with pytest.raises(ConfigError, match=r"4 of 8 samples have no label, .*half a label. Leave --mixup"):
        build(replace(config, labels="optional"))
    assert not config.out.exists()
    build(replace(config, labels="none"))
