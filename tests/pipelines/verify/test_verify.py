"""Verifying: what is wrong with a cache is found and named, and only that; repairing redoes just what is damaged."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import atcache
from atcache.cli.main import cli
from atcache.errors import AtcacheError, CacheMismatchError, CacheMissError, ConfigError, SourceError
from atcache.files import durable
from atcache.files.durable import encode_json, only_writer, partial_path
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.verify.run import VerifySummary, verify
from atcache.store.audit import check_metadata
from atcache.store.chunks import compress, decode_index
from atcache.store.layout import ZSTD, StoreLayout
from atcache.store.manifest import check_commit, list_commits, read_commit, read_commits, write_commit
from atcache.store.metadata import seal
from atcache.store.reader import CacheReader
from atcache.store.shard_check import check_shard
from atcache.store.shard_file import ShardFile
from atcache.store.tables import write_state
from atcache.store.writer import TaskWriter, encode_view, finish_cache
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name

GOLDEN = sorted((Path(__file__).parent.parent.parent / "golden").glob("format-*/*.zarr"))

# The tasks of these caches are 2 views of 3 blocks of 20, 20 and 8 digits.
TASK, BLOCK_SIZE = "v0001-b000001", 20
CODES = "attention/codes/c/1/1/0/0/0"
RECORD = f"commits/{TASK}.json"


@pytest.fixture
def cache(tiny_cache, tmp_path) -> Path:
    """A copy, to be damaged, of a cache whose views are replayed."""
    return shutil.copytree(tiny_cache(codec="int8", views=2), tmp_path / "digits.zarr")


@pytest.fixture
def stored(tiny_cache, tmp_path) -> Path:
    """A copy of a cache that keeps its images."""
    return shutil.copytree(tiny_cache(codec="int8", views=2, pixels="store"), tmp_path / "stored.zarr")


def look(cache: Path, **fields) -> VerifySummary:
    place = {"device": "cpu"} if "teacher" in fields else {}
    return verify(VerifyConfig(cache=cache, **{**place, **fields}))


def messages(summary: VerifySummary) -> list[str]:
    return [finding.message for finding in summary.problems]


def flip(file: Path, place: float, bit: int = 0x10) -> None:
    """Flip a bit of one byte; a place below 1 is a share of the file."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * place) if isinstance(place, float) else place] ^= bit
    file.write_bytes(data)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


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
        f"{cache} has shards without commit record, from {TASK} on (1 in all); the next build writes them again.",
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


# Damage


@pytest.mark.parametrize("place", [0, 0.3, -30, -9, -1])
@pytest.mark.parametrize(
    "array", ["attention/codes", "views/parameters", "views/pixel_hash", "views/status", "pixels/rgb"]
)
def test_a_flipped_byte_of_a_shard_is_named_with_its_task(stored, array, place):
    spec = next(spec for spec in CacheReader(stored).layout.arrays() if spec.name == array)
    file = stored / spec.shard_file(CacheReader(stored).layout.task(1, 1))
    flip(file, place)
    summary = look(stored, sample=0)
    (finding,) = summary.problems
    assert finding.message.startswith(f"{file} is damaged: ")
    assert finding.task == TASK


def test_damaged_chunks_are_told_by_their_samples(stored):
    spec, file = CacheReader(stored).layout.codes, stored / CODES
    data = file.read_bytes()
    offset_N = decode_index(data[-spec.index_nbytes :], spec, len(data))[:, 0].reshape(BLOCK_SIZE, -1)[:, 0]
    for row in (0, 9, 10, 19):
        flip(file, int(offset_N[row]) + 3)
    (message,) = messages(look(stored, sample=0))
    assert message == f"{file} is damaged: 4 chunks of samples 20, 29-30, 39: its checksum does not match."


def test_a_chunk_of_the_wrong_size_is_found_though_all_checksums_hold(cache):
    """What a wrong writer would leave: a chunk that is whole, decompresses, and is too short."""
    layout = CacheReader(cache).layout
    task, spec = layout.task(1, 1), layout.parameters
    shard = ShardFile(cache / spec.shard_file(task), spec)
    shard.append(0, compress(np.zeros(3, np.float32), ZSTD))
    record = shard.seal()
    shard.place()
    commit = read_commit(cache, TASK)
    write_commit(cache, replace(commit, files={**commit.files, spec.shard_file(task): record}))
    assert any(
        f"{spec.shard_file(task)} is damaged: it claims 12 bytes of content, expected" in message
        for message in messages(look(cache, sample=0))
    )


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_truncated_shard_is_named(cache, keep):
    data = (cache / CODES).read_bytes()
    (cache / CODES).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    (message,) = messages(look(cache))
    assert message.startswith(f"{cache / CODES} has ")
    assert message.endswith(f" bytes, {len(data)} were committed.")


def test_missing_shards_and_records_are_named(cache):
    (cache / CODES).unlink()
    (cache / "views/status/c/0/2").unlink()
    (cache / "commits/v0000-b000000.json").unlink()
    summary = look(cache)
    assert {finding.task: finding.message for finding in summary.problems} == {
        "v0000-b000000": f"{cache}/commits/v0000-b000000.json is missing, though the cache was finished.",
        "v0000-b000002": f"{cache}/views/status/c/0/2 cannot be read: No such file or directory.",
        TASK: f"{cache / CODES} cannot be read: No such file or directory.",
    }


def test_every_bit_of_a_commit_record_counts(cache):
    layout, file = CacheReader(cache).layout, cache / RECORD
    whole = file.read_bytes()
    for place in range(0, len(whole), 5):
        flip(file, place, bit=1 << (place % 8))
        try:
            problems = check_commit(cache, read_commit(cache, TASK), layout, deep=True)
        except AtcacheError as error:
            problems = [str(error)]
        assert any(str(file) in problem for problem in problems), whole[max(0, place - 20) : place + 20]
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["zarr.json", "views/status/zarr.json", "samples/zarr.json", "samples/key/zarr.json"])
def test_every_bit_of_a_zarr_json_counts(cache, name):
    file = cache / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        flip(file, place, bit=1 << (place % 8))
        try:
            problems = check_metadata(cache)
        except AtcacheError as error:
            problems = [str(error)]
        assert any(str(file) in problem for problem in problems), whole[max(0, place - 20) : place + 20]
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["key", "label", "tar"])
def test_damage_in_the_sample_table_is_named_and_is_nothing_a_build_redoes(cache, name):
    (file,) = [file for file in (cache / "samples" / name / "c").rglob("*") if file.is_file()]
    flip(file, 0.5)
    summary = look(cache, repair=True)
    (finding,) = [finding for finding in summary.problems if str(file) in finding.message]
    assert finding.task is None
    assert "restore it from a copy" in finding.message
    assert len(list_commits(cache)) == 6


def test_another_sample_table_is_found_by_its_fingerprint(cache):
    shutil.rmtree(cache / "samples/label/c")
    shutil.copytree(cache / "samples/offset/c", cache / "samples/label/c")
    found = messages(look(cache, sample=0))
    assert len(found) == 2
    assert all(message.startswith(f"the sample table in {cache}/samples has the fingerprint") for message in found)


@pytest.mark.parametrize("name", ["attention/state/steps", "attention/bias"])
def test_damaged_codec_state_is_named(cache, name, tiny_vit, tiny_weights):
    write_state(cache, {"steps": np.ones((2, 32), np.float32)}, np.zeros((2, 2, 17, 17), np.float32))
    (file,) = [file for file in (cache / name / "c").rglob("*") if file.is_file()]
    assert messages(look(cache, sample=0)) == []
    flip(file, 0.5)
    summary = look(cache, sample=0, teacher=tiny_vit, weights=tiny_weights)
    assert [message.startswith(f"{file} is damaged: ") for message in messages(summary)] == [True]
    assert summary.fidelity is None


def test_a_codec_that_does_not_fit_the_layout_is_found(cache):
    root = json.loads((cache / "zarr.json").read_bytes())
    ours = root["attributes"]["atcache"]
    root["attributes"]["atcache"] = seal({**ours, "codec": {"name": "exact", "dtype": "float16"}})
    (cache / "zarr.json").write_bytes(encode_json(root))
    found = messages(look(cache, sample=0))
    assert any("type of codes: 'int16', but its layout says 'int8'" in message for message in found), found


def test_a_record_that_is_another_tasks_or_no_tasks_is_found(cache):
    shutil.copy(cache / "commits/v0000-b000001.json", cache / RECORD)
    shutil.copy(cache / "commits/v0000-b000001.json", cache / "commits/v0007-b000001.json")
    summary = look(cache)
    assert [finding.task for finding in summary.problems] == ["v0007-b000001", TASK]
    assert "is for a task that this cache does not have" in summary.problems[0].message
    assert f"{cache / RECORD} records task v0000-b000001" in summary.problems[1].message


def test_counts_are_compared_with_statuses_and_totals_with_records(cache):
    commit = read_commit(cache, TASK)
    write_commit(cache, replace(commit, num_stored=19, num_bad=1))
    summary = look(cache, sample=0)
    status = cache / "views/status/c/1/1"
    assert messages(summary) == [f"{cache / RECORD} counts 19 views with codes and 1 without, {status} has 20 and 0."]
    write_commit(cache, replace(commit, quality={"row_kl_nats": 3.0}))
    (message,) = messages(look(cache, sample=0))
    assert message.startswith(f"{cache}/zarr.json: \"complete\" says {{'row_kl_nats': ")
    assert message.endswith("'max': 3.0}}.")


def test_views_that_are_stored_against_their_status_are_found(cache):
    """A task written again by a wrong writer: its statuses call two stored views bad."""
    layout = CacheReader(cache).layout
    spec, task = layout.status, layout.task(1, 1)
    status_S = np.ones(BLOCK_SIZE, np.uint8)
    status_S[[3, 4]] = 6
    shard = ShardFile(cache / spec.shard_file(task), spec)
    shard.append(0, compress(status_S, ZSTD))
    record = shard.seal()
    shard.place()
    commit = read_commit(cache, TASK)
    files = {**commit.files, spec.shard_file(task): record}
    write_commit(cache, replace(commit, files=files, num_stored=18, num_bad=2))
    assert (
        f"{cache / CODES} does not have just the views that are stored by their status: see samples 23-24."
        in messages(look(cache, sample=0))
    )


# Images


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


def rewrite_task(path, *, codes=None, pixels=None) -> None:
    """Write one task again with other codes or pixels: every checksum, record and total is right."""
    reader = CacheReader(path)
    layout, commit = reader.layout, read_commit(path, TASK)
    codes = codes or (lambda sample: reader.read_codes(1, sample))
    pixels = pixels or (lambda sample: reader.read_pixels(1, sample))
    writer = TaskWriter(path, layout, commit.task)
    for sample in range(commit.task.start, commit.task.stop):
        rgb = None if layout.rgb is None else compress(pixels(sample), ZSTD)
        writer.add(
            sample,
            status=reader.status(1, sample),
            parameters_P=reader.parameters(1, sample),
            pixel_hash=reader.pixel_hash(1, sample),
            chunks=encode_view(layout, codes(sample)),
            pixels_chunk=rgb,
        )
    writer.commit(commit.quality)
    finish_cache(path)


def test_moved_tars_are_named_once_each_and_found_by_data(tiny_vit, tiny_weights, digits_tars, tmp_path):
    shutil.copytree(digits_tars[0].parent, tmp_path / "here")
    config = build_config(tiny_vit, tiny_weights, tmp_path / "here", tmp_path / "cache.zarr")
    build(config)
    (tmp_path / "here").rename(tmp_path / "there")
    found = messages(look(config.out))
    assert len(found) == 3
    assert found[0] == (
        f"{tmp_path}/here/digits-0000.tar cannot be read: No such file or directory. If the tars were moved, say where "
        "to with --data."
    )
    assert messages(look(config.out, data=str(tmp_path / "there"))) == []
    with (tmp_path / "there/digits-0002.tar").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SourceError, match=r"digits-0002\.tar has \d+ bytes instead of \d+"):
        look(config.out, data=str(tmp_path / "there"))
    (tmp_path / "there").rename(tmp_path / "here")
    (message,) = messages(look(config.out, all=True))
    assert "digits-0002.tar has" in message


def build_config(teacher, weights, data, out) -> BuildConfig:
    """As the fixtures' caches were built."""
    return BuildConfig(
        teacher=teacher,
        weights=weights,
        data=str(data),
        out=out,
        codec="int8",
        views=2,
        samples_per_shard=20,
        workers=0,
        device="cpu",
        precision="fp32",
    )


def test_data_is_refused_where_images_are_stored(stored, digits_tars):
    with pytest.raises(ConfigError, match="stores its images and reads no tars"):
        look(stored, data=str(digits_tars[0].parent))


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


def test_a_record_of_no_task_is_deleted_and_the_cache_is_complete_again(cache):
    before = contents(cache)
    shutil.copy(cache / RECORD, cache / "commits/v0007-b000001.json")
    assert not atcache.open(cache).reader.is_complete
    assert look(cache, repair=True).repaired_tasks == ("v0007-b000001",)
    assert contents(cache) == before


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
    monkeypatch.setattr(durable, "_SECONDS_TO_WAIT", 0.2)
    flip(cache / CODES, 0.3)
    with only_writer(cache), pytest.raises(ConfigError, match="another process is writing"):
        look(cache, repair=True)
    assert len(list_commits(cache)) == 6
    with only_writer(cache):
        assert len(look(cache).problems) == 1, "looking needs no lock"


# The teacher


def test_a_cache_is_faithful_to_its_teacher(cache, tiny_vit, tiny_weights):
    summary = look(cache, sample=0, teacher=tiny_vit, weights=tiny_weights, teacher_sample=12)
    fidelity, attributes = summary.fidelity, CacheReader(cache).attributes
    assert messages(summary) == []
    assert fidelity is not None
    assert fidelity.num_views == 12
    assert list(fidelity.layer_row_kl_nats) == [0, 1]
    assert 0 < fidelity.row_kl_nats == pytest.approx(np.mean(list(fidelity.layer_row_kl_nats.values())))
    assert fidelity.row_kl_nats <= fidelity.worst_row_kl_nats
    recorded = max(attributes["calibration"]["row_kl_nats"], attributes["complete"]["quality"]["row_kl_nats"]["mean"])
    assert fidelity.row_kl_limit_nats == pytest.approx(max(1.5 * recorded, 1e-6))
    assert 0 < fidelity.injected_error < 0.05


def test_a_lossless_cache_is_not_blamed_for_noise(tiny_cache, tiny_vit, tiny_weights):
    path = tiny_cache(codec="exact:dtype=float32")
    assert CacheReader(path).attributes["calibration"]["row_kl_nats"] < 1e-9
    summary = look(path, sample=0, teacher=tiny_vit, weights=tiny_weights, threshold=1.0)
    assert messages(summary) == []
    assert summary.fidelity is not None
    assert summary.fidelity.row_kl_limit_nats == 1e-6


@pytest.mark.parametrize("damaged", ["all of a task", "one view"])
def test_wrong_codes_under_right_checksums_are_found_by_the_teacher(cache, tiny_vit, tiny_weights, damaged):
    reader = CacheReader(cache)
    wrong = range(48) if damaged == "all of a task" else [25]

    def codes(sample):
        """Those of another sample, where they are to be wrong."""
        return reader.read_codes(1, 20 + (sample - 19) % 20 if sample in wrong else sample)

    rewrite_task(cache, codes=codes)
    assert messages(look(cache, all=True)) == [], "without the teacher nothing tells"
    summary = look(cache, sample=0, teacher=tiny_vit, weights=tiny_weights, teacher_sample=96)
    assert str(cache / CODES) in messages(summary)[0]
    assert "decoded maps are" in messages(summary)[0]
    assert summary.fidelity is not None
    if damaged == "one view":
        assert (summary.fidelity.worst_view, summary.fidelity.worst_sample_key) == (1, "digits-0001.tar/digit-00025")
    loose = look(cache, sample=0, teacher=tiny_vit, weights=tiny_weights, teacher_sample=96, threshold=1e9)
    assert messages(loose) == []


def test_another_teacher_is_refused(cache, tiny_vit, tiny_weights, tmp_path):
    torch.manual_seed(5)
    torch.save(create_student(parse_model_name(tiny_vit), num_classes=10).state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        CacheMismatchError, match=r"has weights of sha256 \w+\.\.\., expected \w+\.\.\.\. Give the --weig"
    ):
        look(cache, teacher=tiny_vit, weights=tmp_path / "other.pth")
    with pytest.raises(CacheMismatchError, match=r"another teacher: num_heads is 2 there and 4 here\. Give --tea"):
        look(cache, teacher=tiny_vit.replace("num_heads=2", "num_heads=4"), weights=tiny_weights)
    with pytest.raises(CacheMismatchError, match=r"another teacher: mean is None there and \(0\.1.* here"):
        look(cache, teacher=f"{tiny_vit},mean=(0.1,0.1,0.1)", weights=tiny_weights)


def test_options_that_cannot_be_used_are_refused(cache):
    for fields, message in (
        ({"weights": Path("w.pth")}, "weights=w.pth: only for a comparison with the teacher. Give --teacher too"),
        ({"threshold": 2.0}, "threshold=2.0: only .* Give --teacher too, or leave --threshold out"),
        ({"teacher_sample": 8}, "teacher_sample=8: only .* Give --teacher too, or leave --teacher-sample out"),
        ({"device": "cpu"}, "device=cpu: only .* Give --teacher too, or leave --device out"),
        ({"sample": -1}, "sample=-1: expected at least 0"),
        ({"workers": 0}, "workers=0: expected at least 1"),
        ({"threshold": 0.5}, "threshold=0.5: expected at least 1"),
        ({"threshold": float("nan")}, "threshold=nan: expected a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            look(cache, **fields)
    with pytest.raises(CacheMissError, match="is no cache"):
        look(cache / "nowhere", repair=True)


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


# The command line


def run_cli(*arguments: object):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_the_command_says_that_all_is_well(cache):
    result = run_cli(cache, "--sample", 5)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["problems"], record["num_views"]) == ([], 5)
    assert result.stderr.splitlines()[-1].startswith(f"{cache} is whole: 6 of 6 tasks, ")


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
    assert f"1 task can be redone: `atcache verify {cache} --repair`, then the same `atcache build`" in lines
    assert any("in what a build does not write again: restore the files from a copy" in line for line in lines)
    assert len(list_commits(cache)) == 6
    result = run_cli(cache, "--repair")
    assert result.exit_code == 1
    assert "deleted 1 commit record: type the same `atcache build` command again" in result.stderr
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
