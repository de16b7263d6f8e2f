"""Labels of packed images: by a list of classes, by their numbers, by a CSV file, or none."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from atcache.errors import ConfigError, SourceError
from atcache.images.source import index_source
from atcache.images.tars import expand_tars
from atcache.pipelines.pack.config import PackConfig
from atcache.pipelines.pack.folders import plan_folder
from atcache.pipelines.pack.run import pack


def make_images(root: Path, *names: str) -> Path:
    """An image of its own for each name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / name)
    return root


def labels_of(plan) -> dict[str, int | None]:
    return {sample.key: sample.label for tar in plan.tars for sample in tar}


def test_a_validation_folder_that_lacks_a_class_gets_the_labels_of_training(tmp_path):
    train = make_images(tmp_path / "train", "ant/0.png", "bee/0.png", "cat/0.png")
    val = make_images(tmp_path / "val", "ant/1.png", "cat/1.png")
    pack(PackConfig(data=train, out=tmp_path / "tars"))
    for classes in (tmp_path / "tars", tmp_path / "tars/classes.txt"):
        plan = plan_folder(PackConfig(data=val, out=tmp_path / "out", classes=classes))
        assert labels_of(plan) == {"ant/1": 0, "cat/1": 2}
        assert plan.classes == ("ant", "bee", "cat")
    summary = pack(PackConfig(data=val, out=tmp_path / "tars", classes=tmp_path / "tars"))
    assert summary.num_classes == 3
    index = index_source(str(tmp_path / "tars/val-*.tar"))
    assert dict(zip(index.keys_S.tolist(), index.label_S.tolist(), strict=True)) == {b"ant/1": 0, b"cat/1": 2}


def test_without_the_list_the_same_folder_is_refused_and_told_of_it(tmp_path):
    train = make_images(tmp_path / "train", "ant/0.png", "bee/0.png")
    val = make_images(tmp_path / "val", "bee/1.png")
    pack(PackConfig(data=train, out=tmp_path / "tars"))
    with pytest.raises(SourceError, match=r"labels would not agree\. Number them alike with --classes .*tars, or give"):
        pack(PackConfig(data=val, out=tmp_path / "tars"))


@pytest.mark.parametrize("text", [b"ant\nbee", b"ant\r\nbee\r\n", b"\xef\xbb\xbfant\nbee\n"])
def test_a_list_that_was_written_by_hand_may_lie_in_the_folder_of_the_tars(text, tmp_path):
    data = make_images(tmp_path / "train", "ant/0.png", "bee/0.png")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/classes.txt").write_bytes(text)
    assert pack(PackConfig(data=data, out=tmp_path / "tars")).num_classes == 2
    assert (tmp_path / "tars/classes.txt").read_bytes() == text
    (tmp_path / "labels.csv").write_text("path,label\nant/0.png,0\nbee/0.png,1\n")
    by_number = PackConfig(data=data, out=tmp_path / "tars", labels=str(tmp_path / "labels.csv"), name="numbers")
    assert pack(by_number).num_classes == 2
    (tmp_path / "tars/classes.txt").write_bytes(b"bee\nant")
    with pytest.raises(SourceError, match="names other classes than these images have"):
        pack(PackConfig(data=data, out=tmp_path / "tars", name="again"))


def test_imagenets_list_of_synsets_gives_its_numbers(tmp_path):
    file = tmp_path / "LOC_synset_mapping.txt"
    file.write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn01484850 great white shark\n"
    )
    val = make_images(tmp_path / "val", "n01484850/a.png", "n01440764/b.png")
    plan = plan_folder(PackConfig(data=val, out=tmp_path / "out", classes=file))
    assert labels_of(plan) == {"n01440764/b": 0, "n01484850/a": 2}
    assert plan.classes == ("n01440764", "n01443537", "n01484850")


def test_a_folder_that_is_not_in_the_list_is_named_with_the_nearest(tmp_path):
    (tmp_path / "list.txt").write_text("ant\ngoldfish\n")
    data = make_images(tmp_path / "data", "ant/0.png", "goldfsh/0.png")
    sentence = r"folder .*goldfsh is of class 'goldfsh', which is not among the 2 classes of .*list\.txt; .* 'goldfish'"
    with pytest.raises(SourceError, match=sentence):
        plan_folder(PackConfig(data=data, out=tmp_path / "out", classes=tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"ant\n\nbee\n", "line 2 is empty"),
        (b"", "line 1 is empty"),
        (b"ant\nbee\nant\n", "names the class 'ant' 2 times"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (None, r"cannot be read: No such file.*one a line, or a folder of tars"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    data = make_images(tmp_path / "data", "ant/0.png")
    with pytest.raises(SourceError, match=sentence):
        plan_folder(PackConfig(data=data, out=tmp_path / "out", classes=tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("0", "1", "10", "100", "2"), ("0", "1", "2", "10", "100")),
        (("10", "9", "010"), ("9", "010", "10")),
        (("n10", "n2", "n1"), ("n1", "n10", "n2")),  # as torchvision's ImageFolder
        (("10", "2", "cat"), ("10", "2", "cat")),
        (("²", "1"), ("1", "²")),  # a digit to Python, but no number
    ],
)
def test_numbers_are_in_their_order_and_other_names_in_that_of_texts(names, order, tmp_path):
    data = make_images(tmp_path / "data", *(f"{name}/x.png" for name in names))
    plan = plan_folder(PackConfig(data=data, out=tmp_path / "out"))
    assert plan.classes == order
    assert {Path(key).parts[0]: label for key, label in labels_of(plan).items() if "²" not in names} == (
        {} if "²" in names else {name: label for label, name in enumerate(order)}
    )


def listed(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "labels.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_a_csv_file_labels_images_by_name(tmp_path):
    data = make_images(tmp_path / "data", "a.png", 'b, "c".png', "deep/d.png", "other.png")
    file = listed(
        tmp_path, f'\ufeffsplit,label, path\r\nx,dog,a.png\r\nx,cat,"b, ""c"".png"\r\nx,dog,{data}/deep/d.png\r\n'
    )
    plan = plan_folder(PackConfig(data=data, out=tmp_path / "out", labels=str(file)))
    assert plan.classes == ("cat", "dog")
    assert labels_of(plan) == {"a": 1, "b___c_": 0, "deep/d": 1}
    assert plan.ignored == {"images that are not listed": 1}
    (tmp_path / "list.txt").write_text("dog\nbird\ncat\n")
    plan = plan_folder(PackConfig(data=data, out=tmp_path / "out", labels=str(file), classes=tmp_path / "list.txt"))
    assert labels_of(plan) == {"a": 0, "b___c_": 2, "deep/d": 0}


def test_a_csv_file_labels_images_by_number(tmp_path):
    data = make_images(tmp_path / "data", "a.png", "b.png")
    config = PackConfig(
        data=data, out=tmp_path / "out", labels=str(listed(tmp_path, "path,label\na.png,7.0\nb.png,0\n"))
    )
    summary = pack(config)
    assert summary.num_classes == 8
    assert not (tmp_path / "out/classes.txt").exists()
    index = index_source(tmp_path / "out")
    assert dict(zip(index.keys_S.tolist(), index.label_S.tolist(), strict=True)) == {b"a": 7, b"b": 0}
    (tmp_path / "out/classes.txt").write_text("x\ny\n")
    with pytest.raises(SourceError, match="labels would not agree"):
        pack(PackConfig(data=data, out=tmp_path / "out", name="val", labels=config.labels))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file;label\n", r"has the columns file;label in its first line, expected path and label, separated by commas"),
        ("a.png,1\nb.png,2\n", r"has the columns a\.png, 1 in its first line"),
        ("", r"has the columns \(none\)"),
        ("path,label\n", "lists no images below its header"),
        ("path,label\na.png,\n", "line 2: the path or the label is missing"),
        ("path,label\na.png,1\na.png,1\n", r"line 3: 'a\.png' is listed a second time"),
        (
            "path,label\na.png,1\nb.png,dog\n",
            r"line 3: the label 'dog' is a name, and others, such as '1', are numbers",
        ),
        ("path,label\na.png,1\nb.png,-1\n", "line 3: the label -1 is no class; expected a whole number from 0"),
        ("path,label\na.png,1\nb.png,3000000000\n", "the label 3000000000 is no class; .* from 0 to 2147483647"),
        ("path,label\na.png,1.5\nb.png,2.0\n", r"line 2: the label 1\.5 is no class"),
        ("path,label\na.png,1\n../b.png,2\n", r"line 3: '\.\./b\.png' is not in .*data"),
        ("path,label\na.png,1\n/etc/b.png,2\n", r"line 3: '/etc/b\.png' is not in .*data"),
        ("path,label\na.png,1\nc.png,2\nd.png,2\n", r"lists 2 images that are not in .*data.*: c\.png, d\.png"),
        (b"path,label\n\xff.png,2\n", "is not CSV text in UTF-8"),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_refused(text, sentence, tmp_path):
    data = make_images(tmp_path / "data", "a.png", "b.png")
    config = PackConfig(data=data, out=tmp_path / "out", labels=str(listed(tmp_path, text)))
    with pytest.raises(SourceError, match=sentence):
        pack(config)
    assert not (tmp_path / "out").exists()


def test_a_number_beyond_the_list_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("dog\ncat\n")
    data = make_images(tmp_path / "data", "a.png")
    file = listed(tmp_path, "path,label\na.png,2\n")
    with pytest.raises(SourceError, match=r"line 2: there is no label 2: .*list\.txt names 2 classes"):
        plan_folder(PackConfig(data=data, out=tmp_path / "out", labels=str(file), classes=tmp_path / "list.txt"))


def test_images_without_labels_make_tars_without_labels(tmp_path):
    data = make_images(tmp_path / "data", "a.png", "b.png", "deep/c.png")
    with pytest.raises(SourceError, match=r"holds no folders\. .* give --labels none; for labels in a file, --labels"):
        pack(PackConfig(data=make_images(tmp_path / "flat", "a.png"), out=tmp_path / "tars"))
    summary = pack(PackConfig(data=data, out=tmp_path / "tars", labels="none"))
    assert (summary.num_samples, summary.num_classes) == (3, 0)
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["data-000000.tar"]
    (tar,) = expand_tars(tmp_path / "tars")
    with tarfile.open(tar) as members:
        assert sorted(members.getnames()) == ["a.png", "b.png", "deep/c.png"]
    with pytest.raises(ConfigError, match="names labels, and labels=none packs none"):
        PackConfig(data=data, out=tmp_path / "tars", labels="none", classes=tmp_path)
