"""What a cache says of itself: read and written without loss; a member that cannot be used is named, first of all."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import atcache
from atcache.cache.record import CacheRecord
from atcache.cli.main import cli
from atcache.errors import AtcacheError, CorruptCacheError
from atcache.store.layout import StoreLayout
from atcache.store.metadata import load_root, seal
from atcache.store.reader import CacheReader

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("format-*/*.zarr"))
OF_THE_STORE = ("format", "layout", "crc32")
"""What the store itself writes and judges. It also writes `complete`, which the record reads."""
WRONG: dict[str, Any] = {
    "text": "much",
    "list": [],
    "object": {},
    "null": None,
    "negative": -1,
    "NaN": math.nan,
    "huge": 10**30,
    "infinite": math.inf,
}
OPTIONAL = {
    ("calibration", "decode_operations"),
    ("calibration", "layers"),
    ("calibration", "num_held_back"),
    ("calibration", "v_error"),
    *((("calibration", "layers", number, "v_error")) for number in (0, 1)),
    ("complete", "num_checked"),
    ("source", "choice"),
}
"""What caches of the first versions lack."""
UNFINISHED = {("complete",)}
"""Without which a cache is one whose build goes on."""
LIBRARIES, QUALITY = ("created_by", "views"), ("complete", "quality")
"""Objects whose members a build names: whatever it measured, and whichever libraries made its pixels."""


def attributes_of(path: Path) -> dict[str, Any]:
    return load_root(path)["attributes"]["atcache"]


def layout_of(attributes: dict[str, Any]) -> StoreLayout:
    return StoreLayout.from_json(attributes["layout"])


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every member, and of those of objects within."""
    members = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in members:
        if isinstance(tree, dict):
            yield (*above, name)
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from places(value, (*above, name))


def at(tree: Any, place: tuple[Any, ...]) -> Any:
    for name in place:
        tree = tree[name]
    return tree


def damages(attributes: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], str, dict[str, Any]]]:
    """Each member's place, what is done to it, and the attributes after that: deleted, or a value it cannot be."""
    for place in places({name: value for name, value in attributes.items() if name != "crc32"}):
        damaged = copy.deepcopy(attributes)
        del at(damaged, place[:-1])[place[-1]]
        yield place, "deleted", damaged
        for name, value in WRONG.items():
            if type(value) is str and type(at(attributes, place)) is str:
                continue  # another text is no damage that can be seen
            damaged = copy.deepcopy(attributes)
            at(damaged, place[:-1])[place[-1]] = value
            yield place, name, damaged


def write_attributes(path: Path, attributes: dict[str, Any], *, sealed: bool = True) -> None:
    """As `load_root` reads them; with their checksum, where JSON has one for them."""
    root = load_root(path)
    try:
        ours = seal(attributes) if sealed else attributes
    except ValueError:  # NaN
        ours = attributes
    root["attributes"]["atcache"] = ours
    (path / "zarr.json").write_text(json.dumps(root))


def run(*arguments: object) -> Result:
    """A command in this process; anything but an AtcacheError keeps its traceback and fails the test."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def names(message: str, path: Path, place: tuple[Any, ...]) -> bool:
    """Whether a message names the file, and the member or an object that it stands in."""
    above = [place[:depth] for depth in range(1, len(place) + 1)]
    is_named = any(f'"{".".join(map(str, one))}' in message for one in above)
    return f"{path}/zarr.json" in message and (is_named or (place[0] in ("layout", "codec") and place[0] in message))


@pytest.fixture(scope="module")
def original(tiny_cache) -> Path:
    """A cache with every member there is: mixed views, a fitted codec."""
    return tiny_cache(codec="transform", policy="crop-flip", mixup=0.8, views=2)


@pytest.fixture
def path(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "damaged.zarr"))


# Read and written without loss


def without_nulls_of_v(tree: Any) -> Any:
    """The first versions left `v_error` out where v is not stored; now it is null."""
    if isinstance(tree, dict):
        return {name: without_nulls_of_v(value) for name, value in tree.items() if (name, value) != ("v_error", None)}
    return [without_nulls_of_v(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_golden_caches_are_read_without_loss(path):
    attributes = attributes_of(path)
    record = CacheRecord.from_attributes(attributes, layout_of(attributes), path)
    expected = {name: value for name, value in attributes.items() if name not in OF_THE_STORE}
    assert without_nulls_of_v(record.to_json()) == without_nulls_of_v(expected)
    assert CacheRecord.from_attributes({**attributes, **record.to_json()}, layout_of(attributes), path) == record


@pytest.mark.parametrize(
    "fields",
    [
        {"codec": "transform", "policy": "crop-flip", "mixup": 0.8, "views": 2},
        {"codec": "int8", "store": "v"},
        {"codec": "int8", "store": "x"},
        {"codec": "int8", "pixels": "store"},
        {"layers": "1", "heads": "1"},
        {"codec": "logmap"},
        {"codec": None, "queries": "cls"},
    ],
    ids=["mixed", "v", "x", "pixels", "part", "logmap", "rows"],
)
def test_what_a_build_writes_is_the_record_byte_for_byte(tiny_cache, fields):
    path = tiny_cache(**fields)
    attributes = attributes_of(path)
    record = CacheRecord.from_attributes(attributes, layout_of(attributes), path)
    of_the_store = {name: attributes[name] for name in ("format", "layout")}
    assert {**of_the_store, **record.to_json()} == {
        name: value for name, value in attributes.items() if name != "crc32"
    }
    # The seal is of the bytes: a whole number that became 1.0 would be equal, and another text.
    assert seal({**of_the_store, **record.to_json()})["crc32"] == attributes["crc32"]


def test_an_unfinished_cache_has_no_totals(path):
    write_attributes(path, {**attributes_of(path), "complete": None})
    record = CacheRecord.of(CacheReader(path))
    assert record.complete is None
    assert "complete" not in record.to_json()


def test_members_that_only_inform_may_be_added_by_later_versions(path):
    attributes = attributes_of(path)
    before = CacheRecord.of(CacheReader(path))
    write_attributes(path, {**attributes, "mood": 1, "created_by": {**attributes["created_by"], "cuda": "13"}})
    assert CacheRecord.of(CacheReader(path)) == before


@pytest.mark.parametrize("place", [("geometry",), ("geometry", "tokens"), ("views", "policy"), ("codec",)])
def test_an_unknown_member_that_may_change_the_maps_is_refused(path, place):
    attributes = attributes_of(path)
    at(attributes, place)["twist"] = 2
    write_attributes(path, attributes)
    with pytest.raises(CorruptCacheError, match=r"zarr\.json: .*twist.* Use the version that wrote "):
        atcache.open(path).maps(0)[0, 0].compute()


# Damaged members


def test_every_damaged_member_is_refused_or_changes_nothing_else(original, path):
    """Opening, describing and decoding: the record is the same but for the member, and so are the maps."""
    attributes, whole = attributes_of(original), atcache.open(original)
    attn_VHQK = whole.maps(1)[:, 0].compute()
    refused: dict[tuple[tuple[Any, ...], str], str] = {}
    for place, damage, damaged in damages(attributes):
        write_attributes(path, damaged)
        try:
            cache = atcache.open(path)
            cache.describe()
            decoded = cache.maps(1)[:, 0].compute()
        except AtcacheError as error:
            refused[place, damage] = str(error)
            continue
        assert np.array_equal(decoded, attn_VHQK, equal_nan=True), (place, damage)
        of_the_record = cache.record.to_json()
        for other in places({name: value for name, value in attributes.items() if name not in OF_THE_STORE}):
            if other[: len(place)] != place and place[: len(other)] != other:
                assert at(of_the_record, other) == at(attributes, other), (place, damage, other)
    for (place, damage), message in refused.items():
        assert "\n" not in message
        assert place == ("format",) or names(message, path, place), (place, damage, message)
    members = set(places({name: value for name, value in attributes.items() if name != "crc32"}))
    deleted = {place for place, damage in refused if damage == "deleted"}
    named_by_builds = {place for place in members if place[:-1] in (LIBRARIES, QUALITY)}
    assert members - deleted == OPTIONAL | UNFINISHED | named_by_builds
    # What stands there is judged also where it may be missing.
    assert {place for place, damage in refused if damage == "NaN"} == members
    assert {place for place, damage in refused if damage == "object"} == members - {LIBRARIES, QUALITY}


def test_info_names_every_damaged_member(original, path):
    for place, damage, damaged in damages(attributes_of(original)):
        if damage not in ("deleted", "text", "negative"):
            continue
        write_attributes(path, damaged)
        result = run("info", path)
        if result.exit_code:
            assert place == ("format",) or names(result.stderr, path, place), (place, damage, result.stderr)
        else:
            assert result.stdout.startswith("cache "), (place, damage)


def test_commands_name_a_damaged_member_before_they_load_a_model(original, path, tiny_vit, digits_tars, tmp_path):
    """The weights that they are given do not exist: who gets as far says so."""
    weights = ("--weights", tmp_path / "nothing.safetensors")
    build_as = ("--codec", "transform", "--policy", "crop-flip", "--mixup", 0.8, "--views", 2, "--precision", "fp32")
    commands = {
        "train": ("--mode", "copy", "--cache", path, "--out", tmp_path / "run", "--live-teacher", *weights),
        "eval": (tmp_path / "nothing", "--cache", path, "--live-teacher", *weights),
        "verify": (path, "--teacher", tiny_vit, *weights),
        "build": ("--teacher", tiny_vit, "--data", digits_tars[0].parent, "--out", path, *weights, *build_as),
    }
    for place, damage, damaged in damages(attributes_of(original)):
        if damage not in ("deleted", "object") or place[0] == "format":
            continue
        write_attributes(path, damaged)
        try:
            CacheRecord.of(CacheReader(path))
            is_refused = False
        except AtcacheError:
            is_refused = True
        # Deletions under every command, what is wrong under one, in turn.
        for name in commands if damage == "deleted" else list(commands)[len(str(place)) % 4 :][:1]:
            result = run(name, *commands[name])
            assert result.exit_code == 1, (name, place, damage, result.output)
            if is_refused:
                assert names(result.stderr, path, place), (name, place, damage, result.stderr)
            elif place[0] != "codec":
                assert "nothing" in result.stderr, (name, place, damage, result.stderr)


def test_a_validation_cache_is_judged_before_a_model_is_loaded(original, path, tmp_path):
    attributes = attributes_of(path)
    del attributes["created_by"]
    write_attributes(path, attributes)
    training = ("--mode", "copy", "--cache", original, "--live-teacher", "--weights", tmp_path / "nothing.safetensors")
    result = run("train", *training, "--val-cache", path, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert 'damaged.zarr/zarr.json has no "created_by"' in result.stderr


def test_a_cache_that_lacks_what_the_first_versions_lacked_serves_every_command(
    tiny_cache, tiny_vit, tiny_weights, digits_tars, tmp_path
):
    path = Path(shutil.copytree(tiny_cache(policy="eval", pixels="store"), tmp_path / "old.zarr"))
    attributes = attributes_of(path)
    for part, name in (place for place in OPTIONAL if len(place) == 2):
        attributes[part].pop(name, None)
    write_attributes(path, attributes)
    place = ("--device", "cpu", "--precision", "fp32")
    training = ("--mode", "copy", "--cache", path, "--steps", 2, "--batch-size", 24, "--val-cache", path)
    build_as = ("--policy", "eval", "--pixels", "store", "--codec", "exact", "--workers", 0)
    teacher = ("--teacher", tiny_vit, "--weights", tiny_weights)
    for arguments in (
        ("info", path),
        ("train", *training, "--out", tmp_path / "run", *place),
        ("eval", tmp_path / "run", "--cache", path, *place),
        ("build", *teacher, "--data", digits_tars[0].parent, "--out", path, *build_as, *place),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    result = run("verify", path, *teacher, "--device", "cpu")
    # The totals are not those of the commit records any more, which is all there is to find.
    assert "says None for num_checked" in result.stderr
    assert result.exit_code == 1


def test_a_member_that_changed_under_its_seal_is_found_by_verify(path):
    attributes = attributes_of(path)
    attributes["calibration"]["row_kl_nats"] /= 2
    write_attributes(path, attributes, sealed=False)
    result = run("verify", path, "--sample", 0)
    assert result.exit_code == 1
    assert f'{path}/zarr.json is damaged: the checksum of its "atcache" attributes does not match' in result.stderr


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("views", "num_views"), -1, r'zarr\.json: "views\.num_views" is -1, expected at least 1\. Restore'),
        (("views", "num_views"), 3, r'"views\.num_views" is 3, expected 2, as its layout says'),
        (("source", "num_samples"), 5, r'"source\.num_samples" is 5, expected 48, as its layout says'),
        (("views", "pixels"), "store", r"\"views\.pixels\" is 'store', expected 'replay', as its layout says"),
        (("geometry", "layers"), [1, 0], r'"geometry\.layers" is \[1, 0\], expected ascending whole numbers'),
        (("geometry", "num_kv_heads"), 3, r'"geometry\.num_kv_heads" is 3, expected a whole number that divides 2'),
        (("geometry", "scale"), math.nan, r'"geometry\.scale" is nan, expected a finite number'),
        (("geometry", "head_dim"), 2.0, r'"geometry\.head_dim" is 2\.0, expected a whole number'),
        (("geometry", "num_kv_heads"), True, r'"geometry\.num_kv_heads" is True, expected a whole number'),
        (("teacher", "precision"), "float64", r"\"teacher\.precision\" is 'float64', expected one of float32"),
        (("teacher", "input", "std"), [0.5, 0, 0.5], r'"teacher\.input\.std\[1\]" is 0, expected more than 0'),
        (("complete", "num_bad"), 7, r'"complete\.num_bad" is 7, expected 0, with 96 of 96 views stored'),
        (("complete", "codes_nbytes"), 0, r'"complete\.codes_nbytes" is 0, expected 1 to \d+, with 96 views st'),
        (("views", "policy", "spec"), 3, r'"views\.policy" cannot be used: views of spec 3 .* Use the version'),
        (("views", "policy", "mixing", "prob"), 2, r'"views\.policy\.mixing" cannot be used: mix_prob=2: expected'),
    ],
)  # fmt: skip
def test_the_sentence_says_what_was_found_and_what_was_expected(original, place, value, message):
    attributes = attributes_of(original)
    at(attributes, place[:-1])[place[-1]] = value
    with pytest.raises(CorruptCacheError, match=message):
        CacheRecord.from_attributes(attributes, layout_of(attributes), original)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ({"name": "wavelet"}, r"zarr\.json: \"codec\" cannot be used: codec 'wavelet' is unknown to this version"),
        ({"name": "transform", "dct": "no"}, r"dct='no', expected True or False"),
        ({"name": "exact"}, r'has no "codec\.dtype", which codec exact needs'),
        (
            {"name": "exact", "dtype": "float16"},
            r"by its codec and geometry, tokens of codes: 17, but its layout says 1; ",
        ),
    ],
)
def test_a_codec_that_cannot_be_made_or_does_not_fit_is_named(path, codec, message):
    write_attributes(path, {**attributes_of(path), "codec": codec})
    with pytest.raises(CorruptCacheError, match=message):
        atcache.open(path).maps(0)[0, 0].compute()


def test_another_grid_than_the_codec_was_fitted_to_is_refused(path):
    attributes = attributes_of(path)
    attributes["geometry"]["tokens"]["grid_width"] = 9
    write_attributes(path, attributes)
    with pytest.raises(CorruptCacheError, match=r"attention/state: .* of its state has shape .* expected"):
        atcache.open(path).maps(0)[0, 0].compute()
