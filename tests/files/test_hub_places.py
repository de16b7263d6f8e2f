"""Places on a hub: how they are written, read at one commit, and refused."""

from __future__ import annotations

import pytest
from dataset_hub import TOKEN, a_hub_in_use
from huggingface_hub import HfApi, constants

from atcache.errors import ConfigError, RemoteError
from atcache.files.location import Url, parse_location
from atcache.files.ranges import open_file, read_file
from atcache.files.remote import hub as asking
from atcache.files.remote.hub import ask_hub, pinned, served_at
from atcache.images.source import index_source

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with a_hub_in_use(tmp_path, monkeypatch) as hub:
        yield hub


def put(hub, **files):
    repository = hub.repositories.get("lab/maps") or hub.create("lab/maps")
    tree = dict(repository.commits[repository.heads["main"]])
    for name, data in files.items():
        tree[name] = hub.keep(data, is_lfs=len(data) > 100)
    return hub.add_commit(repository, "main", tree, "files")


@pytest.mark.parametrize(
    ("text", "repository", "revision", "key"),
    [
        ("hf://datasets/lab/maps", "lab/maps", "main", ""),
        ("hf://datasets/lab/maps/a/b c.zarr", "lab/maps", "main", "a/b c.zarr"),
        ("hf://datasets/lab/maps@v1.0/x", "lab/maps", "v1.0", "x"),
        ("hf://datasets/lab/maps@refs%2Fpr%2F1/x", "lab/maps", "refs/pr/1", "x"),
        (f"hf://datasets/lab/maps@{COMMIT}/x", "lab/maps", COMMIT, "x"),
    ],
)
def test_a_place_names_a_repository_a_revision_and_a_folder(text, repository, revision, key):
    place = parse_location(text)
    assert isinstance(place, Url)
    assert (place.repository, place.revision, place.key) == (repository, revision, key)
    assert (place.is_on_hub, place.can_list, place.is_pinned) == (True, False, revision == COMMIT)
    assert str(place) == text
    assert parse_location(str(place)) == place
    assert str(place / "zarr.json").endswith(f"{key}/zarr.json")


@pytest.mark.parametrize(
    "text",
    [
        "hf://lab/maps",
        "hf://models/lab/maps",
        "hf://datasets/maps",
        "hf://datasets/lab/",
        "hf://datasets//maps",
        "hf://datasets/../maps",
        "hf://datasets/lab/maps@",
        "hf://datasets/lab/maps@a..b",
        "hf://datasets/lab/ma%2Fps",
        "hf://user:secret@datasets/lab/maps",
    ],
)
def test_what_names_no_repository_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected hf://datasets/ORG/NAME/FOLDER|must have no password") as refused:
        parse_location(text)
    assert "secret" not in str(refused.value)


def test_parts_that_lead_out_of_the_repository_are_refused():
    with pytest.raises(ConfigError, match="is not a path on a server"):
        parse_location("hf://datasets/lab/maps/../other")


def test_a_branch_is_read_at_the_commit_it_was_when_it_was_pinned(hub):
    first = put(hub, small=b"one", large=b"1" * 200)
    place = pinned(parse_location("hf://datasets/lab/maps"))
    put(hub, small=b"two", large=b"2" * 200)
    assert place.revision == first
    assert pinned(place) is place
    assert (read_file(place / "small"), open_file(place / "large").pread(5, 195)) == (b"one", b"11111")
    assert read_file(parse_location("hf://datasets/lab/maps/small")) == b"two"


def test_only_those_who_may_see_a_private_repository_read_it(hub, monkeypatch):
    put(hub, small=b"one")
    place = parse_location("hf://datasets/lab/maps/small")
    assert served_at(place)["authorization"] == f"Bearer {TOKEN}"
    assert read_file(place) == b"one"
    monkeypatch.delenv("HF_TOKEN")
    assert "authorization" not in served_at(place)
    with pytest.raises(
        RemoteError, match=r"the server refuses access \(401 .*\)\. Log in with `hf auth login`, or set HF_TOKEN"
    ):
        read_file(place)
    with pytest.raises(FileNotFoundError):
        pinned(place)


def test_a_busy_hub_is_asked_again(hub):
    put(hub, small=b"one")
    statuses = []

    def question():
        hub.fault_rate = 1.0 if len(statuses) < 2 else 0.0
        statuses.append(hub.fault_rate)
        return HfApi().dataset_info("lab/maps").sha

    assert ask_hub(parse_location("hf://datasets/lab/maps"), question)
    assert statuses == [1.0, 1.0, 0.0]


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch, hub):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(asking, "_WAITS_S", (0.01,))
    with pytest.raises(RemoteError, match=r"lab/maps: the hub cannot be reached .*HF_ENDPOINT"):
        pinned(parse_location("hf://datasets/lab/maps"))


def test_a_mistake_of_ours_keeps_its_own_error(hub):
    with pytest.raises(ZeroDivisionError) as raised:
        ask_hub(parse_location("hf://datasets/lab/maps"), lambda: 1 // 0)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(("num_failures", "cause"), [(1, None), (9, None), (9, RemoteError("x: it is full."))])
def test_plain_runtime_errors_of_transfers_are_failed_connections(num_failures, cause, monkeypatch):
    monkeypatch.setattr(asking, "_WAITS_S", (0.01,))
    asked = []

    def question():
        asked.append(1)
        if len(asked) <= num_failures:
            raise RuntimeError("Data processing error: CAS service error: connection reset") from cause
        return "answer"

    place = parse_location("hf://datasets/lab/maps")
    if num_failures == 1:
        assert ask_hub(place, question) == "answer"
        return
    with pytest.raises(RemoteError, match="x: it is full" if cause else r"maps: the hub cannot be reached") as raised:
        ask_hub(place, question)
    assert len(asked) == (1 if cause else 2)
    assert (raised.value.__cause__ is None) == (cause is not None)


def test_tars_on_a_hub_are_indexed_as_local_ones(hub, digits_tars):
    put(hub, **{tar.name: tar.read_bytes() for tar in digits_tars})
    remote = index_source("hf://datasets/lab/maps/digits-{0000..0002}.tar")
    assert remote.fingerprint == index_source(str(digits_tars[0].parent)).fingerprint
