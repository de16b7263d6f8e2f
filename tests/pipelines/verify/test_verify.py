"""A whole cache has no problem; repairing redoes just what is damaged; the command says what to type."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from verifying import CODES, RECORD, TASK, build_config, contents, flip, look, messages, rewrite_task

import atcache
from atcache.cli.main import cli
from atcache.errors import CacheMissError, ConfigError
from atcache.files import writers
from atcache.files.durable import encode_json, partial_path
from atcache.files.writers import only_writer
from atcache.pipelines.build.run import build
from atcache.store.chunks import compress
from atcache.store.layout import StoreLayout
from atcache.store.manifest import list_commits, read_commits
from atcache.store.metadata import seal
from atcache.store.reader import CacheReader
from atcache.store.shard_check import check_shard
from atcache.store.shard_file import ShardFile

GOLDEN = sorted((Path(__file__).parent.parent.parent / "golden").glob("format-*/*.zarr"))


# Whole caches


@pytest.mark.parametrize("kind", ["cache", "stored"])
def test_a_whole_cache_has_no_problem_and_is_not_written_to(kind, request):
    path = request.getfixturevalue(kind)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.rglob("*")}
    summary = look(path, all=True, workers=3)
    assert (summary.problems, summary.notes, summary.repaired_tasks) == ((), (), ())
    assert (summary.num_tasks, summary.num_committed, summary.num_views) == (6, 6, 96)
    assert summary.is_complete
    assert summary.nbytes == sum(commit.nbytes for commit in read_commits(path).values()) > 0
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.rglob("*")} == before


@pytest.mark.parametrize("path", GOLDEN, ids=[f"{path.parent.name}-{path.stem}" for path in GOLDEN])
def test_caches_of_earlier_versions_are_whole(path):
    """Their images may replay otherwise with other libraries, which test_golden.py looks at."""
    pixels_are_stored = CacheReader(path).layout.pixels is not None
    summary = look(path, sample=0, data=None if pixels_are_stored else str(path.parent / "tars"))
    assert (messages(summary), summary.notes, summary.is_complete) == ([], (), True)


def test_the_sample_is_spread_over_the_cache(cache):
    assert look(cache, sample=0).num_views == 0
    assert look(cache, sample=7).num_views == 7
    assert look(cache, sample=1000).num_views == 96


def test_an_unfinished_cache_is_whole_as_far_as_it_is_built(cache):
    root = json.loads((cache / "zarr.json").read_bytes())
    del root["consolidated_metadata"]
    root["attributes"]["atcache"] = seal({**root["attributes"]["atcache"], "complete": None})
    (cache / "zarr.json").write_bytes(encode_json(root))
    (cache / RECORD).unlink()
    shutil.rmtree(cache / "attention/codes/c/1/1")
    summary = look(cache)
    assert (messages(summary), summary.is_complete, summary.num_committed) == ([], False, 5)
    assert summary.notes == (
        f"{cache} has shards of tasks without a commit record, the first is {TASK} (1 in all); the next build writes "
        "them again.",
        f"{cache}: 1 of 6 tasks are not built yet, the first is {TASK}.",
    )


def test_files_that_are_no_part_of_the_cache_are_noted(cache):
    strays = [cache / "notes.txt", cache / "attention/codes/c/2/0/0/0/0", cache / "samples/key/c/7/0"]
    strays.append(partial_path(cache / CODES))
    for stray in strays:
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_bytes(b"?")
    summary = look(cache)
    assert messages(summary) == []
    assert sorted(note.partition(" ")[0] for note in summary.notes) == sorted(map(str, strays))
    assert sum("left by a writer that was stopped" in note for note in summary.notes) == 1


# Repair


def test_repair_and_build_make_the_same_bytes_and_redo_only_what_was_damaged(
    cache, tiny_vit, tiny_weights, digits_tars
):
    before = contents(cache)
    flip(cache / CODES, 0.3)
    (cache / "views/pixel_hash/c/0/2").unlink()
    flip(cache / "commits/v0000-b000000.json", 0.5, bit=1)
    summary = look(cache, repair=True)
    assert summary.repaired_tasks == ("v0000-b000000", "v0000-b000002", TASK)
    assert list_commits(cache) == {"v0000-b000001", "v0001-b000000", "v0001-b000002"}
    assert not atcache.open(cache).reader.is_complete
    built = build(build_config(tiny_vit, tiny_weights, digits_tars[0].parent, cache))
    assert built.num_built_views == 20 + 8 + 20
    assert contents(cache) == before
    assert messages(look(cache)) == []


def test_repair_deletes_records_only_and_nothing_of_a_whole_cache(cache):
    before = contents(cache)
    assert look(cache, repair=True).repaired_tasks == ()
    assert contents(cache) == before
    flip(cache / CODES, 0.3)
    before = contents(cache)
    look(cache, repair=True)
    assert contents(cache) == {name: data for name, data in before.items() if name != RECORD}


@pytest.mark.parametrize(
    ("function", "place", "number"),
    [("scandir", "commits", errno.ESTALE), ("open", CODES, errno.EMFILE), ("open", RECORD, errno.EACCES)],
)
def test_repair_deletes_nothing_if_a_place_cannot_be_read_just_once(cache, monkeypatch, function, place, number):
    real, left = getattr(os, function), [1]

    def fail_once(path, *arguments, **options):
        if left and str(path).endswith(place):
            left.pop()
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    before = contents(cache)
    monkeypatch.setattr(os, function, fail_once)
    result = run_cli(cache, "--repair", "--sample", 0)
    assert result.exit_code == 1
    assert f"{place} cannot be read: {os.strerror(number)}. It may be whole" in result.stderr.splitlines()[-1]
    assert not left
    assert contents(cache) == before


def test_numbers_that_no_build_writes_are_found_and_repaired(cache):
    for name, text in ((RECORD, "1e999"), ("commits/v0000-b000000.json", "1" + 400 * "0")):
        record = json.loads((cache / name).read_bytes())
        record["quality"] = {"row_kl_nats": "HERE"}
        (cache / name).write_text(json.dumps(record).replace('"HERE"', text))
    summary = look(cache, repair=True)
    assert summary.repaired_tasks == ("v0000-b000000", TASK)
    assert all('"quality.row_kl_nats" is ' in message for message in messages(summary))


def test_a_record_of_no_task_is_deleted_and_does_no_harm_before(cache):
    """A growth that was given up leaves such records."""
    before = contents(cache)
    shutil.copy(cache / RECORD, cache / "commits/v0007-b000001.json")
    assert atcache.open(cache).reader.is_complete
    assert look(cache, repair=True).repaired_tasks == ("v0007-b000001",)
    assert contents(cache) == before


def test_a_growth_that_ends_before_the_lock_is_held_loses_nothing(cache, tiny_vit, tiny_weights, digits_tars, tmp_path):
    grown = Path(shutil.copytree(cache, tmp_path / "grown.zarr"))
    build(replace(build_config(tiny_vit, tiny_weights, digits_tars[0].parent, grown), views=3, grow=True))
    with ThreadPoolExecutor(1) as pool:
        with only_writer(cache):
            repairing = pool.submit(look, cache, repair=True)
            time.sleep(1)  # it has opened the cache and waits for the lock
            shutil.copytree(grown, cache, dirs_exist_ok=True)
        summary = repairing.result()
    assert (summary.problems, summary.repaired_tasks, summary.num_tasks) == ((), (), 9)
    assert len(list_commits(cache)) == 9


def test_nothing_is_repaired_while_metadata_is_damaged(cache):
    """A wrong layout would make every task look damaged."""
    text = (cache / "zarr.json").read_text()
    (cache / "zarr.json").write_text(text.replace('"num_layers": 2', '"num_layers": 4'))
    summary = look(cache, repair=True)
    assert any("the checksum of its" in message for message in messages(summary))
    assert any("shape[2] is 2, expected 4 by the cache's layout" in message for message in messages(summary))
    assert len({finding.task for finding in summary.problems} - {None}) == 6
    assert (summary.is_metadata_whole, summary.repaired_tasks) == (False, ())
    assert len(list_commits(cache)) == 6


def test_repair_waits_its_turn(cache, monkeypatch):
    monkeypatch.setattr(writers, "_SECONDS_TO_WAIT", 0.2)
    flip(cache / CODES, 0.3)
    with only_writer(cache), pytest.raises(ConfigError, match="another process is writing"):
        look(cache, repair=True)
    assert len(list_commits(cache)) == 6
    with only_writer(cache):
        assert len(look(cache).problems) == 1, "looking needs no lock"


# The command line


def test_options_that_cannot_be_used_are_refused(cache):
    for fields, message in (
        ({"weights": Path("w.pth")}, "weights=w.pth is only for a comparison with the teacher. Give --teacher too"),
        ({"threshold": 2.0}, "threshold=2.0 is only .* Give --teacher too, or leave --threshold out"),
        ({"teacher_sample": 8}, "teacher_sample=8 is only .* Give --teacher too, or leave --teacher-sample out"),
        ({"device": "cpu"}, "device=cpu is only .* Give --teacher too, or leave --device out"),
        ({"sample": -1}, "sample=-1: expected at least 0"),
        ({"workers": 0}, "workers=0: expected at least 1"),
        ({"threshold": 0.5}, "threshold=0.5: expected at least 1"),
        ({"threshold": float("nan")}, "threshold=nan: expected a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            look(cache, **fields)
    with pytest.raises(CacheMissError, match="is not a cache"):
        look(cache / "nowhere", repair=True)


def run_cli(*arguments: object):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_the_command_says_that_all_is_well(cache):
    result = run_cli(cache, "--sample", 5)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["problems"], record["num_views"]) == ([], 5)
    assert result.stderr.splitlines()[-1].startswith(f"{cache} is whole: 6 of 6 tasks, ")


def test_names_from_a_cache_cannot_move_the_cursor(cache):
    (cache / "samples/a\x1b[2Kb\nc").write_text("stray")
    result = run_cli(cache, "--sample", 0)
    assert f"note: {cache}/samples/a?[2Kb c is not part of the cache." in result.stderr.splitlines()
    assert "\x1b" not in result.output


def test_two_numbers_of_views_are_refused(cache):
    done = run_cli(cache, "--all", "--sample", 3)
    assert done.exit_code == 1
    assert "--sample and --all both say how many views are compared" in done.stderr


def test_the_command_lists_problems_repairs_and_says_what_to_type(cache):
    flip(cache / CODES, 0.3)
    flip(cache / "samples/label/c/0", 0.5)
    result = run_cli(cache)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    record = json.loads(result.stdout)
    for problem in record["problems"]:
        assert problem["message"] in lines
    again = "then the same `atcache build` or `atcache pull` command"
    assert f"1 task can be redone: run `atcache verify {cache} --repair`, {again}" in lines
    assert any("in files that a build does not write again: restore them from a copy" in line for line in lines)
    assert len(list_commits(cache)) == 6
    result = run_cli(cache, "--repair")
    assert result.exit_code == 1
    assert "deleted 1 commit record: type the same `atcache build` or `atcache pull` command again" in result.stderr
    assert json.loads(result.stdout)["repaired_tasks"] == [TASK]


def test_the_command_compares_with_the_teacher(cache, tiny_vit, tiny_weights):
    arguments = (cache, "--teacher", tiny_vit, "--weights", tiny_weights, "--teacher-sample", 4, "--device", "cpu")
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fidelity"]["num_views"] == 4
    assert "row KL" in result.stderr
    reader = CacheReader(cache)
    rewrite_task(cache, codes=lambda sample: np.zeros_like(reader.read_codes(1, sample)))
    result = run_cli(*arguments)
    assert result.exit_code == 1
    assert "decoded maps are" in result.stderr
    result = run_cli(cache, "--teacher", "vit_tiny_patch16_224")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ")


# Memory


def test_memory_is_a_chunk_however_large_the_shard(tmp_path):
    layout = StoreLayout(
        num_views=1,
        num_samples=512,
        num_layers=1,
        num_tokens=64,
        num_components=1024,
        codes_dtype="int8",
        samples_per_shard=512,
        layers_per_chunk=1,
        parameter_names=("x",),
    )
    spec, random = layout.codes, np.random.default_rng(0)
    shard = ShardFile(tmp_path / "shard", spec)
    for number in range(512):
        shard.append(number, compress(random.integers(-128, 128, spec.chunk_shape, np.int8), spec.compressor))
    record = shard.seal()
    shard.place()
    assert record.nbytes > 2**25
    tracemalloc.start()
    check = check_shard(tmp_path / "shard", spec, record.nbytes, record.crc32, deep=True)
    _, peak_nbytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert check.problem is None
    assert peak_nbytes < 2**22
