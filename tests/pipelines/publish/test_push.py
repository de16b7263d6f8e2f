"""A cache on a hub: sent once, whole or not at all, beside no other, with a card."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from builds import MIXED, differences
from click.testing import CliRunner
from dataset_hub import TOKEN

import atcache
from atcache.cli.main import cli
from atcache.errors import AtcacheError, CacheMismatchError, CacheMissError, CorruptCacheError, RemoteError
from atcache.pipelines.build.run import build
from atcache.pipelines.publish import files as publish_files
from atcache.pipelines.publish.compare import why_not_earlier
from atcache.store import layout as layouts
from atcache.store.manifest import delete_commits, read_commits
from atcache.store.reader import CacheReader

HERE = "hf://datasets/lab/maps"
# huggingface_hub sends files in a way that its HTTP client calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def change_a_number(file):
    text = file.read_text()
    # The totals of a root are compared with each other, before its checksum is.
    name = '"crc32":' if file.name == "zarr.json" else '"num_stored":'
    before = f"{name} " if f"{name} " in text else name
    file.write_text(text.replace(before, f"{before}1", 1))


def test_what_was_pushed_and_pulled_is_the_same_byte_for_byte(hub, tiny_cache, tmp_path):
    for number, fields in enumerate([{}, {"codec": "int8", "views": 2, "pixels": "store", **MIXED}]):
        cache = tiny_cache(**fields)
        to = f"{HERE}/folder/{number}.zarr"
        pushed = atcache.push(cache=cache, to=to, create="private")
        assert (pushed.num_sent, pushed.card) == (pushed.num_files, "renewed" if number else "written")
        atcache.pull(cache=to, out=tmp_path / f"{number}.zarr")
        assert differences(tmp_path / f"{number}.zarr", cache) == []
    readme = hub.files("lab/maps")["README.md"].decode()
    assert [readme.count(f"<!-- atcache folder/{number}.zarr: begin -->") for number in range(2)] == [1, 1]
    assert hub.repositories["lab/maps"].is_private
    assert not atcache.verify(cache=to, sample=0).problems


def test_it_can_be_at_the_root_of_a_repository(hub, tiny_cache, tmp_path):
    atcache.push(cache=tiny_cache(), to=HERE, create="public")
    assert not hub.repositories["lab/maps"].is_private
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", tiny_cache()) == []


def test_what_makes_it_a_cache_is_in_the_last_commit(hub, tiny_cache):
    atcache.push(cache=tiny_cache(), to=HERE, create="private")
    repository = hub.repositories["lab/maps"]
    *before, last = repository.commits.values()
    assert len(before) > 1
    assert not any(name.endswith("zarr.json") for tree in before for name in tree)
    assert {"zarr.json", "README.md", "attention/codes/zarr.json"} <= last.keys()


def test_a_second_push_sends_nothing(hub, tiny_cache):
    atcache.push(cache=tiny_cache(), to=HERE, create="private")
    uploads, commits = len(hub.uploads), len(hub.repositories["lab/maps"].commits)
    again = atcache.push(cache=tiny_cache(), to=HERE)
    assert (again.num_sent, again.sent_nbytes, again.card) == (0, 0, "unchanged")
    assert (len(hub.uploads), len(hub.repositories["lab/maps"].commits)) == (uploads, commits)


def test_a_killed_push_is_no_cache_and_the_next_continues(hub, hub_settings, tiny_cache, tmp_path):
    cache = tiny_cache(views=2, samples_per_shard=5)
    hub.create("lab/maps")
    hub.upload_delay_s = 0.1
    command = [sys.executable, "-m", "atcache.cli.main", "push", str(cache), HERE]
    child = subprocess.Popen(command, env=hub_settings, stderr=subprocess.PIPE)
    while len(hub.uploads) < 20:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    child.kill()
    child.communicate()
    hub.upload_delay_s = 0.0
    with pytest.raises(CacheMissError, match=r"is not a cache: .*zarr.json does not exist"):
        atcache.open(HERE)
    time.sleep(0.5)  # for uploads that the hub has received
    sent = list(hub.uploads)
    atcache.push(cache=cache, to=HERE)
    later = hub.uploads[len(sent) :]
    assert later
    assert not set(later) & set(sent), "what had arrived was sent again"
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", cache) == []


def test_a_hub_that_is_busy_at_random_gets_and_gives_the_same_bytes(hub, tiny_cache, tmp_path):
    hub.create("lab/maps")
    hub.fault_rate = 0.05
    atcache.push(cache=tiny_cache(), to=HERE)
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", tiny_cache()) == []


def test_a_cache_that_has_grown_replaces_what_it_was(hub, digits_build, digits_tars, tmp_path):
    config = replace(digits_build, data=str(digits_tars[0]), codec="exact")
    build(config)
    atcache.push(cache=config.out, to=HERE, create="private")
    opened = atcache.open(HERE)
    build(replace(config, data=str(digits_tars[1]), grow=True))
    build(replace(config, views=2, grow=True))
    pushed = atcache.push(cache=config.out, to=HERE)
    assert 0 < pushed.num_sent < pushed.num_files
    assert pushed.card == "renewed"
    assert opened.reader.layout.num_samples == 16
    assert opened.maps(layer=0)[0, 15].compute().shape, "it is read at the commit it was opened at"
    assert atcache.open(HERE).describe()["num_samples"] == 32
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    shutil.rmtree(config.out / "samples")  # the table of what it was
    assert differences(tmp_path / "copy.zarr", config.out) == []


def test_a_cache_that_grows_during_its_push_is_not_published(hub, digits_build, digits_tars, tmp_path):
    config = replace(digits_build, data=str(digits_tars[0]), codec="exact")
    build(config)
    grown = shutil.copytree(config.out, tmp_path / "grown.zarr")
    build(replace(config, out=grown, views=2, grow=True))
    hub.create("lab/maps")
    hub.meanwhile = [lambda: shutil.copytree(grown, config.out, dirs_exist_ok=True)]
    with pytest.raises(CacheMismatchError, match=r"was changed during the push \(.+\), so it was not .* command again"):
        atcache.push(cache=config.out, to=HERE)
    assert "zarr.json" not in hub.files("lab/maps")
    atcache.push(cache=config.out, to=HERE)
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", grown) == []


def test_a_file_that_goes_during_a_push_is_named(hub, tiny_cache, tmp_path):
    hub.create("lab/maps")
    cache = shutil.copytree(tiny_cache(), tmp_path / "cache.zarr")
    hub.meanwhile = [(cache / "zarr.json").unlink]
    with pytest.raises(CacheMismatchError, match=r"was changed during the push \(zarr.json\)"):
        atcache.push(cache=cache, to=HERE)


def test_what_others_commit_during_a_push_stays(hub, tiny_cache):
    cache = tiny_cache()
    first = atcache.push(cache=cache, to=HERE, create="private")
    repository = hub.repositories["lab/maps"]

    def write(line):
        card = hub.files("lab/maps")["README.md"] + line
        tree = {**repository.commits[repository.heads["main"]], "README.md": hub.keep(card, is_lfs=False)}
        hub.add_commit(repository, "main", tree, "by hand")

    # The second attempt at the first commit goes through.
    hub.meanwhile = [lambda: write(b"during the upload\n"), lambda: None, lambda: write(b"at the last commit\n")]
    pushed = atcache.push(cache=cache, to=f"{HERE}/second.zarr")
    assert hub.meanwhile == []
    card = hub.files("lab/maps")["README.md"].decode()
    for text in (": begin", "during the upload\n", "at the last commit\n", "<!-- atcache second.zarr: begin -->"):
        assert text in card
    assert pushed.to == f"{HERE}@{repository.heads['main']}/second.zarr"
    assert first.to.partition("@")[2] in repository.commits


def test_another_cache_is_not_replaced(hub, tiny_cache, digits_tars):
    atcache.push(cache=tiny_cache(), to=HERE, create="private")
    with pytest.raises(CacheMismatchError, match=r"another cache than .*codec.name is 'exact' in hf://.* 'int8' in"):
        atcache.push(cache=tiny_cache(codec="int8"), to=HERE)
    with pytest.raises(CacheMismatchError, match=r"there are 48 samples with 1 views in hf://.* only 16 with 1"):
        atcache.push(cache=tiny_cache(data=str(digits_tars[0])), to=HERE)
    atcache.push(cache=tiny_cache(data=str(digits_tars[0])), to=f"{HERE}/other.zarr")
    with pytest.raises(CacheMismatchError, match="it has other samples"):
        atcache.push(cache=tiny_cache(data=str(digits_tars[1])), to=f"{HERE}/other.zarr")


def test_what_a_stopped_push_left_is_not_mixed_with_another_cache(hub, tiny_cache):
    atcache.push(cache=tiny_cache(), to=HERE, create="private")
    repository = hub.repositories["lab/maps"]
    tree = {name: blob for name, blob in repository.commits[repository.heads["main"]].items() if "json" not in name}
    hub.add_commit(repository, "main", tree, "as a stopped push leaves it")
    with pytest.raises(CacheMismatchError, match=r"left by a push that did not end, is another"):
        atcache.push(cache=tiny_cache(codec="int8"), to=HERE)
    atcache.push(cache=tiny_cache(), to=HERE)


def test_only_a_whole_cache_is_pushed(hub, tiny_cache, tmp_path):
    hub.create("lab/maps")
    cache = shutil.copytree(tiny_cache(), tmp_path / "cache.zarr")
    for name in ("notes.txt", "commits/notes.json", "commits/v0000-b000000.json.notes"):
        (cache / name).write_text("my own")
    (cache / "attention/codes/c/0/0/0/0/.0.0123456789abcdef.partial").write_text("of a killed build")
    atcache.push(cache=cache, to=HERE)
    names = set(hub.files("lab/maps"))
    assert not any("notes" in name or "partial" in name for name in names)
    (shard := cache / "attention/codes/c/0/1/0/0/0").write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptCacheError, match=r"attention/codes/c/0/1/0/0/0 .*verify --repair.* then push"):
        atcache.push(cache=cache, to=HERE)
    delete_commits(cache, [next(iter(read_commits(cache)))])
    with pytest.raises(
        CacheMismatchError, match=r"is not complete: 1 of 3 tasks are missing. Type its `atcache build`"
    ):
        atcache.push(cache=cache, to=HERE)


def test_a_folder_with_more_entries_than_hubs_take_is_refused_before_anything_is_sent(hub, tiny_cache, monkeypatch):
    hub.create("lab/maps")
    monkeypatch.setattr(publish_files, "MAX_ENTRIES", 4)
    with pytest.raises(CacheMismatchError, match=r"has \d+ entries, and hubs take at most 4 in a folder"):
        atcache.push(cache=tiny_cache(), to=HERE)
    assert hub.uploads == []


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("s3://bucket/x.zarr", "expected a dataset on a hub, such as hf://datasets/ORG/NAME"),
        ("folder", "expected a dataset on a hub"),
        ("hf://datasets/lab", "does not name a dataset on a hub"),
        ("hf://models/lab/maps", "does not name a dataset on a hub"),
        ("hf://datasets/../maps", "does not name a dataset on a hub"),
        (f"{HERE}@{'0' * 40}", "names a commit, which never changes"),
        (f"{HERE}@dev", "the dataset lab/maps has no branch dev"),
        ("hf://datasets/lab/other", "no dataset lab/other that you may see. .* --create private"),
    ],
)
def test_a_place_that_is_none_is_named(hub, tiny_cache, to, sentence):
    hub.create("lab/maps")
    with pytest.raises(AtcacheError, match=sentence):
        atcache.push(cache=tiny_cache(), to=to)


def test_who_may_not_write_is_told_so(hub, tiny_cache, monkeypatch):
    hub.create("lab/maps")
    hub.is_read_only = True
    with pytest.raises(RemoteError, match=r"the hub refuses .*You may not write here.* `hf auth login`"):
        atcache.push(cache=tiny_cache(), to=HERE)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RemoteError, match=r"must know who writes. Log in with `hf auth login`"):
        atcache.push(cache=tiny_cache(), to=HERE)


def test_the_card_says_what_it_is_and_leaves_the_rest_of_the_page_alone(hub, tiny_cache):
    cache = tiny_cache()
    atcache.push(cache=cache, to=HERE, create="private")
    repository = hub.repositories["lab/maps"]

    def change(text):
        tree = {**repository.commits[repository.heads["main"]], "README.md": hub.keep(text.encode(), is_lfs=False)}
        hub.add_commit(repository, "main", tree, "by hand")

    card = hub.files("lab/maps")["README.md"].decode()
    assert card.startswith("---\nlicense: other\n")
    for text in ("size_categories: [n<1K]", "| not known", "48 images in 3 tars", "exact", f'atcache.open("{HERE}")'):
        assert text in card
    changed = card.replace("48 images", "some images") + "\nWritten by hand.\n"
    change(changed)
    assert atcache.push(cache=cache, to=HERE).card == "renewed"
    assert hub.files("lab/maps")["README.md"].decode() == card + "\nWritten by hand.\n"
    change("# Mine\n")
    result = CliRunner().invoke(cli, ["push", str(cache), HERE])
    assert "README.md is not atcache's" in result.stderr
    assert json.loads(result.stdout)["card"] == "left alone"
    assert hub.files("lab/maps")["README.md"] == b"# Mine\n"


def test_the_three_lines_of_the_card_open_it(hub, tiny_cache):
    atcache.push(cache=tiny_cache(), to=HERE, create="private")
    code = hub.files("lab/maps")["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["attn_SHQK"].shape == (8, 2, 17, 17)


def test_the_token_goes_to_the_hub_only(hub, tiny_cache):
    atcache.push(cache=tiny_cache(), to=HERE, create="private")
    atcache.open(HERE).maps(layer=0)[0, 0].compute()
    read = [(path, who) for method, path, who in hub.asked if method in ("GET", "HEAD")]
    elsewhere = [who for path, who in read if path.startswith("/cdn/")]
    assert elsewhere
    assert set(elsewhere) == {None}
    assert {who for path, who in read if "/resolve/" in path} == {f"Bearer {TOKEN}"}


def test_files_behind_a_link_are_refused_and_named(hub, tiny_cache, tmp_path):
    hub.create("lab/maps")
    for name in ("attention/codes/c/0/1", "commits"):
        cache = shutil.copytree(tiny_cache(), tmp_path / f"{name.replace('/', '-')}.zarr")
        shutil.move(cache / name, tmp_path / "other-disk" / name)
        (cache / name).symlink_to(tmp_path / "other-disk" / name)
        assert not atcache.verify(cache=cache, all=True).problems
        with pytest.raises(
            CacheMismatchError, match=rf"{name} is a symbolic link, and \d+ files .* as {name}/\S+ is. Copy each linked"
        ):
            atcache.push(cache=cache, to=HERE)
    assert hub.uploads == []


def test_a_cache_whose_own_checksums_fail_is_refused(hub, tiny_cache, tmp_path):
    hub.create("lab/maps")
    for name in ("commits/v0000-b000001.json", "zarr.json"):
        cache = shutil.copytree(tiny_cache(), tmp_path / f"{name.replace('/', '-')}.zarr")
        change_a_number(cache / name)
        with pytest.raises(CorruptCacheError, match=rf"{name}.* checksum does not match.* then push"):
            atcache.push(cache=cache, to=HERE)
    assert hub.uploads == []


def test_a_cache_that_has_grown_to_very_many_tasks_replaces_what_it_was(
    hub, digits_build, digits_tars, tmp_path, monkeypatch
):
    monkeypatch.setattr(layouts, "MAX_SINGLE_RECORDS", 3)
    monkeypatch.setattr(layouts, "RECORDS_PER_FILE", 2)
    config = replace(digits_build, data=str(digits_tars[0]), codec="exact")
    build(config)
    atcache.push(cache=config.out, to=HERE, create="private")
    earlier = shutil.copytree(config.out, tmp_path / "earlier.zarr")
    build(replace(config, views=2, grow=True))
    readers = CacheReader(earlier), CacheReader(config.out)
    assert [reader.layout.records_per_file for reader in readers] == [1, 2]
    assert why_not_earlier(*readers) == []
    atcache.push(cache=config.out, to=HERE)
    atcache.pull(cache=HERE, out=tmp_path / "copy.zarr")
    assert differences(tmp_path / "copy.zarr", config.out) == []
