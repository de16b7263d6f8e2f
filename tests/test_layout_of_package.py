"""Folders say what is in them, and no file grows too long to be read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("atcache", "pipelines", "cli")
LONGEST_MODULE, LONGEST_TEST = 420, 600  # lines

# All but `atcache` itself, whose docstring introduces the public functions.
FOLDERS = sorted({path.parent for name in PRODUCT for path in (ROOT / name).rglob("*.py")} - {ROOT / "atcache"})


def listed(docstring: str) -> list[str]:
    """What the lines "- `name`: ..." of a docstring name; a folder has a slash behind its name."""
    return re.findall(r"^- `([\w/]+)`: \S", docstring, flags=re.MULTILINE)


def beside(init: Path) -> list[str]:
    """The modules and folders that a table of contents is to list."""
    modules = [path.stem for path in init.parent.glob("*.py") if path != init]
    return [*modules, *(f"{path.parent.name}/" for path in init.parent.glob("*/__init__.py"))]


def too_long(paths: list[Path], most: int) -> list[str]:
    lines = {path: len(path.read_text().splitlines()) for path in paths}
    return [f"{path} has {number} lines, over {most}" for path, number in lines.items() if number > most]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_lists_its_modules_and_nothing_else(folder):
    init = folder / "__init__.py"
    names = listed(ast.get_docstring(ast.parse(init.read_text())) or "")
    missing, invented = set(beside(init)) - set(names), set(names) - set(beside(init))
    assert (missing, invented) == (set(), set()), f"{init} does not list {missing} and invents {invented}"
    assert len(names) == len(set(names)), "each once"


def test_modules_are_short_enough_to_read():
    assert too_long([path for name in PRODUCT for path in (ROOT / name).rglob("*.py")], LONGEST_MODULE) == []


def test_test_files_are_short_enough_to_read():
    assert too_long(list((ROOT / "tests").rglob("*.py")), LONGEST_TEST) == []


def test_a_table_of_contents_that_lacks_or_invents_a_module_is_noticed(tmp_path):
    for name in ("__init__.py", "reader.py", "writer.py", "remote/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(beside(tmp_path / "__init__.py")) == ["reader", "remote/", "writer"]
    assert listed("Store.\n\n- `reader`: reads `writer`'s files\n- `remote/`: far away\n") == ["reader", "remote/"]
    assert listed("Store: `reader`.\n\n- `writer`:\n") == []


def test_a_long_file_is_noticed(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("x = 1\n" * 11)
    assert too_long([path], 11) == []
    assert too_long([path], 10) == [f"{path} has 11 lines, over 10"]
