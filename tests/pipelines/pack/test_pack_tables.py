"""Hugging Face image datasets: parquet files and the arrow files of `datasets`, written by pyarrow."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from atcache.errors import ConfigError, SourceError
from atcache.images.source import Source, index_source
from atcache.images.tars import expand_tars
from atcache.pipelines.pack.config import PackConfig
from atcache.pipelines.pack.run import pack
from atcache.pipelines.pack.splits import choose_files
from atcache.pipelines.pack.tables import find_tables

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["wolf", "ant", "cat"]


def encoded(number: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def table_of(rows, *, names=NAMES, image="image", label="label", label_type=None) -> pa.Table:
    """A table as `datasets` makes it: (bytes, path, label) a row, and the features in the schema's metadata."""
    features: dict = {image: {"_type": "Image"}}
    columns: dict = {image: pa.array([{"bytes": data, "path": path} for data, path, _ in rows], IMAGE)}
    if label is not None:
        columns[label] = pa.array([number for *_, number in rows], label_type or pa.int64())
        features[label] = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


ROWS = [(encoded(number), f"picture {number}.png", number % 3) for number in range(10)]


def write_parquet(folder: Path, name: str, table: pa.Table) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name, row_group_size=3)
    return folder


def write_arrow(folder: Path, name: str, table: pa.Table) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return folder


def packed(out: Path) -> dict[bytes, tuple[int, bytes]]:
    index = index_source(out)
    source = Source(index)
    return {
        index.keys_S[row]: (int(index.label_S[row]), bytes(source.read_bytes(row))) for row in range(index.num_samples)
    }


def two_parquet_files(root: Path) -> Path:
    write_parquet(root, "data/train-00000-of-00002-0123456789abcdef.parquet", table_of(ROWS[:6]))
    return write_parquet(root, "data/train-00001-of-00002-0123456789abcdef.parquet", table_of(ROWS[6:]))


def saved_to_disk(root: Path) -> Path:
    write_arrow(root, "data-00000-of-00002.arrow", table_of(ROWS[:6]))
    (root / "dataset_info.json").write_text("{}")
    (root / "state.json").write_text("{}")
    return write_arrow(root, "data-00001-of-00002.arrow", table_of(ROWS[6:]))


def loaded_dataset(root: Path) -> Path:
    write_arrow(root, "animals/default/0.0.0/abc/animals-train.arrow", table_of(ROWS))
    # What `map` keeps beside the data is not more of it.
    return write_arrow(root, "animals/default/0.0.0/abc/cache-0123.arrow", table_of(ROWS[:2]))


@pytest.mark.parametrize("make", [two_parquet_files, saved_to_disk, loaded_dataset])
@pytest.mark.parametrize("in_order", [False, True])
def test_the_bytes_and_the_classes_of_a_dataset_are_packed(make, in_order, tmp_path):
    config = PackConfig(data=make(tmp_path / "animals"), out=tmp_path / "out", samples_per_tar=4, in_order=in_order)
    summary = pack(config)
    assert [Path(path).name for path in summary.tars] == [f"animals-{number:06d}.tar" for number in range(3)]
    assert (tmp_path / "out/classes.txt").read_text() == "wolf\nant\ncat\n"  # the dataset's order, not the alphabet's
    assert packed(tmp_path / "out") == {
        f"picture_{number}".encode(): (label, data) for number, (data, _, label) in enumerate(ROWS)
    }
    keys = list(packed(tmp_path / "out"))
    assert (keys == sorted(keys)) == in_order
    assert sorted(path.name for path in config.out.iterdir()) == [*(Path(p).name for p in summary.tars), "classes.txt"]


def test_splits_of_one_folder_are_chosen_by_name(tmp_path):
    root = two_parquet_files(tmp_path / "animals")
    write_parquet(root, "data/test-00000-of-00001.parquet", table_of([(data, path, -1) for data, path, _ in ROWS]))
    with pytest.raises(
        SourceError, match=r"animals: there is more than one split; it has test, train\. Give one with --"
    ):
        pack(PackConfig(data=root, out=tmp_path / "out"))
    with pytest.raises(SourceError, match=r"there is no split 'val'; it has test, train"):
        pack(PackConfig(data=root, out=tmp_path / "out", split="val"))
    summary = pack(PackConfig(data=root, out=tmp_path / "out", split="train"))
    assert summary.num_samples == 10
    assert Path(summary.tars[0]).name == "animals-train-000000.tar"
    with pytest.raises(
        SourceError, match=r"10 of 10 rows have no label in the column 'label', the first is row 0 \(-1\)"
    ):
        pack(PackConfig(data=root, out=tmp_path / "out", split="test"))
    assert pack(PackConfig(data=root, out=tmp_path / "test", split="test", labels="none")).num_classes == 0


@pytest.mark.parametrize(
    ("files", "split", "chosen"),
    [
        (["train/images_0.parquet", "test/images_0.parquet"], "train", ["train/images_0.parquet"]),
        (["train-0001.parquet", "train-0002.parquet", "test-0001.parquet"], "train", 2),
        (["x_train.parquet", "x_test.parquet"], "test", ["x_test.parquet"]),
        (["train/a/x.parquet", "train/b/y.parquet", "test/a/x.parquet"], "train", 2),
        (["Train/images.parquet", "Test/images.parquet"], "train", ["Train/images.parquet"]),
        (["part_train.parquet", "part_test.parquet"], "train", ["part_train.parquet"]),
        (["data/train_small-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], "train", 1),
        (["default/partial-train/0000.parquet", "default/test/0000.parquet"], "partial-train", 1),
        (["default/unlabeled/0000.parquet", "default/train/0000.parquet"], "unlabeled", 1),
        (["train_val.parquet", "train.parquet"], "train", ["train.parquet"]),
        (["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"], None, 2),
        (["train/0000.parquet", "test/0000.parquet"], "test", ["test/0000.parquet"]),
        (["default/train/0000.parquet", "default/train/0001.parquet"], None, 2),
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], "train", 1),
        (["a-train.arrow", "a-validation-00000-of-00001.arrow"], "validation", 1),
        (["one.parquet", "two.parquet"], None, 2),
        (["train.parquet", "val.parquet"], "val", ["val.parquet"]),
    ],
)
def test_splits_are_read_from_the_names_that_datasets_have(files, split, chosen):
    found = choose_files([Path(file) for file in files], None, split, "x")
    assert len(found) == chosen if isinstance(chosen, int) else [str(file) for file in found] == chosen
    if split is not None:
        with pytest.raises(SourceError, match=r"x: there is more than one split; it has .*Give one with --split\."):
            choose_files([Path(file) for file in files], None, None, "x")


TWO_SUBSETS = ["path/small/train-00000-of-00001.parquet", "derma/train-00000-of-00001.parquet"]


@pytest.mark.parametrize(("subset", "chosen"), [("path/small", 0), ("path", 0), ("small", 0), ("derma", 1)])
def test_a_subset_is_chosen_by_its_folder(subset, chosen):
    assert choose_files([Path(file) for file in TWO_SUBSETS], subset, "train", "x") == [Path(TWO_SUBSETS[chosen])]


@pytest.mark.parametrize(
    ("files", "subset", "split", "sentence"),
    [
        (TWO_SUBSETS, None, "train", "x: there is more than one subset; it has derma, path/small. Give one with --sub"),
        (TWO_SUBSETS, "blood", None, "x: there is no subset 'blood'; it has derma, path/small. Give one with --subset"),
        (["x.parquet", "a/x.parquet"], None, None, "more than one subset; it has ., a. Give one with --subset"),
        (
            ["train.parquet", "more.parquet"],
            None,
            "train",
            "x: the names of some files say a split (train), and 1 say none, the first is more.parquet. Move the",
        ),
        (["more.parquet"], None, "train", "there is no split 'train'; its files name no splits. Leave --split out."),
    ],
)
def test_files_that_may_not_belong_together_are_refused(files, subset, split, sentence):
    with pytest.raises(SourceError, match=re.escape(sentence)):
        choose_files([Path(file) for file in files], subset, split, "x")


def test_each_subset_is_packed_with_its_own_classes(tmp_path):
    root = write_parquet(tmp_path / "mnist", "path/train-00000-of-00001.parquet", table_of(ROWS))
    write_parquet(root, "derma/train-00000-of-00001.parquet", table_of(ROWS, names=["x", "y", "z"]))
    with pytest.raises(SourceError, match="it has derma, path"):
        pack(PackConfig(data=root, out=tmp_path / "out", split="train"))
    summary = pack(PackConfig(data=root, out=tmp_path / "out", subset="derma", split="train"))
    assert Path(summary.tars[0]).name == "mnist-derma-train-000000.tar"
    assert (tmp_path / "out/classes.txt").read_text() == "x\ny\nz\n"


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (table_of(ROWS, names=["x", "y", "z"]), "its column 'label' names other classes"),
        (table_of(ROWS, names=None), "its column 'label' names other classes"),
        (table_of(ROWS, label=None), "it has no labels in the column 'label'"),
        (table_of(ROWS, image="img"), "it has no images in the column 'image'"),
    ],
)
def test_files_with_other_columns_or_classes_are_refused_before_anything_is_read(other, sentence, tmp_path):
    root = write_parquet(tmp_path / "mixed", "train-0001.parquet", table_of(ROWS))
    write_parquet(root, "train-0002.parquet", other)
    with pytest.raises(SourceError, match=rf"0002\.parquet cannot be packed together with .*0001\.parquet: {sentence}"):
        pack(PackConfig(data=root, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_labels_of_other_kinds(tmp_path):
    texts = [(data, path, NAMES[label]) for data, path, label in ROWS]
    for name, table, classes, first in (
        ("texts", table_of(texts, names=None, label_type=pa.string()), "ant\ncat\nwolf\n", 2),
        ("numbers", table_of(ROWS, names=None), None, 0),
    ):
        data = write_parquet(tmp_path / name, "train-00000-of-00001.parquet", table)
        pack(PackConfig(data=data, out=tmp_path / f"{name} out"))
        file = tmp_path / f"{name} out/classes.txt"
        assert (file.read_text() if file.exists() else None) == classes
        assert packed(tmp_path / f"{name} out")[b"picture_0"][0] == first
    (tmp_path / "list.txt").write_text("cat\nant\nwolf\n")
    data = two_parquet_files(tmp_path / "animals")
    pack(PackConfig(data=data, out=tmp_path / "by list", classes=tmp_path / "list.txt"))
    assert [packed(tmp_path / "by list")[f"picture_{number}".encode()][0] for number in range(3)] == [2, 1, 0]


CRANES = ["crane", "boat", "crane"]


def packed_labels(out: Path, name: str) -> list[int]:
    """The labels of pictures 0, 1 and 2."""
    index = index_source(str(out / f"{name}-*.tar"))
    labels = dict(zip(index.keys_S.tolist(), index.label_S.tolist(), strict=True))
    return [labels[f"picture_{number}".encode()] for number in range(3)]


def test_classes_of_one_name_keep_their_numbers(tmp_path):
    """ImageNet has two cranes and two maillots."""
    out = tmp_path / "out"
    for split, table in (("train", table_of(ROWS, names=CRANES)), ("val", table_of(ROWS[:3], names=CRANES))):
        write_parquet(tmp_path / "birds", f"{split}.parquet", table)
        pack(PackConfig(data=tmp_path / "birds", out=out, split=split, name=split))
        assert packed_labels(out, split) == [0, 1, 2]
    assert (out / "classes.txt").read_text() == "crane\nboat\ncrane\n"
    assert index_source(out).classes.names == tuple(CRANES)
    pack(PackConfig(data=tmp_path / "birds", out=out, split="val", name="by-list", classes=out))
    assert packed_labels(out, "by-list") == [0, 1, 2]


def test_a_list_that_does_not_tell_classes_of_one_name_apart_is_refused(tmp_path):
    (tmp_path / "once.txt").write_text("boat\ncrane\n")
    (tmp_path / "twice.txt").write_text("wolf\nant\ncat\nwolf\n")
    (tmp_path / "twice, moved.txt").write_text("ant\nwolf\nwolf\ncat\n")
    cranes = write_parquet(tmp_path / "birds", "x.parquet", table_of(ROWS, names=CRANES))
    animals = write_parquet(tmp_path / "animals", "x.parquet", table_of(ROWS))
    boats = write_parquet(tmp_path / "boats", "x.parquet", table_of(ROWS[1:2], names=CRANES))
    out = tmp_path / "out"
    with pytest.raises(SourceError, match=r"has 2 classes called 'crane', and .*once\.txt.*Leave --classes out"):
        pack(PackConfig(data=cranes, out=out, classes=tmp_path / "once.txt"))
    with pytest.raises(SourceError, match=r"row 0 is .*moved\.txt names the class 'wolf' 2 times, as 1 and 2, so its"):
        pack(PackConfig(data=animals, out=out, classes=tmp_path / "twice, moved.txt"))
    pack(PackConfig(data=animals, out=out, classes=tmp_path / "twice.txt"))  # it begins with the data's own names
    assert packed_labels(out, "animals") == [0, 1, 2]
    pack(PackConfig(data=boats, out=tmp_path / "none is a crane", classes=tmp_path / "once.txt"))
    assert index_source(tmp_path / "none is a crane").label_S.tolist() == [0]


@pytest.mark.parametrize("name", ["", "a\nb", "a\r", "a\x0bb", "half \ud83d"])
def test_a_name_that_cannot_be_a_line_of_classes_txt_is_refused(name, tmp_path):
    data = write_parquet(tmp_path / "animals", "x.parquet", table_of(ROWS, names=["wolf", "ant", name]))
    with pytest.raises(SourceError, match=re.escape(f"class 2 is called {name!r}, which cannot be a line of classes.")):
        pack(PackConfig(data=data, out=tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_spaces_around_a_name_stay_and_a_list_is_found_to_agree(tmp_path):
    data = write_parquet(tmp_path / "animals", "x.parquet", table_of(ROWS, names=["wolf ", " ant", "cat"]))
    pack(PackConfig(data=data, out=tmp_path / "out"))
    assert index_source(tmp_path / "out").classes.names == ("wolf ", " ant", "cat")
    pack(PackConfig(data=data, out=tmp_path / "out", name="again", classes=tmp_path / "out"))
    assert packed_labels(tmp_path / "out", "again") == [0, 1, 2]


def test_columns_are_found_or_asked_for(tmp_path):
    table = table_of(ROWS, image="img", label="fine").append_column("coarse", pa.array([0] * 10))
    features = json.loads(table.schema.metadata[b"huggingface"])
    features["info"]["features"]["coarse"] = {"names": ["all"], "_type": "ClassLabel"}
    data = write_parquet(
        tmp_path / "cifar", "x.parquet", table.replace_schema_metadata({"huggingface": json.dumps(features)})
    )
    with pytest.raises(
        SourceError, match=r"expected one column of labels, found fine, coarse\. Choose it with --label-col"
    ):
        pack(PackConfig(data=data, out=tmp_path / "out"))
    with pytest.raises(SourceError, match=r"expected one column of images called 'no', found img\."):
        pack(PackConfig(data=data, out=tmp_path / "out", image_column="no"))
    assert pack(PackConfig(data=data, out=tmp_path / "out", label_column="fine")).num_classes == 3
    bare = write_parquet(tmp_path / "bare", "x.parquet", table_of(ROWS, label=None))
    with pytest.raises(
        SourceError, match=r"columns? of labels, found none\. .*For images without labels, give --labels none"
    ):
        pack(PackConfig(data=bare, out=tmp_path / "out"))


def test_names_that_repeat_or_are_missing_make_unique_keys(tmp_path):
    rows = [(encoded(number), name, 0) for number, name in enumerate(["image.jpg", "image.jpg", None, "image.jpg"])]
    rows += [(encoded(9, "JPEG"), "x/y.z.JPEG", 0), (encoded(10, "WEBP"), "no extension", 1)]
    data = write_parquet(tmp_path / "names", "x.parquet", table_of(rows))
    pack(PackConfig(data=data, out=tmp_path / "out"))
    assert set(packed(tmp_path / "out")) == {
        b"image",
        b"image-00000001",
        b"00000002",
        b"image-00000003",
        b"y_z",
        b"no_extension",
    }


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [(None, "/data/a.png", 0)],
            r"row 0 of .*: the image has no bytes, only the path '/data/a\.png'\. Save the dataset",
        ),
        ([(b"", None, 0)], r"row 0 of .*: the image has no bytes\."),
        (
            [ROWS[0], (b"GIF89a...", "a.gif", 0)],
            r"row 1 .*\(a\.gif\) is no image that atcache reads .* begins with b'GIF89a",
        ),
        ([(ROWS[0][0], "a.png", 7)], "column 'label' has the label 7, but names 3 classes"),
        ([(ROWS[0][0], "a.png", None)], r"1 of 1 rows have no label .* row 0 \(None\)"),
        ([], "has no rows"),
    ],
)
def test_rows_that_cannot_be_packed_are_named(rows, sentence, tmp_path):
    data = write_parquet(tmp_path / "bad", "x.parquet", table_of(rows))
    with pytest.raises(SourceError, match=sentence):
        pack(PackConfig(data=data, out=tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_files_and_options_without_a_meaning_are_refused(tmp_path):
    root = two_parquet_files(tmp_path / "animals")
    whole = next(root.rglob("*.parquet")).read_bytes()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/x.parquet").write_bytes(whole[:-20])
    (tmp_path / "page").mkdir()
    (tmp_path / "page/x.arrow").write_bytes(b"<html>")
    for name, form in (("damaged", "parquet"), ("page", "arrow")):
        with pytest.raises(SourceError, match=rf"x\.{form} cannot be read as {form} \(.*\)\. Fetch it again"):
            pack(PackConfig(data=tmp_path / name, out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="is for image folders"):
        pack(PackConfig(data=root, out=tmp_path / "out", labels="x.csv"))
    (tmp_path / "folder/a").mkdir(parents=True)
    (tmp_path / "folder/a/x.png").write_bytes(encoded(0))
    with pytest.raises(SourceError, match="holds no parquet or arrow files, so --split means nothing"):
        pack(PackConfig(data=tmp_path / "folder", out=tmp_path / "out", split="train"))
    with pytest.raises(ConfigError, match="revision=v1 is of a dataset on the hub"):
        PackConfig(data=root, out=tmp_path / "out", revision="v1")


def test_other_commands_say_that_a_dataset_is_packed_first(tmp_path):
    data = write_parquet(tmp_path / "animals", "x.parquet", table_of(ROWS))
    with pytest.raises(
        SourceError, match=r"looks like a Hugging Face dataset. Run `atcache pack --data .*animals --out"
    ):
        expand_tars(data)
    with pytest.raises(
        SourceError, match=r"hf:org/animals names a dataset on the hub. Run `atcache pack --data hf:org/an"
    ):
        expand_tars("hf:org/animals")


def test_a_folder_of_images_with_a_table_beside_them_is_an_image_folder(tmp_path):
    (tmp_path / "folder/a").mkdir(parents=True)
    (tmp_path / "folder/a/x.png").write_bytes(encoded(0))
    write_parquet(tmp_path / "folder", "b/metadata.parquet", table_of(ROWS))
    assert find_tables(tmp_path / "folder") == []
    about = pa.table({"file_name": ["c/x.png"], "caption": ["a cat"]})
    write_parquet(tmp_path / "above", "metadata.parquet", about)
    (tmp_path / "above/c").mkdir()
    (tmp_path / "above/c/x.png").write_bytes(encoded(0))
    assert pack(PackConfig(data=tmp_path / "above", out=tmp_path / "out")).num_samples == 1
    holds = write_parquet(tmp_path / "above", "train.parquet", table_of(ROWS))
    assert len(find_tables(holds)) == 2
    assert len(find_tables(two_parquet_files(tmp_path / "tables"))) == 2
