"""Packing: image bytes unchanged, keys every reader takes, equal bytes for equal input, nothing overwritten."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from made_store import build
from PIL import Image

from atcache.cli.pack import pack as pack_command
from atcache.errors import ConfigError, DiskFullError, SourceError
from atcache.files.writers import only_writer
from atcache.images.source import Source, index_source
from atcache.images.tars import expand_tars, pack_folder
from atcache.pipelines.pack.config import PackConfig
from atcache.pipelines.pack.folders import plan_folder
from atcache.pipelines.pack.run import pack


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes, one of them empty, five images each in the others, and things that are no images."""
    root = tmp_path / "train"
    for number, name in enumerate(("ant", "bee.hive", "cat")):
        (root / name).mkdir(parents=True)
        for image in range(5 if name != "ant" else 0):
            path = root / name / f"picture.{image}.{'JPEG' if image % 2 else 'png'}"
            pixels = np.random.default_rng(10 * number + image).integers(0, 256, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    (root / "cat" / "notes.txt").write_text("x")
    (root / "cat" / ".hidden.png").write_bytes(b"x")
    (root / "cat" / "empty.png").write_bytes(b"")
    (root / "README.md").write_text("x")
    return root


def test_packed_samples_are_the_files_with_their_classes(folder, tmp_path):
    summary = pack(PackConfig(data=folder, out=tmp_path / "out", samples_per_tar=4))
    assert [Path(path).name for path in summary.tars] == [f"train-{number:06d}.tar" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classes.txt",
        *(f"train-{number:06d}.tar" for number in range(3)),
    ]
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee.hive\ncat\n"
    assert (summary.num_samples, summary.num_classes) == (10, 3)
    assert summary.nbytes == sum(Path(path).stat().st_size for path in summary.tars)
    assert summary.ignored == {
        "empty files": 1,
        "files outside the class folders": 1,
        "files that are no images": 1,
        "hidden files": 1,
    }
    index = index_source(tmp_path / "out")
    source = Source(index)
    found = {
        (index.keys_S[row].decode(), int(index.label_S[row])): source.read_bytes(row)
        for row in range(index.num_samples)
    }
    expected = {}
    for label, name in ((1, "bee.hive"), (2, "cat")):
        for path in folder.glob(f"{name}/picture.*"):
            number = path.name.split(".")[1]
            expected[f"{name.replace('.', '_')}/picture_{number}", label] = path.read_bytes()
    assert found == expected


def test_members_keep_their_extension_and_carry_no_time_or_owner(folder, tmp_path):
    summary = pack(PackConfig(data=folder, out=tmp_path / "out"))
    with tarfile.open(summary.tars[0]) as tar:
        members = tar.getmembers()
    assert {member.name.split(".", 1)[1] for member in members} == {"cls", "jpeg", "png"}
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members} == {
        (0, 0, 0, "", "")
    }


def test_equal_folders_give_equal_bytes_and_seeds_give_orders(folder, tmp_path):
    def packed(name, **fields):
        summary = pack(PackConfig(data=folder, out=tmp_path / name, samples_per_tar=6, **fields))
        return [Path(path).read_bytes() for path in summary.tars]

    first = packed("a")
    for path in folder.rglob("*.png"):
        path.touch()
    assert packed("b") == first
    assert packed("c", shuffle_seed=1) != first
    in_order = index_source(str(tmp_path / "d" / "*.tar")) if packed("d", in_order=True) else None
    assert in_order is not None
    assert in_order.keys_S.tolist() == sorted(in_order.keys_S.tolist())
    assert in_order.label_S.tolist() == [1] * 5 + [2] * 5


def test_keys_stay_unique_without_dots_and_short(tmp_path):
    folder = tmp_path / "in" / ("c" * 150)
    folder.mkdir(parents=True)
    short = tmp_path / "in" / "s"
    short.mkdir()
    for name in ("a.b.png", "a_b.png", "a b.png", "a_b-2.png", "ä.png"):
        (short / name).write_bytes(b"x")
    for name in ("x" * 200 + ".png", "x" * 200 + "y.png"):
        (folder / name).write_bytes(b"x")
    plan = plan_folder(PackConfig(data=tmp_path / "in", out=tmp_path / "out", name="t"))
    keys = [sample.key for tar in plan.tars for sample in tar]
    assert len(set(keys)) == 7
    assert not any("." in key or " " in key for key in keys)
    assert max(len(key.encode()) for key in keys) <= 90
    assert {"s/a_b", "s/a_b-2", "s/ä"} <= set(keys)
    pack(PackConfig(data=tmp_path / "in", out=tmp_path / "out", name="t"))
    assert index_source(tmp_path / "out").num_samples == 7


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "x.png").write_bytes(b"secret")
    (folder / "cat" / "leak.png").symlink_to(outside / "x.png")
    (folder / "cat" / "broken.png").symlink_to(folder / "nowhere.png")
    (folder / "cat" / "more").symlink_to(outside)
    (folder / "dog").symlink_to(outside)
    (folder / "cat" / "again.png").symlink_to(next((folder / "cat").glob("picture.0.*")))
    plan = plan_folder(PackConfig(data=folder, out=tmp_path / "out"))
    assert plan.classes == ("ant", "bee.hive", "cat")
    assert plan.num_samples == 11
    assert plan.ignored["links that lead out of the folder"] == 1
    assert plan.ignored["broken links and special files"] == 1
    assert plan.ignored["linked or hidden folders"] == 2
    (tmp_path / "links").mkdir()
    (tmp_path / "links/cat").symlink_to(folder / "cat")
    (tmp_path / "links/.git").mkdir()
    sentence = r"no class folders that can be packed; left out: 2 linked or hidden folders\. .* Give real folders"
    with pytest.raises(SourceError, match=sentence):
        plan_folder(PackConfig(data=tmp_path / "links", out=tmp_path / "out"))


def test_nothing_is_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    pack(PackConfig(data=folder, out=out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SourceError, match=r"already holds 1 tars called train-NUMBER\.tar, such as train-000000\.tar"):
        pack(PackConfig(data=folder, out=out))
    pack(PackConfig(data=folder, out=out, name="val"))
    pack(PackConfig(data=folder, out=out, name="train-extra"))
    (out / "train-000000.tar").rename(tmp_path / "moved.tar")
    pack(PackConfig(data=folder, out=out))  # train-extra-000000.tar has another name
    (folder / "dog").mkdir()
    with pytest.raises(SourceError, match=r"classes\.txt names other classes"):
        pack(PackConfig(data=folder, out=out, name="test"))
    assert {name: (out / name).read_bytes() for name in before} == before


def test_a_disk_that_fills_up_leaves_no_tars(folder, tmp_path):
    # A limit on the size of files stands in for a full disk: writing fails in the same place.
    code = """if True:
        import resource, sys
        from pathlib import Path
        from atcache.errors import DiskFullError
        from atcache.pipelines.pack.config import PackConfig
        from atcache.pipelines.pack.run import pack
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        try:
            pack(PackConfig(data=Path(sys.argv[1]), out=Path(sys.argv[2])))
        except DiskFullError as error:
            print(error)
    """
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"out cannot be written: File too large\. .* Free some space", done.stdout)
    assert list((tmp_path / "out").iterdir()) == []


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def pack_and_die(config, at) -> int | None:
    """Pack in a process that kills itself just before its change number `at` of a folder; its exit code."""

    def run():
        changes = itertools.count()

        def kill(event, arguments):
            # Files are opened to be written too, which is a change of their folder.
            changes_folder = event in CHANGES or (event == "open" and str(config.out) in str(arguments[0]))
            if changes_folder and next(changes) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        pack(config)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


def content_of(out) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in out.iterdir()}


@pytest.mark.parametrize("classes_are_there", [False, True])
def test_a_pack_killed_at_any_moment_is_done_again_by_the_same_command(folder, tmp_path, classes_are_there):
    whole = PackConfig(data=folder, out=tmp_path / "whole", samples_per_tar=4)
    pack(whole)
    of_others = {"notes.txt": b"x", "train.tar": b"x", "val-000000.tar": b"x"}
    if classes_are_there:
        of_others["classes.txt"] = (whole.out / "classes.txt").read_bytes()
    num_refused = 0
    for at in itertools.count():
        config = replace(whole, out=tmp_path / f"out-{at}")
        config.out.mkdir()
        for name, content in of_others.items():
            (config.out / name).write_bytes(content)
        killed = pack_and_die(config, at)
        expected = {**of_others, **content_of(whole.out)}
        found = content_of(config.out)
        found.pop(".train.atcache-pack.lock", None)  # empty; nobody holds it any more
        assert {name: found[name] for name in of_others} == of_others
        tars = [name for name in found if name.startswith("train-")]
        if killed == 0:
            assert found == expected
            break
        assert killed == -signal.SIGKILL
        try:
            for data in (config.out, config.out / "train-*.tar", config.out / "train-{000000..000000}.tar"):
                expand_tars(data)
            is_finished = bool(tars)
        except SourceError as error:
            is_finished = False
            num_refused += "Run the same `atcache pack` command again" in str(error)
        if is_finished:  # what may be used is complete, and as usual not overwritten
            assert {name: content for name, content in found.items() if content is not None} == expected
            with pytest.raises(SourceError, match="already holds 3 tars"):
                pack(config)
        else:
            pack(config)
        assert content_of(config.out) == expected
    assert at > 10
    assert num_refused >= 3


def test_a_killed_pack_takes_back_only_its_own_tars(folder, tmp_path):
    config = PackConfig(data=folder, out=tmp_path / "out", samples_per_tar=4)
    at = 0
    while len(list(config.out.glob("train-*.tar"))) != 2:
        shutil.rmtree(config.out, ignore_errors=True)
        assert pack_and_die(config, at) == -signal.SIGKILL
        at += 1
    (config.out / "train-000001.tar").write_bytes(b"somebody else's by now")
    with pytest.raises(SourceError, match=r"already holds 1 tars .* such as train-000001\.tar"):
        pack(config)
    assert (config.out / "train-000001.tar").read_bytes() == b"somebody else's by now"


def test_two_packs_of_one_name_do_not_meet(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("atcache.files.writers._SECONDS_TO_WAIT", 0.1)
    config = PackConfig(data=folder, out=tmp_path / "out")
    (tmp_path / "out").mkdir()
    lock = f"{pack_folder(config.out, 'train').name}.lock"
    with only_writer(config.out, name=lock):
        with pytest.raises(ConfigError, match=r"another process is writing to .*out\. Wait"):
            pack(config)
        pack(replace(config, name="val"))
    pack(config)
    assert {path.suffix for path in config.out.iterdir()} == {".tar", ".txt"}


def test_what_cannot_be_packed_is_said(folder, tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.png").write_bytes(b"x")
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "x.txt").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "x.tar").write_bytes(b"x")
    build(tmp_path / "c.zarr")
    for data, out, message in (
        ("nowhere", "out", "nowhere is not a folder"),
        ("flat", "out", "holds no folders. Expected one folder per class"),
        ("texts", "out", r"hold no images \(\.jpg.*left out: 1 files that are no images"),
        ("file", "out", "file is not a folder. Give an image folder"),
        ("x.tar", "out", "x.tar is not a folder, but a tar, which need not be packed"),
        ("c.zarr", "out", "c.zarr is a cache, which cannot be packed. Give a folder of images"),
        ("train", "file", "is a file, expected a folder"),
        ("train", "train/tars", "lies inside the image folder"),
    ):
        with pytest.raises(SourceError, match=message):
            pack(PackConfig(data=tmp_path / data, out=tmp_path / out))
    with pytest.raises(ConfigError, match=r"cannot be called 'a/b'"):
        PackConfig(data=folder, out=tmp_path, name="a/b")
    with pytest.raises(ConfigError, match="data=hf:foo: expected hf:ORG/NAME"):
        PackConfig(data="hf:foo", out=tmp_path)
    with pytest.raises(ConfigError, match=r"labels=required: expected a CSV file, or none\. Leave --labels out"):
        PackConfig(data=folder, out=tmp_path, labels="required")
    with pytest.raises(ConfigError, match="in_order and shuffle_seed=3: images in order are not shuffled"):
        PackConfig(data=folder, out=tmp_path, in_order=True, shuffle_seed=3)
    refused = CliRunner().invoke(pack_command, ["--data", "s3://b/x", "--out", str(tmp_path / "out")])
    assert "'s3://b/x' is a URL, and this option reads no URLs. Copy what is there" in refused.output
    with pytest.raises(ConfigError, match="samples_per_tar=0: expected at least 1"):
        PackConfig(data=folder, out=tmp_path, samples_per_tar=0)


@pytest.mark.parametrize(
    ("data", "name"), [("my photos", "my-photos"), ("v1.0", "v1-0"), ("hf:org/imagenet-1k.v2", "imagenet-1k-v2")]
)
def test_a_folder_of_any_name_gives_its_tars_a_name(tmp_path, data, name):
    where = data if data.startswith("hf:") else tmp_path / data
    assert PackConfig(data=where, out=tmp_path).tar_name == name


def test_a_pack_that_cannot_fit_is_refused_first(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    with (tmp_path / "in" / "a" / "x.png").open("wb") as file:
        file.truncate(1 << 42)  # sparse: takes no space
    with pytest.raises(DiskFullError, match=r"bytes free, but the tars need 43980"):
        pack(PackConfig(data=tmp_path / "in", out=tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_prints_one_json_line(folder, tmp_path):
    arguments = ["--data", str(folder), "--out", str(tmp_path / "out"), "--samples-per-tar", "5", "--name", "x"]
    result = CliRunner().invoke(pack_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["num_samples"] == 10
    assert [Path(path).name for path in summary["tars"]] == ["x-000000.tar", "x-000001.tar"]
    assert isinstance(pack_command, click.Command)
