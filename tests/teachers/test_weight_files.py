"""Files of weights as they lie about: whole, in shards, with plain things beside them, or something else altogether."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import sys
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from atcache.errors import TeacherError
from atcache.teachers.weight_files import read_weights

FIRST, SECOND = {"a.weight": torch.arange(3.0)}, {"b.weight": torch.arange(4.0), "b.bias": torch.zeros(4)}


def write_shards(folder: Path, kind: str = "safetensors") -> Path:
    """Two shards and their index, as Hugging Face's libraries write them."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate((FIRST, SECOND), start=1):
        file = f"{stem}-0000{number}-of-00002.{kind}"
        save_file(tensors, folder / file) if kind == "safetensors" else torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("give", ["index", "folder"])
def test_shards_are_read_by_their_index_or_their_folder(kind, give, tmp_path):
    index = write_shards(tmp_path, kind)
    weights = read_weights(index if give == "index" else tmp_path)
    assert {name: t.tolist() for name, t in weights.items()} == {n: t.tolist() for n, t in (FIRST | SECOND).items()}


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "..", ""])
def test_shards_outside_the_folder_are_not_opened(file, tmp_path):
    (tmp_path / "folder").mkdir()
    save_file(FIRST, tmp_path / "outside.safetensors")
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": file}}))
    with pytest.raises(TeacherError, match="names a file outside its folder"):
        read_weights(index)


def test_shards_that_lack_something_say_what(tmp_path):
    index = write_shards(tmp_path)
    save_file({"b.weight": torch.zeros(4)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(TeacherError, match=r"lacks b.bias, which model.safetensors.index.json says it holds"):
        read_weights(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"1 of its 2 files are missing, the first model-00002-of-00002"):
        read_weights(index)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "{broken", "[" * 100_000])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(TeacherError, match=r"not an index of shards|JSON text|names no tensors"):
        read_weights(tmp_path)


def test_a_folder_is_read_if_it_has_one_file_that_can_be_weights(tmp_path):
    with pytest.raises(TeacherError, match="a folder without a file of weights"):
        read_weights(tmp_path)
    torch.save(FIRST, tmp_path / "epoch3.ckpt")
    (tmp_path / "notes.txt").write_text("x")
    assert list(read_weights(tmp_path)) == ["a.weight"]
    torch.save(FIRST, tmp_path / "epoch4.ckpt")
    with pytest.raises(TeacherError, match=r"several files \(epoch3.ckpt, epoch4.ckpt\). Name one"):
        read_weights(tmp_path)
    save_file(SECOND, tmp_path / "model.safetensors")
    assert set(read_weights(tmp_path)) == set(SECOND), "the usual name is taken before others"


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(FIRST, tmp_path / "w.safetensors")
    assert list(read_weights("~/w.safetensors")) == ["a.weight"]


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 86\n",
            "a Git LFS pointer of 65 bytes.*git lfs pull",
        ),
        (
            "<!DOCTYPE html>\n<html><title>Sign in</title>",
            "a web page .*<!DOCTYPE html> <html>.*download",
        ),
        ("\n  <html>404</html>", "a web page"),
        ("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page .*AccessD"),
        ('{"error": "Access to model is restricted"}', "JSON text .*restricted"),
        ('\ufeff{"weight_map": {}}', r"JSON text .* must be called \*.index.json"),
    ],
)
def test_what_is_no_weights_is_named(content, message, suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content.encode())
    with pytest.raises(TeacherError, match=message):
        read_weights(path)


def test_a_name_of_safetensors_says_nothing_about_what_a_file_is(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(2)}, path)
    assert torch.equal(read_weights(path)["a"], torch.ones(2))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no weights")
    with pytest.raises(TeacherError, match="neither a safetensors nor a torch file"):
        read_weights(path)
    path.write_bytes(b"")
    with pytest.raises(TeacherError, match="an empty file"):
        read_weights(path)


def test_a_header_whose_length_looks_like_json_is_still_safetensors(tmp_path):
    # The first byte of a safetensors file is the low byte of a length, and 0x7b is a brace.
    for pad in range(256):
        save_file(FIRST, tmp_path / "w.safetensors", metadata={"pad": "x" * pad})
        if (tmp_path / "w.safetensors").read_bytes()[:1] == b"{":
            break
    else:
        save_file(FIRST, tmp_path / "w.safetensors")
        data = (tmp_path / "w.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        longer = length + (0x7B - length) % 256
        padded = longer.to_bytes(8, "little") + data[8 : 8 + length].ljust(longer) + data[8 + length :]
        (tmp_path / "w.safetensors").write_bytes(padded)
    assert list(read_weights(tmp_path / "w.safetensors")) == ["a.weight"]


def defaults() -> defaultdict:
    losses: defaultdict[str, list[float]] = defaultdict(list)
    losses["train"].append(0.5)
    return losses


PLAIN = {
    "arguments": argparse.Namespace(lr=0.1, data=pathlib.Path("tars")),
    "namespace": types.SimpleNamespace(lr=0.1),
    "path": pathlib.Path("tars"),
    "windows path": pathlib.PureWindowsPath("C:\\tars"),
    "numpy scalar": np.float64(0.5),
    "numpy integer": np.int64(3),
    "numpy truth": np.bool_(True),
    "numpy text": np.str_("best"),
    "numpy type": np.dtype("f4"),
    "numpy array": np.arange(4),
    "numpy generator": np.random.get_state(),
    "generator": random.getstate(),
    "ordered": OrderedDict(epoch=3),
    "default": defaults(),
    "counts": Counter("abc"),
    "sets": ({1, 2}, frozenset([3])),
    "torch": (torch.float16, torch.device("cpu"), torch.Size([2]), torch.__version__),
}


@pytest.mark.parametrize("new_style", [True, False])
@pytest.mark.parametrize("beside", PLAIN)
def test_plain_things_beside_tensors_do_no_harm(beside, new_style, tmp_path):
    torch.save({"model": FIRST, "beside": PLAIN[beside]}, tmp_path / "w.pth", _use_new_zipfile_serialization=new_style)
    assert list(read_weights(tmp_path / "w.pth")) == ["model.a.weight"]


def test_lightnings_hyperparameters_are_read_without_lightning(tmp_path, monkeypatch):
    name = "pytorch_lightning.utilities.parsing"
    module = types.ModuleType(name)
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": name})
    with monkeypatch.context() as while_saving:
        for parent in ("pytorch_lightning", "pytorch_lightning.utilities"):
            while_saving.setitem(sys.modules, parent, types.ModuleType(parent))
        while_saving.setitem(sys.modules, name, module)
        torch.save({"state_dict": FIRST, "hyper_parameters": module.AttributeDict(lr=0.1)}, tmp_path / "w.ckpt")
    assert list(read_weights(tmp_path / "w.ckpt")) == ["state_dict.a.weight"]


class Caller:
    """Calls something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.mkdir, ("bang",)),
        (pathlib.Path.touch, (pathlib.Path("bang"),)),
        (eval, ("open('bang', 'w')",)),
        (np.save, ("bang", [1])),
        (np.load, ("bang.npy", None, True)),
        (getattr, (pathlib.Path("bang"), "mkdir")),
    ],
)
def test_what_may_be_made_is_not_what_may_be_called(function, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": FIRST, "beside": Caller(function, *arguments)}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"holds pickled Python objects beside tensors \(.*it was not read"):
        read_weights(tmp_path / "w.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_arrays_of_objects_are_refused(tmp_path):
    torch.save({"model": FIRST, "beside": np.array([None, {}], dtype=object)}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match="pickled Python objects"):
        read_weights(tmp_path / "w.pth")


def test_dicts_within_dicts_have_dotted_names_and_optimizers_are_left_out(tmp_path):
    nested = {"a": {"b": {"c": torch.zeros(1)}}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}, "epoch": 3}
    torch.save(nested, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["a.b.c"]


def test_a_dict_that_holds_itself_ends(tmp_path):
    endless: dict[str, object] = {"w": torch.zeros(1)}
    endless |= {f"again{number}": endless for number in range(20)}
    torch.save(endless, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["w"]


def test_two_tensors_of_one_name_are_refused(tmp_path):
    torch.save({"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"two tensors are called a\.b"):
        read_weights(tmp_path / "w.pth")


def test_a_file_without_tensors_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "config": {"lr": 0.1}}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"no tensors found. The file holds epoch \(int\), config \(dict\)"):
        read_weights(tmp_path / "w.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(TeacherError, match="one list, expected a dict of tensors"):
        read_weights(tmp_path / "list.pth")
