"""Tars as other programs write them: captions and JSON beside images, members apart, labels elsewhere."""

from __future__ import annotations

import json

import pytest
from made_tars import encoded, member, picture, sample, write_tar

from atcache.errors import CacheMismatchError, ConfigError, SourceError
from atcache.images.selection import select_keys
from atcache.images.source import Source, index_source
from atcache.images.tar_samples import Problem

IMAGE = encoded(picture())


def as_json(**members) -> bytes:
    return json.dumps(members).encode()


def img2dataset_tar(path, labels, **more):
    """A shard of img2dataset: KEY.jpg, KEY.txt and a KEY.json longer than a header's block, in this order."""
    members = []
    for number, label in enumerate(labels):
        key = f"00000/{number:09d}"
        about = as_json(uid=f"u{number}", url="http://x/" + "y" * 600, status="success", class_id=label, **more)
        members += [member(f"{key}.jpg", IMAGE), member(f"{key}.txt", b"a cat"), member(f"{key}.json", about)]
    return write_tar(path, members)


def test_img2dataset_tars_are_read_without_labels(tmp_path):
    path = img2dataset_tar(tmp_path / "00000.tar", [3, 5])
    expected = r"00000\.tar: none of its 2 samples has a label \(\.cls\)\. .*--label-key.*--labels none"
    with pytest.raises(SourceError, match=expected):
        index_source(path)
    with pytest.raises(SourceError, match=r"none of the 2 samples has a label"):
        index_source(path, on_bad="skip")
    index = index_source(path, labels="none")
    assert index.keys_S.tolist() == [b"00000/000000000", b"00000/000000001"]
    assert index.label_S.tolist() == [-1, -1]
    assert not index.problem_S.any()
    assert Source(index).read_bytes(1) == IMAGE


@pytest.mark.parametrize("value", [7, 7.0, "7", " 7\n"])
def test_a_label_in_json_is_a_number_in_any_form(tmp_path, value):
    path = img2dataset_tar(tmp_path / "t.tar", [value])
    assert index_source(path, label_key="class_id").label_S.tolist() == [7]


def test_a_label_may_lie_deeper_and_replaces_the_cls_file(tmp_path):
    about = as_json(meta={"class": {"id": 4}})
    path = write_tar(tmp_path / "t.tar", [member("a.json", about), *sample("a", 1)])
    assert index_source(path, label_key="meta.class.id").label_S.tolist() == [4]
    assert index_source(path).label_S.tolist() == [1]


BAD_JSON = {
    "a word": (as_json(class_id="cat"), '"cat" as class_id'),
    "negative": (as_json(class_id=-1), "-1 as class_id"),
    "a fraction": (as_json(class_id=1.5), "1.5 as class_id"),
    "true": (as_json(class_id=True), "true as class_id"),
    "huge": (as_json(class_id=2**31), "2147483648 as class_id"),
    "several": (as_json(class_id=[1, 2]), r"a list as class_id .*\[1, 2\].*--labels none"),
    "twice": (b'{"class_id": 1, "class_id": 2}', "'class_id' occurs twice"),
    "not JSON": (b"{class_id: 1}", "cannot be read"),
    "a place that is twice": (b'{"class_id": {"a": 1}, "class_id": 1}', "'class_id' occurs twice"),
    "a list with NaN": (b'{"class_id": [NaN, 1]}', r"a list as class_id .*NaN is not JSON"),
    "NaN": (b'{"class_id": NaN}', "NaN is not JSON"),
    "deep": (b"[" * 100_000, "cannot be read"),
    "a long number": (b'{"class_id": ' + b"1" * 5000 + b"}", "cannot be read"),
    "large": (b'{"class_id": 1, "x": "' + b"y" * 2**20 + b'"}', "1048600 bytes; expected at most 1048576"),
    "nothing": (as_json(class_id=None), r"no label \(\.json, key class_id\)"),
    "no such key": (as_json(label=1), r"no label \(\.json, key class_id\)"),
    "no object": (b"3", r"no label \(\.json, key class_id\)"),
}


def test_what_is_not_json_elsewhere_in_a_json_does_no_harm(tmp_path):
    about = b'{"score": NaN, "twice": 1, "twice": 2, "meta": {"max": Infinity, "id": 4}, "meta2": {"a": 1, "a": 1}}'
    path = write_tar(tmp_path / "t.tar", [member("a.json", about), *sample("a", 1)])
    assert index_source(path, label_key="meta.id").label_S.tolist() == [4]


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_labels_in_json_are_named(tmp_path, name):
    data, message = BAD_JSON[name]
    members = [member("a.json", data), member("a.jpg", IMAGE), member("b.json", as_json(class_id=2))]
    path = write_tar(tmp_path / "t.tar", [*members, member("b.jpg", IMAGE)])
    with pytest.raises(SourceError, match=rf"t\.tar: key 'a' .*{message}"):
        index_source(path, label_key="class_id")
    index = index_source(path, label_key="class_id", on_bad="skip")
    assert (index.label_S.tolist(), index.problem_S.tolist()) == ([-1, 2], [Problem.NO_LABEL, 0])


@pytest.mark.parametrize("text", [b"3 7 12", b"3,7\n", b"3;7", b"1\n2\n"])
def test_several_labels_are_named_or_not_read(tmp_path, text):
    path = write_tar(tmp_path / "t.tar", [member("a.cls", text), member("a.jpg", IMAGE), *sample("b", 1)])
    for labels in ("required", "optional"):
        with pytest.raises(SourceError, match=r"key 'a' has several labels .*--labels none"):
            index_source(path, labels=labels)
    assert index_source(path, labels="none").label_S.tolist() == [-1, -1]


def test_members_of_a_sample_may_lie_apart(tmp_path):
    keys = ["b", "a", "c"]
    images = [member(f"{key}.jpg", IMAGE + key.encode()) for key in keys]
    labels = [member(f"{key}.cls", str(number).encode()) for number, key in enumerate(sorted(keys))]
    captions = [member(f"{key}.txt", b"x") for key in keys]
    for number, members in enumerate(([*images, *labels, *captions], [*labels, *captions, *images])):
        index = index_source(write_tar(tmp_path / f"{number}.tar", members))
        found = dict(zip(index.keys_S.tolist(), index.label_S.tolist(), strict=True))
        assert found == {b"a": 0, b"b": 1, b"c": 2}
        source = Source(index)
        assert [source.read_bytes(row) for row in range(3)] == [IMAGE + key for key in index.keys_S.tolist()]


def test_members_that_come_again_and_say_the_same_are_no_problem(tmp_path):
    late = [member("a.json", b"{}"), member("a.txt", b"x")]
    index = index_source(write_tar(tmp_path / "t.tar", [*sample("a", 1), *sample("b", 2), *late]))
    assert index.label_S.tolist() == [1, 2]


def test_a_key_that_is_used_again_is_ambiguous(tmp_path):
    cases = [
        ([member("a.jpg", IMAGE), *sample("b"), *sample("a", 3)], [4, 0, 4]),
        ([*sample("a", 1), *sample("b"), member("a.cls", b"1")], [0, 0, 4]),
        ([*sample("a", 1), *sample("b"), *sample("a", 2), *sample("c"), *sample("a", 2)], [0, 0, 4, 0, 4]),
    ]
    for number, (members, problems) in enumerate(cases):
        path = write_tar(tmp_path / f"{number}.tar", members)
        with pytest.raises(SourceError, match="key 'a' occurs twice: its image or its label comes again"):
            index_source(path)
        assert index_source(path, on_bad="skip").problem_S.tolist() == problems
    two = write_tar(tmp_path / "two.tar", [member("a.cls", b"1"), member("a.cls", b"2"), member("a.jpg", IMAGE)])
    with pytest.raises(SourceError, match="key 'a' has two labels"):
        index_source(two)


def test_upper_case_and_double_extensions_are_read(tmp_path):
    members = [
        *(member("a.JPG", IMAGE + b"a"), member("a.CLS", b"1")),
        *(
            member("b.seg.png", b"mask"),
            member("b.jpg", IMAGE + b"b"),
            member("b.cls", b"2"),
            member("b.seg.json", b""),
        ),
        *(member("c.jpg.jpg", IMAGE + b"c"), member("c.jpg.cls", b"3")),
        *(member("d.jpg.jpg", b"other"), member("d.jpg", IMAGE + b"d"), member("d.cls", b"4")),
        *(member("e.jpg", IMAGE + b"e"), member("e.jpg.jpg", b"other"), member("e.cls", b"5")),
    ]
    index = index_source(write_tar(tmp_path / "t.tar", members))
    assert index.label_S.tolist() == [1, 2, 3, 4, 5]
    assert [Source(index).read_bytes(row) for row in range(5)] == [IMAGE + key for key in index.keys_S.tolist()]


def test_a_mask_is_no_image(tmp_path):
    path = write_tar(tmp_path / "t.tar", [member("a.seg.png", b"mask"), member("a.cls", b"1")])
    with pytest.raises(SourceError, match=r"key 'a' has no image: its extensions are cls, seg\.png"):
        index_source(path)


def test_one_tar_may_hold_a_split_sorted_by_class(tmp_path):
    members = [found for number in range(3000) for found in sample(f"n{number:05d}", number // 1500, size=1)]
    index = index_source(write_tar(tmp_path / "train.tar", members))
    assert (index.num_samples, (index.label_S == 1).sum()) == (3000, 1500)


# Names of classes


def test_names_of_classes_lie_beside_the_tars_and_leave_the_fingerprint_alone(tmp_path):
    path = write_tar(tmp_path / "t.tar", [*sample("a", 1), *sample("b", 0)])
    unnamed = index_source(path)
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\nbig\xff dog\r\n\n")
    named = index_source(path)
    assert unnamed.classes.names == ()
    assert named.classes.names == ("cat", r"big\xff dog")
    assert [named.classes.name(label) for label in (0, 1, 2, -1)] == ["cat", r"big\xff dog", "", ""]
    assert named.fingerprint == unnamed.fingerprint
    assert index_source(path, labels="none").classes.names == ()


def test_a_label_beyond_the_names_is_refused_with_its_sample(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    path = write_tar(tmp_path / "t.tar", [*sample("a", 1), *sample("b", 2)])
    expected = r"t\.tar/b has the label 2, but .*classes\.txt names 2 classes, from 0"
    with pytest.raises(SourceError, match=expected):
        index_source(path, on_bad="skip")


def test_tars_of_two_folders_must_name_classes_alike(tmp_path):
    paths = []
    for name, classes in (("train", "cat\ndog\n"), ("extra", "cat\nfox\nowl\n")):
        (tmp_path / name).mkdir()
        paths.append(write_tar(tmp_path / name / f"{name}.tar", sample("a", 1)))
        (tmp_path / name / "classes.txt").write_text(classes)
    with pytest.raises(CacheMismatchError, match=r"class 1 is 'fox' in .*extra/classes\.txt and 'dog' in .*train"):
        index_source(paths)
    (tmp_path / "train" / "classes.txt").write_text("cat\nfox\n")
    assert index_source(paths).classes.names == ("cat", "fox", "owl")


# A part of the samples


@pytest.fixture
def index(tmp_path):
    first = write_tar(tmp_path / "one.tar", [*sample("a", 1), *sample("f/b", 2), *sample("c", 3)])
    return index_source([first, write_tar(tmp_path / "two.tar", [*sample("a", 4), *sample("d", 5)])])


def test_keys_choose_samples_in_the_order_of_the_tars(index, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("\ufeffd\none.tar/a\r\n\nf/b\nd\n", encoding="utf-8")
    chosen = select_keys(index, keys)
    assert [chosen.sample_key(row) for row in range(3)] == ["one.tar/a", "one.tar/f/b", "two.tar/d"]
    assert chosen.label_S.tolist() == [1, 2, 5]
    assert Source(chosen).read_bytes(2) == Source(index).read_bytes(4)
    keys.write_text("two.tar/a")
    only = select_keys(index, keys)
    assert [tar.name for tar in only.tars] == ["two.tar"]
    assert (only.tar_S.tolist(), only.tar_nbytes) == ([0], index.tar_nbytes[1:])


def test_keys_that_mean_no_sample_or_two_are_refused(index, tmp_path):
    keys = tmp_path / "keys.txt"
    for text, message in (
        ("c\nx\none.tar/d\n", r"the data lack 2 of its 3 keys, the first is 'x'.*such as one\.tar/a or a"),
        ("a\n", r"2 samples have the key 'a', such as one\.tar/a and two\.tar/a"),
        ("\n", "is empty"),
    ):
        keys.write_text(text)
        with pytest.raises(ConfigError, match=message):
            select_keys(index, keys)
    keys.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        select_keys(index, keys)
    with pytest.raises(ConfigError, match="cannot be read"):
        select_keys(index, tmp_path / "missing.txt")
