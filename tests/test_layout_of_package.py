"""Folders say what is in them, no file grows too long to be read, and every test of a GPU can run."""

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


def never_run(source: str) -> list[str]:
    """The names of tests and classes that are left out without CUDA, but have no mark "gpu".

    `conftest.py` hides all GPUs from such a test, and `make test-gpu` leaves it out.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.lower().startswith("test"):
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            skips = [mark for mark in marks if "skipif" in mark]
            if isinstance(node, ast.FunctionDef):
                calls = [ast.unparse(one) for one in ast.walk(node) if isinstance(one, ast.If)]
                skips += [call for call in calls if "pytest.skip(" in call]
            if any("cuda" in skip for skip in skips) and "pytest.mark.gpu" not in marks:
                found.append(node.name)
    return found


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


def test_every_test_that_takes_a_gpu_can_run():
    found = {path.name: never_run(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")}
    assert {name: tests for name, tests in found.items() if tests} == {}, "mark them @pytest.mark.gpu"


def test_a_test_that_takes_a_gpu_and_does_not_say_so_is_noticed():
    skipif = '@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")\n'
    body = "def test_one():\n    pass\n"
    inner = "def test_two():\n    if not torch.cuda.is_available():\n        pytest.skip('no GPU')\n"
    assert never_run(skipif + body) == ["test_one"]
    assert never_run(inner) == ["test_two"]
    assert never_run("@pytest.mark.gpu\n" + skipif + body) == []
    assert never_run("@pytest.mark.skipif(sys.platform == 'darwin')\n" + body) == []
