"""The page that is shipped is the one that its sources make, and says whose work is in it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from atcache.pipelines.view.site import BUILT

PAGE = BUILT.parent / "page"


def sources() -> list[Path]:
    """All files of the page's source, by their names."""
    files = [path for path in PAGE.rglob("*") if path.is_file() and path.relative_to(PAGE).parts[0] != "node_modules"]
    return sorted(files, key=lambda path: path.relative_to(PAGE).as_posix())


def test_the_built_page_is_that_of_the_sources():
    digest = hashlib.sha256()
    for path in sources():
        digest.update(f"{path.relative_to(PAGE).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    built = (BUILT / "sources.sha256").read_text().strip()
    assert built == digest.hexdigest(), "pipelines/view/built is stale: run `make page` and commit what it writes"


def changed(folder: Path) -> list[str]:
    """The files of a built page that are not as `vite.config.ts` listed them in built.sha256: changed, gone or new."""
    lines = [line.split("  ", 1) for line in (folder / "built.sha256").read_text().splitlines()]
    listed = {name: digest for digest, name in lines}
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    del found["built.sha256"]
    return sorted({name for name, _ in listed.items() ^ found.items()})


def test_the_built_files_are_those_that_the_build_wrote(tmp_path):
    assert changed(BUILT) == [], "pipelines/view/built was changed by hand or in part: run `make page` and commit"
    copied = shutil.copytree(BUILT, tmp_path / "built")
    (copied / "assets" / "page.js").write_bytes((BUILT / "assets" / "page.js").read_bytes() + b" ")
    (copied / "index.html").unlink()
    (copied / "assets" / "more.js").touch()
    assert changed(copied) == ["assets/more.js", "assets/page.js", "index.html"]


def test_building_again_gives_the_same_bytes(tmp_path):
    npm = shutil.which("npm")
    if npm is None or not (PAGE / "node_modules").is_dir():
        pytest.skip("needs Node and the page's packages: make page")
    # Without the types, which `make page` checks: that takes longer than all the rest.
    command = [npm, "exec", "vite", "--", "build", "--outDir", str(tmp_path / "built"), "--emptyOutDir"]
    subprocess.run(command, cwd=PAGE, check=True, capture_output=True, timeout=300)
    names = sorted(path.relative_to(BUILT) for path in BUILT.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path / "built") for path in (tmp_path / "built").rglob("*.*"))
    different = [str(name) for name in names if (BUILT / name).read_bytes() != (tmp_path / "built" / name).read_bytes()]
    assert different == [], "pipelines/view/built is not what the sources make: run `make page` and commit"


def test_the_licences_of_all_that_is_bundled_are_listed():
    listed = (BUILT / "THIRD_PARTY.md").read_text()
    for name, version in json.loads((PAGE / "package.json").read_text())["dependencies"].items():
        assert f"## {name} {version}" in listed


def test_the_page_names_no_other_server():
    """Addresses in it are relative. Others are names of XML and the like, which nothing is fetched from."""
    index = (BUILT / "index.html").read_text()
    assert re.findall(r'(?:src|href)="(?!\./|data:)[^"]*"', index) == []
    addresses = set(re.findall(r"https?://[\w.-]+", (BUILT / "assets" / "page.js").read_text()))
    assert addresses <= {"http://www.w3.org"}
