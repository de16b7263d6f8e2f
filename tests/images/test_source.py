"""Tars in, an index out: every way a tar can be wrong is a sentence or a recorded problem, never a silent loss."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from made_store import build
from made_tars import encoded, member, picture, sample, write_tar
from PIL import Image, ImageDraw

from atcache.errors import BadImageError, SourceError
from atcache.files.ranges import LocalFile
from atcache.images.decode import decode_image
from atcache.images.source import SampleIndex, Source, index_source, relocate
from atcache.images.tar_headers import read_members
from atcache.images.tar_samples import Problem
from atcache.images.tars import expand_tars

# Indexing


def test_every_row_points_at_the_bytes_webdataset_reads(digits_tars):
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    index = index_source(digits_tars)
    source = Source(index)
    row = 0
    for path in digits_tars:
        with path.open("rb") as file:
            for expected in group_by_keys({**found, "__url__": path.name} for found in tar_file_iterator(file)):
                assert index.keys_S[row].decode() == expected["__key__"]
                assert index.sample_key(row) == f"{path.name}/{expected['__key__']}"
                assert source.read_bytes(row) == expected["png"]
                assert index.label_S[row] == int(expected["cls"])
                row += 1
    assert index.num_samples == row == 48
    assert index.label_S.max() == 9
    assert not index.problem_S.any()


NAMES = st.text("abä_-", min_size=1, max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    members=st.lists(
        st.tuples(
            st.lists(NAMES, min_size=1, max_size=12),
            st.integers(0, 1600),
            st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.AREGTYPE]),
            st.floats(0, 1e9),
        ),
        max_size=6,
    ),
)
def test_headers_read_as_tarfile_reads_them(tmp_path, format, members):
    entries = []
    for parts, size, kind, mtime in members:
        data = os.urandom(size) if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else b""
        entries.append(member("/".join(parts) + ".png", data, type=kind, mtime=mtime, linkname="target"))
    path = tmp_path / "any.tar"
    try:
        write_tar(path, entries, format)
    except ValueError:  # ustar holds no such name
        return
    with tarfile.open(path, "r:") as tar:
        expected = [(info.name.encode(), info.offset_data, info.size) for info in tar if info.isreg()]
    assert [tuple(found[:3]) for found in read_members(path, LocalFile(path))] == expected


def test_huge_sizes_in_base_256_are_understood(tmp_path):
    info = tarfile.TarInfo("big.png")
    info.size = 9 << 30
    path = tmp_path / "big.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(
        SourceError, match=f"truncated: .* ends at byte {512 + (9 << 30)}, but .* has 1536 bytes.*'big'"
    ):
        index_source(path)


def test_keys_end_at_the_first_dot_of_the_basename(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [member("d.0/a.PNG", b"x"), member("d.0/a.cls", b"1"), member("d.0/.hidden.png", b"y"), member("d.0/b", b"z")],
    )
    index = index_source(path)
    assert index.keys_S.tolist() == [b"d.0/a"]
    dotted = write_tar(tmp_path / "b.tar", [member("val.00001.JPEG", b"x"), member("val.00001.cls", b"1")])
    with pytest.raises(
        SourceError, match=r"key 'val' has no image: its extensions are 00001\.cls, 00001\.jpeg.*first dot"
    ):
        index_source(dotted)


def test_fingerprint_ignores_folders_and_sees_every_change(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    members = [*sample("x", 1), *sample("y", 2)]
    first = index_source(write_tar(tmp_path / "a" / "t.tar", members))
    moved = index_source(write_tar(tmp_path / "b" / "t.tar", members))
    assert first.fingerprint == moved.fingerprint
    relabelled = index_source(write_tar(tmp_path / "b" / "t.tar", [member("x.cls", b"3"), *members[1:]]))
    renamed = index_source(write_tar(tmp_path / "b" / "u.tar", members))
    assert len({first.fingerprint, relabelled.fingerprint, renamed.fingerprint}) == 3


BAD = {
    "no image": ([member("bad.cls", b"1")], Problem.NO_IMAGE, "has no image"),
    "empty image": ([member("bad.cls", b"1"), member("bad.png")], Problem.NO_IMAGE, "image of 0 bytes"),
    "image is a link": (
        [member("bad.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("bad.cls", b"1")],
        Problem.NO_IMAGE,
        "has no image",
    ),
    "no label": ([member("bad.png", b"x")], Problem.NO_LABEL, "has no label"),
    "label is a word": ([member("bad.cls", b"cat"), member("bad.png", b"x")], Problem.NO_LABEL, "the label 'cat'"),
    "label is negative": ([member("bad.cls", b"-1"), member("bad.png", b"x")], Problem.NO_LABEL, "the label '-1'"),
    "label is long": ([member("bad.cls", b"1" * 65), member("bad.png", b"x")], Problem.NO_LABEL, "the label '1+'"),
    "label is huge": ([member("bad.cls", b"9999999999"), member("bad.png", b"x")], Problem.NO_LABEL, "integer"),
    "two images": (
        [member("bad.png", b"x"), member("bad.jpg", b"y"), member("bad.cls", b"1")],
        Problem.DUPLICATE_KEY,
        "two images",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_named_or_recorded(tmp_path, name):
    members, problem, message = BAD[name]
    path = write_tar(tmp_path / "t.tar", [*sample("a", 4), *members, *sample("z", 5)])
    with pytest.raises(SourceError, match=rf"t\.tar: key 'bad' .*{message}"):
        index_source(path)
    index = index_source(path, on_bad="skip")
    assert index.keys_S.tolist() == [b"a", b"bad", b"z"]
    assert index.problem_S.tolist() == [0, problem, 0]
    assert index.label_S[[0, 2]].tolist() == [4, 5]


def test_labels_can_be_left_out_but_not_be_wrong(tmp_path):
    path = write_tar(tmp_path / "t.tar", [member("a.png", b"x"), *sample("b", 3)])
    index = index_source(path, labels="optional")
    assert index.label_S.tolist() == [-1, 3]
    assert index.problem_S.tolist() == [0, 0]
    with pytest.raises(SourceError, match="the label 'x'"):
        index_source(write_tar(tmp_path / "t.tar", [member("a.cls", b"x"), member("a.png", b"x")]), labels="optional")


def test_a_key_that_comes_again_is_a_duplicate(tmp_path):
    path = write_tar(tmp_path / "t.tar", [*sample("a", 1), *sample("b", 2), *sample("a", 3)])
    with pytest.raises(SourceError, match=r"t\.tar: key 'a' occurs twice"):
        index_source(path)
    assert index_source(path, on_bad="skip").problem_S.tolist() == [0, 0, Problem.DUPLICATE_KEY]


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATCACHE_TEST_BOMB"],)


def test_pickled_members_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("ATCACHE_TEST_BOMB", str(tmp_path / "exploded"))
    payload = pickle.dumps(Bomb())
    image = encoded(picture())
    members = [member("x.pkl", payload), member("x.pth", payload), member("x.cls", b"1"), member("x.png", image)]
    source = Source(index_source(write_tar(tmp_path / "t.tar", members)))
    assert source.read_bytes(0) == image
    source.read_image(0)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(payload)  # the bomb is live
    assert (tmp_path / "exploded").exists()


def test_names_that_lead_outside_are_left_out(tmp_path):
    outside = [member("/etc/x.png", b"1"), member("../y.png", b"2"), member("a/../../z.png", b"3")]
    index = index_source(write_tar(tmp_path / "t.tar", [*outside, *sample("ok")]))
    assert index.keys_S.tolist() == [b"ok"]


def test_keys_are_bounded_and_utf8(tmp_path):
    long = write_tar(tmp_path / "t.tar", [member("k" * 513 + ".png", b"x")], tarfile.PAX_FORMAT)
    with pytest.raises(SourceError, match=r"a key has 513 bytes .*at most 512"):
        index_source(long, on_bad="skip")
    latin = write_tar(tmp_path / "u.tar", [member("k\udce4.png", b"x")], tarfile.GNU_FORMAT)
    with pytest.raises(SourceError, match="not UTF-8"):
        index_source(latin, on_bad="skip")


# Truncated and damaged tars


def test_every_cut_is_noticed_or_harmless(tmp_path):
    whole = write_tar(tmp_path / "t.tar", [*sample("a", 1, 700), *sample("b", 2, 512), *sample("c", 3, 5)])
    data, index = whole.read_bytes(), index_source(whole)
    end = max(index.offset_S[2] + 512, 0)
    for cut in range(0, len(data), 64):
        for length in {cut, cut + 1, cut + 63}:
            whole.write_bytes(data[:length])
            if length >= end + 512:  # an end block is left
                assert index_source(whole).keys_S.tolist() == index.keys_S.tolist()
                continue
            with pytest.raises(SourceError, match=r"truncated|not a tar"):
                index_source(whole)
            if length >= 512:
                skipped = index_source(whole, on_bad="skip")
                assert skipped.problem_S[-1] == Problem.TRUNCATED
                assert not skipped.problem_S[:-1].any()
                kept = skipped.num_samples - 1
                assert skipped.keys_S[:kept].tolist() == index.keys_S[:kept].tolist()
                assert skipped.offset_S[:kept].tolist() == index.offset_S[:kept].tolist()


def test_damaged_headers_joined_tars_and_zero_filled_downloads_are_noticed(tmp_path):
    path = write_tar(tmp_path / "t.tar", [*sample("a"), *sample("b")])
    data = path.read_bytes()
    broken = bytearray(data)
    broken[1024 + 700 // 512 * 512 + 512 + 5] ^= 1
    path.write_bytes(data + data)
    with pytest.raises(SourceError, match=r"bytes follow the end block.*joined"):
        index_source(path)
    path.write_bytes(data[:1024] + bytes(2 << 20))
    with pytest.raises(SourceError, match=r"bytes follow the end block"):
        index_source(path)
    second_header = 1024
    broken = bytearray(data)
    broken[second_header + 3] ^= 1
    path.write_bytes(broken)
    with pytest.raises(SourceError, match=f"damaged at byte {second_header}: .*checksum is wrong.*last key is 'a'"):
        index_source(path)
    path.write_bytes(os.urandom(4096))
    with pytest.raises(SourceError, match="not a tar file"):
        index_source(path, on_bad="skip")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 5 * 1024), value=st.integers(0, 255), format=st.sampled_from([1, 2]))
def test_any_changed_byte_gives_an_index_or_a_source_error(tmp_path, position, value, format):
    path = write_tar(tmp_path / "t.tar", [*sample("a" * 120), *sample("b")], format)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        index = index_source(path, on_bad="skip")
    except SourceError:
        return
    assert (index.offset_S + index.nbytes_S <= len(data)).all()


# Naming tars


def test_tars_can_be_named_in_every_way(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"t-{number:02d}.tar", sample("a")) for number in range(3)]
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "._t-00.tar").write_bytes(b"what macOS makes")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    expected = [path.name for path in paths]
    for data in (tmp_path, "~", "t-{00..02}.tar", "~/t-{00..02}.tar", "t-*.tar", paths, "t-0{0,1,2}.tar", Path("~")):
        assert [path.name for path in expand_tars(data)] == expected
    assert [path.name for path in expand_tars(str(paths[1]))] == ["t-01.tar"]


def test_braces_stand_with_stars_and_folders_too(tmp_path, monkeypatch):
    for name in ("a-0", "a-1", "b-0", "c-0", "x/d-0", "y/e-0", "y/e-1", "{f}-0", "g\\-0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / f"{name}.tar", sample("k"))
    monkeypatch.chdir(tmp_path)
    for data, expected in (
        ("{b,a}-*.tar", ["b-0", "a-0", "a-1"]),
        ("{c-0,a-*}.tar", ["c-0", "a-0", "a-1"]),
        ("{x,y}/*-0.tar", ["d-0", "e-0"]),
        ("{y,x}", ["e-0", "e-1", "d-0"]),
        ("{f}-*.tar", ["{f}-0"]),
        ("{f}-0.tar", ["{f}-0"]),
        ("g\\-*.tar", ["g\\-0"]),
    ):
        assert [path.stem for path in expand_tars(data)] == expected
    with pytest.raises(SourceError, match=r"1 of the 3 tars of .* are missing, the first is .*v-\*\.tar"):
        expand_tars("{a,v}-*.tar")


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path):
    write_tar(tmp_path / "t-00.tar", sample("a"))
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "t-00.tar", sample("a"))
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for split in ("train", "val"):
        (tmp_path / "sets" / split).mkdir(parents=True)
        write_tar(tmp_path / "sets" / split / f"{split}-0.tar", sample("a"))
    build(tmp_path / "c.zarr")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    (tmp_path / "x.txt").write_bytes(b"")
    (tmp_path / "y.png").write_bytes(b"")
    for data, message in (
        (tmp_path / "t-{00..04}.tar", r"4 of the 5 tars of .* are missing, the first is .*t-01\.tar"),
        (tmp_path / "v-{00..04}.tar", "matches no file"),
        (tmp_path / "v-*.tar", "matches no file"),
        (tmp_path / "t-{00..04.tar", "unbalanced braces"),
        (tmp_path / "t-{0..99999999}.tar", "stands for 100000000 tars, expected at most 1000000"),
        ([tmp_path / "t-00.tar", tmp_path / "other" / "t-00.tar"], r"two tars are called t-00\.tar"),
        ("pipe:curl http://x/y.tar", "cannot be read: expected a path, or a URL"),
        ("https://x/tars", "is not a .tar, and a web server cannot list a folder"),
        (tmp_path / "x.tar.gz", "is compressed. Decompress it first"),
        (tmp_path / "x.txt", "is not a .tar file"),
        (tmp_path / "y.png", "is an image. To make tars, run `atcache pack`"),
        (tmp_path / "images", "looks like an image folder. Run `atcache pack"),
        (tmp_path / "empty", "holds no tars"),
        (tmp_path / "sets", "sets holds no tars itself, but folders in it do. Give .*sets/train or .*sets/val"),
        (tmp_path / "c.zarr", "c.zarr is a cache, and tars are expected here. Name the tars that it was made from"),
        ([], "no tars were given"),
    ):
        with pytest.raises(SourceError, match=message):
            expand_tars(data if isinstance(data, list) else str(data))


def test_compressed_and_empty_tars_are_named(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w:gz") as tar:
        tar.addfile(*[member("a.png", b"x")[0], io.BytesIO(b"x")])
    with pytest.raises(SourceError, match="is compressed"):
        index_source(tmp_path / "t.tar")
    write_tar(tmp_path / "t.tar", [])
    with pytest.raises(SourceError, match="holds no samples"):
        index_source(tmp_path / "t.tar")


def test_an_index_follows_its_tars_but_only_the_same_ones(tmp_path):
    (tmp_path / "new").mkdir()
    paths = [write_tar(tmp_path / f"t-{number}.tar", sample("a")) for number in range(2)]
    index = index_source(paths)
    for path in paths:
        path.rename(tmp_path / "new" / path.name)
    moved = relocate(index, tmp_path / "new")
    assert moved.tars == tuple(tmp_path / "new" / path.name for path in paths)
    assert moved.fingerprint == index.fingerprint
    assert len(Source(moved).read_bytes(1)) == 700
    (tmp_path / "new" / "t-0.tar").unlink()
    write_tar(tmp_path / "new" / "t-1.tar", [*sample("a"), *sample("b", size=20000)])
    with pytest.raises(SourceError, match=r"t-0\.tar is missing, t-1\.tar has \d+ bytes instead of 10240"):
        relocate(index, tmp_path / "new")


# Reading


def test_a_changed_tar_is_noticed_before_it_is_read(tmp_path):
    path = write_tar(tmp_path / "t.tar", sample("a"))
    index = index_source(path)
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(SourceError, match="has changed: it has 10752 bytes, but had 10240 when it was indexed"):
        Source(index).read_bytes(0)
    path.unlink()
    with pytest.raises(SourceError, match="cannot be opened"):
        Source(index).read_bytes(0)


def test_a_source_works_in_forks_threads_and_after_pickling(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    # More tars than may be open at a time.
    paths = [write_tar(tmp_path / f"t-{number:03d}.tar", sample("a", number)) for number in range(80)]
    source = Source(index_source(paths))
    expected = [source.read_bytes(row) for row in range(80)]
    copy = pickle.loads(pickle.dumps(source))
    rows = [int(row) for row in np.random.default_rng(0).integers(0, 80, 2000)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.read_bytes, rows)) == [expected[row] for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons on forking
        child = os.fork()
    if child == 0:
        os._exit(0 if all(source.read_bytes(row) == expected[row] for row in range(80)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_index_pointing_outside_its_tar_is_refused(tmp_path):
    good = index_source(write_tar(tmp_path / "t.tar", sample("a")))
    fields = {name: getattr(good, name) for name in SampleIndex.__dataclass_fields__}
    hostile = SampleIndex(**{**fields, "nbytes_S": np.array([1 << 60])})
    with pytest.raises(SourceError, match="points outside the tar"):
        Source(hostile).read_bytes(0)


def test_a_bad_image_is_named_by_tar_and_key(tmp_path):
    path = write_tar(tmp_path / "t.tar", [member("k/a.png", encoded(picture())[:-60]), member("k/a.cls", b"0")])
    with pytest.raises(BadImageError, match=r"t\.tar: key 'k/a': the image cannot be decoded"):
        Source(index_source(path)).read_image(0)
    missing = write_tar(tmp_path / "u.tar", [member("b.cls", b"0")])
    with pytest.raises(BadImageError, match=r"u\.tar: key 'b' has no image to read \(NO_IMAGE\)"):
        Source(index_source(missing, on_bad="skip")).read_bytes(0)


# Decoding


def test_decoding_agrees_with_plain_pillow():
    grey, colour = picture().convert("L"), picture(size=(40, 30))
    palette = colour.quantize(16)
    files = [
        *(encoded(colour, format) for format in ("PNG", "JPEG", "WEBP", "PPM", "BMP")),
        encoded(colour, "JPEG", progressive=True),
        encoded(colour.convert("CMYK"), "JPEG"),
        *(encoded(grey, format) for format in ("PNG", "JPEG", "PPM", "BMP")),
        encoded(palette),
        encoded(palette, transparency=3),
        encoded(colour.convert("RGBA")),
        encoded(grey.convert("LA")),
        encoded(grey.convert("1")),
    ]
    for data in files:
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        found = decode_image(data, where="x")
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_palettes_with_partial_transparency_do_not_warn():
    data = encoded(picture().quantize(8), transparency=bytes(range(0, 160, 20)))
    assert decode_image(data, where="x").mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values)), where="x"))
    assert np.array_equal(decoded[..., 0], np.arange(256).reshape(16, 16))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_exif_neither_turns_nor_warns():
    image = picture(size=(40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    plain = np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG"))))
    data = encoded(image, "JPEG", exif=exif)
    assert np.array_equal(np.asarray(decode_image(data, where="x")), plain)
    damaged = data.replace(exif.tobytes()[6:], b"II*\0\xff\xff" + b"\xff" * (len(exif.tobytes()) - 12))
    assert damaged != data
    assert np.array_equal(np.asarray(decode_image(damaged, where="x")), plain)
    start = damaged.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(damaged[start + 2 : start + 4], "big")
    segment = damaged[start:end]
    for several in (segment + segment, b"\xff\xff" + segment):  # fill bytes may stand before a marker
        odd = damaged[:start] + several + damaged[end:]
        assert np.array_equal(np.asarray(decode_image(odd, where="x")), plain)


def test_an_image_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    member = tarfile.TarInfo("a.jpg")
    member.size = 64 * 2**30
    with (tmp_path / "sparse.tar").open("wb") as file:
        file.write(member.tobuf())
        file.truncate(file.tell() + member.size)
        file.seek(0, os.SEEK_END)
        file.write(bytes(1024))
    source = Source(index_source(str(tmp_path / "sparse.tar"), labels="none"))
    with pytest.raises(
        BadImageError, match=r"key 'a': the image has 68\.7 GB, expected at most 268 MB\. Make it smaller"
    ):
        source.read_bytes(0)


def test_truncated_images_are_errors():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("PNG", "JPEG", "WEBP", "PPM", "BMP"):
        data = encoded(noise, format)
        for length in range(0, len(data) - 64, len(data) // 12):
            with pytest.raises(BadImageError, match="thing"):
                decode_image(data[:length], where="thing")


def test_decompression_bombs_are_refused_without_a_warning():
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = b"\x89PNG\r\n\x1a\n" + chunk + encoded(picture())[33:]
    with pytest.raises(BadImageError, match="bomb: the image has 20000 x 20000 pixels, expected at most 89478485"):
        decode_image(data, where="bomb")


@pytest.mark.parametrize("size", [(2**25, 2), (2, 2**25)])
def test_images_too_long_for_a_view_are_refused(size):
    data = f"P5 {size[0]} {size[1]} 255\n".encode()
    with pytest.raises(BadImageError, match=rf"x: the image has {size[0]} x {size[1]} pixels, .* most 33554431 a side"):
        decode_image(data, where="x")


def test_other_formats_are_refused():
    image = picture()
    ImageDraw.Draw(image)
    for data in (encoded(image, "TIFF"), encoded(image, "GIF"), b"%!PS-Adobe", b"", b"Pf\n1 1\n-1\n\0\0\0\0"):
        with pytest.raises(BadImageError, match="not a JPEG, PNG, WebP, PPM or BMP image"):
            decode_image(data, where="x")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_images_decode_or_are_bad_images(data):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "PPM", "BMP"]))
    file = bytearray(encoded(picture(), format))
    for _ in range(data.draw(st.integers(1, 5))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadImageError):
        assert decode_image(bytes(file), where="x").mode == "RGB"


def test_importing_the_source_loads_neither_torch_nor_webdataset():
    code = "import sys, atcache.images.source\n"
    code += "print([m for m in ('torch', 'webdataset', 'PIL', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_too_little_memory_says_nothing_about_an_image():
    program = """
import io, resource
import numpy
from PIL import Image
from atcache.images.decode import decode_image
encoded = io.BytesIO()
Image.new("RGB", (8000, 8000)).save(encoded, "PNG")
used = 1024 * int(open("/proc/self/status").read().partition("VmSize:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, used + 2**20))
try:
    decode_image(encoded.getvalue(), where="x")
except MemoryError:
    print("no memory")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "no memory\n", done.stderr
