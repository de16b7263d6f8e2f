"""Caches in several parts, written by the store alone: rows between parts, other Zarr libraries, absurd numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st
from made_store import BAD_SAMPLE, LAYOUT, all_bytes, build, make_index, run_python, write_task

from atcache.errors import CacheMissError, ConfigError, CorruptCacheError
from atcache.store.audit import check_metadata, check_tables, find_strays
from atcache.store.growth import GROWTH, begin_growth, enlarge_arrays, read_growth
from atcache.store.joining import join_layouts
from atcache.store.layout import Status, StoreLayout
from atcache.store.manifest import check_commit, read_commits
from atcache.store.parts import append_part, count_samples, find_changed_tar, take_tars
from atcache.store.reader import CacheReader
from atcache.store.writer import finish_cache

OTHER_TARS = ("c.tar", "d.tar")


def other_samples(num_samples):
    """Samples of other tars, with longer keys."""
    index = make_index(num_samples)
    keys_S = np.array([f"elsewhere/{sample:020d}".encode() for sample in range(num_samples)])
    return replace(index, tars=tuple(tar.with_name(name) for tar, name in zip(index.tars, OTHER_TARS, strict=True)),
                   keys_S=keys_S, problem_S=np.zeros(num_samples, np.uint8))  # fmt: skip


@pytest.fixture
def growing(tmp_path):
    """A cache of 2 views x 10 samples that is growing to 3 views x (10 + 5); nothing new is written yet."""
    path = build(tmp_path / "cache.zarr")
    layout = replace(LAYOUT, num_views=3).with_part((5,))
    index = append_part(make_index(10), other_samples(5), LAYOUT.samples_per_shard)
    attributes = {**CacheReader(path).attributes, "layout": layout.to_json()}
    begin_growth(path, attributes, index)
    return path, layout, index


def grow(path, layout):
    for task in layout.tasks():
        if task.name not in read_commits(path):
            write_task(path, layout, task)
    return finish_cache(path, grows=True)


# The arithmetic


@st.composite
def parts(draw):
    layouts = draw(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=2, max_size=6))
    samples_per_shard = draw(st.integers(1, 20))
    pieces = [replace(LAYOUT, num_samples=count, samples_per_shard=samples_per_shard) for count, _ in layouts]
    return [piece.with_part((7,)) if grown else piece for piece, (_, grown) in zip(pieces, layouts, strict=True)]


@given(parts())
def test_tasks_hold_each_sample_of_each_part_once_and_no_other_row(layouts):
    joined = join_layouts(layouts)
    starts = [start for start, _ in joined.parts()]
    assert all(start % joined.samples_per_shard == 0 for start in starts)
    rows = [row for start, stop in joined.parts() for row in range(start, stop)]
    owned = [(task.view, row) for task in joined.tasks() for row in range(task.start, task.stop)]
    assert owned == [(view, row) for view in range(joined.num_views) for row in rows]
    assert joined.num_real_samples == len(rows) == sum(layout.num_real_samples for layout in layouts)
    assert all(joined.has_task(joined.task_of(view, row)) for view, row in owned)
    # A part keeps its blocks, and with them the last shard that is not full.
    sizes = [task.num_samples for layout in layouts for task in layout.tasks() if task.view == 0]
    assert [task.num_samples for task in joined.tasks() if task.view == 0] == sizes
    assert StoreLayout.from_json(json.loads(json.dumps(joined.to_json()))) == joined


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 7))
def test_tables_of_parts_are_taken_apart_again(sizes, samples_per_shard):
    tables = [
        replace(make_index(size), tars=tuple(tar.with_name(f"{number}-{tar.name}") for tar in make_index(1).tars))
        for number, size in enumerate(sizes)
    ]
    layouts = [replace(LAYOUT, num_samples=size, samples_per_shard=samples_per_shard) for size in sizes]
    joined = tables[0]
    for table in tables[1:]:
        joined = append_part(joined, table, samples_per_shard)
    layout = join_layouts(layouts)
    assert (len(joined.keys_S), count_samples(joined)) == (layout.num_samples, layout.num_real_samples)
    for (start, stop), table in zip(layout.parts(), tables, strict=True):
        assert joined.keys_S[start:stop].tolist() == table.keys_S.tolist()
        assert [joined.sample_key(row) for row in range(start, stop)] == list(
            map(table.sample_key, range(stop - start))
        )
    for number, table in enumerate(tables):
        taken, whole = take_tars(joined, [2 * number, 2 * number + 1]), take_tars(table, [0, 1])
        assert taken.fingerprint == replace(whole, keys_S=whole.keys_S.astype(joined.keys_S.dtype)).fingerprint
        assert find_changed_tar(taken, whole) is None


@pytest.mark.parametrize("column", ["keys_S", "offset_S", "nbytes_S", "label_S", "problem_S"])
def test_a_tar_with_other_samples_is_found(column):
    index = make_index(9)
    values = getattr(index, column).copy()
    values[5] = b"other" if column == "keys_S" else values[5] + 1
    taken = [take_tars(each, [0, 1]) for each in (index, replace(index, **{column: values}))]
    assert find_changed_tar(*taken) == "b.tar"
    assert find_changed_tar(take_tars(index, [0]), take_tars(replace(index, tar_nbytes=(1, 2)), [0])) == "a.tar"


@pytest.mark.parametrize(
    "part_stops", [[10], [0, 10], [4, 8], [5, 4, 10], [6, 7, 10], [10, 11], [-4, 10], [8, 2**40], ["4", 10], 10]
)
def test_parts_that_cannot_be_are_refused(part_stops):
    with pytest.raises(ConfigError, match="part_stops"):
        StoreLayout.from_json({**LAYOUT.to_json(), "part_stops": part_stops})


def test_a_cache_in_one_part_says_nothing_of_parts():
    assert "part_stops" not in LAYOUT.to_json()
    assert LAYOUT.samples_group == "samples"


# Growing


def test_nothing_changes_for_readers_until_the_end(growing):
    path, layout, _ = growing
    old = CacheReader(path)
    assert (old.layout, old.is_complete, old.missing_tasks()) == (LAYOUT, True, [])
    before = all_bytes(path)
    grow(path, layout)
    assert old.layout == LAYOUT
    assert old.samples.sample_key(9) == make_index(10).sample_key(9)
    assert old.status_VS.shape == (2, 10)
    assert old.is_complete
    after = all_bytes(path)
    rewritten = {str(name) for name, data in before.items() if after.get(name) != data}
    arrays = {f"{spec.name}/zarr.json" for spec in layout.arrays()}
    assert rewritten == {"zarr.json", GROWTH, *arrays}
    new = CacheReader(path)
    assert new.layout == layout
    assert new.is_complete


def test_a_grown_cache_is_whole_and_its_empty_rows_say_so(growing):
    path, layout, index = growing
    totals = grow(path, layout)
    assert (totals["num_tasks"], totals["num_stored"], totals["num_bad"]) == (15, 42, 3)
    reader = CacheReader(path)
    assert (reader.status_VS[:, 10:12] == Status.NO_SAMPLE).all()
    assert (np.delete(reader.status_VS, [BAD_SAMPLE, 10, 11], axis=1) == Status.STORED).all()
    assert reader.status(2, 10) == Status.NO_SAMPLE
    with pytest.raises(CacheMissError, match=r"view 1 of sample 11 \('b.tar/'\) is not stored in .*: no sample\.$"):
        reader.read_codes(1, 11)
    assert reader.samples.fingerprint == index.fingerprint
    assert check_metadata(path) + check_tables(path, reader.attributes, layout) == []
    assert find_strays(path, layout, set(read_commits(path))) == []
    for commit in read_commits(path).values():
        assert check_commit(path, commit, layout, deep=True) == []


def test_a_growth_that_was_stopped_anywhere_leaves_the_old_cache_whole(growing, tmp_path):
    path, layout, _ = growing
    for number, task in enumerate([task for task in layout.tasks() if task.name not in read_commits(path)]):
        write_task(path, layout, task, stop=task.stop - 1 if number == 4 else None)
    assert find_strays(path, LAYOUT, set(read_commits(path))) == []
    enlarge_arrays(path, layout)  # the last step but one of finishing
    assert check_metadata(path) == []
    zarr_says = run_python("import sys, zarr; print(zarr.open_group(sys.argv[1])['views/status'].shape)", path)
    assert zarr_says.stdout == "(2, 10)\n", "the root has copies of what the arrays were"
    copy = tmp_path / "copy.zarr"
    shutil.copytree(path, copy)
    growth = (path / GROWTH).read_bytes()
    grow(path, layout)
    assert not (path / GROWTH).exists()
    (path / GROWTH).write_bytes(growth)  # a kill between the last two writes
    assert read_growth(path) is None
    finish_cache(path)
    assert not (path / GROWTH).exists()
    grow(copy, layout)
    assert all_bytes(copy) == all_bytes(path)


def test_tasks_of_a_growth_that_was_given_up_are_not_trusted(growing):
    path, layout, _ = growing
    for task in layout.tasks():
        if task.name not in read_commits(path):
            write_task(path, layout, task)
    (path / GROWTH).unlink()
    other = LAYOUT.with_part((2,))
    index = append_part(make_index(10), other_samples(2), LAYOUT.samples_per_shard)
    begin_growth(path, {**CacheReader(path).attributes, "layout": other.to_json()}, index)
    assert read_commits(path).keys() == {task.name for task in LAYOUT.tasks()}
    grow(path, other)
    assert CacheReader(path).samples.fingerprint == index.fingerprint


def test_damage_of_what_it_grows_to_is_named(growing):
    path, _, _ = growing
    for damaged in (b"", b"[]", b"{}", (path / GROWTH).read_bytes().replace(b"3", b"4")):
        (path / GROWTH).write_bytes(damaged)
        with pytest.raises(CorruptCacheError, match=r"growth.json is damaged: .* the cache is as it was before"):
            read_growth(path)


# Other Zarr libraries

OTHERS = {
    "zarr": "import zarr\ndef read(path, name): return zarr.open_group(path, mode='r')[name][...]",
    "tensorstore": """
import tensorstore
def read(path, name):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}/"}}
    return tensorstore.open(spec, read=True).result().read().result()
""",
    "zarrs": """
import zarr
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True})
def read(path, name): return zarr.open_group(path, mode='r')[name][...]
""",
}
SAVE = """
import sys, numpy as np
for name in sys.argv[3:]:
    np.save(f"{sys.argv[2]}/{name.replace('/', '-')}.npy", read(sys.argv[1], name))
"""


@pytest.mark.parametrize("library", OTHERS)
def test_another_library_reads_what_our_reader_reads_and_fill_values_between(growing, library, tmp_path):
    path, layout, index = growing
    grow(path, layout)
    names = ["attention/codes", "pixels/rgb", "views/status", "samples-2/label", "samples-2/problem"]
    done = run_python(OTHERS[library] + SAVE, path, tmp_path, *names)
    assert done.returncode == 0, done.stderr
    codes, rgb, status, label, problem = (np.load(tmp_path / f"{name.replace('/', '-')}.npy") for name in names)
    reader = CacheReader(path)
    assert codes.shape[:2] == rgb.shape[:2] == status.shape == (3, 17)
    for view in range(3):
        for row in range(17):
            if row in (BAD_SAMPLE, 10, 11):
                assert not codes[view, row].any()
                continue
            assert np.array_equal(codes[view, row], reader.read_codes(view, row))
            assert np.array_equal(rgb[view, row], reader.read_pixels(view, row))
    assert not status[:, 10:12].any(), "in the shards these rows are padding"
    assert problem[10:12].tolist() == [Status.NO_SAMPLE] * 2
    assert label.tolist() == index.label_S.tolist()
