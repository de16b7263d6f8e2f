"""Images that are not those the teacher saw are found, in tars and in the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from verifying import TASK, build_config, look, messages, rewrite_task

import atcache
from atcache.cli.main import cli
from atcache.errors import ConfigError, SourceError
from atcache.pipelines.build.run import build
from atcache.store.manifest import list_commits
from atcache.store.reader import CacheReader


def write_over(tar: Path, cache: Path, *, sample: int, by: int) -> None:
    """Put another sample's image in a sample's place in its tar, whose size stays."""
    source = atcache.open(cache, data=tar.parent).source
    offset, room = int(source.index.offset_S[sample]), int(source.index.nbytes_S[sample])
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(source.read_bytes(by)[:room].ljust(room, b"\0"))


def test_a_replaced_image_is_found_and_blamed_on_the_tar(cache, digits_tars, tmp_path):
    tars = shutil.copytree(digits_tars[0].parent, tmp_path / "tars")
    nbytes_S = CacheReader(cache).samples.nbytes_S[16:32]
    sample, smaller = 16 + int(nbytes_S.argmax()), 16 + int(nbytes_S.argmin())
    write_over(tars / "digits-0001.tar", cache, sample=sample, by=smaller)
    summary = look(cache, data=str(tars), all=True, repair=True)
    assert summary.num_views == 96
    name = f"{tars}/digits-0001.tar: key 'digit-{sample:05d}'"
    assert [finding.task for finding in summary.problems] == [None, None]
    for view, message in enumerate(messages(summary)):
        assert message.startswith(f"view {view} of {name}: the replayed image differs from the one the teacher saw")
    assert len(list_commits(cache)) == 6, "the cache is not to blame, and is not to follow the tar"


def test_a_stored_image_that_the_teacher_did_not_see_is_found(stored):
    """Valid chunks, another image: all checksums hold."""
    reader = CacheReader(stored)
    rewrite_task(stored, pixels=lambda sample: reader.read_pixels(1, 21 if sample == 25 else sample))
    summary = look(stored, all=True)
    (finding,) = summary.problems
    assert finding.message.startswith(f"{stored}/pixels/rgb/c/1/1/0/0/0, sample 25: the stored image is not the one")
    assert finding.task == TASK


def test_moved_tars_are_named_once_each_and_found_by_data(tiny_vit, tiny_weights, digits_tars, tmp_path):
    shutil.copytree(digits_tars[0].parent, tmp_path / "here")
    config = build_config(tiny_vit, tiny_weights, tmp_path / "here", tmp_path / "cache.zarr")
    build(config)
    (tmp_path / "here").rename(tmp_path / "there")
    found = messages(look(config.out))
    assert len(found) == 3
    assert found[0] == (
        f"{tmp_path}/here/digits-0000.tar cannot be read: No such file or directory. If the tars were moved, give "
        "their place with --data."
    )
    shown = CliRunner().invoke(cli, ["verify", str(config.out)])
    assert shown.exit_code == 1
    assert "the images could not be compared; all else that was looked at is whole" in shown.output
    assert "build the cache again" not in shown.output
    assert messages(look(config.out, data=str(tmp_path / "there"))) == []
    with (tmp_path / "there/digits-0002.tar").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SourceError, match=r"digits-0002\.tar has \d+ bytes instead of \d+"):
        look(config.out, data=str(tmp_path / "there"))
    (tmp_path / "there").rename(tmp_path / "here")
    (message,) = messages(look(config.out, all=True))
    assert "digits-0002.tar has" in message


def test_data_is_refused_where_images_are_stored(stored, digits_tars):
    with pytest.raises(ConfigError, match="stores its images and reads no tars"):
        look(stored, data=str(digits_tars[0].parent))
