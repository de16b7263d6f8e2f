"""Modules import what lies below them, in no circle, and `import atcache` loads nothing heavy.

The rules are functions; the tests at the end prove on small trees that each of them finds what it is there to find.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"atcache": "atcache", "atcache.pipelines": "pipelines", "atcache.cli": "cli"}

# A module may import what stands before its own folder here, and its neighbours. A new folder must be given a place.
ORDER = [
    "atcache.data",
    "atcache.errors",
    "atcache.choices",
    "atcache.fields",
    "atcache.machine",
    "atcache.notebook",
    "atcache.files",
    "atcache.images",
    "atcache.attention",
    "atcache.statistics",
    "atcache.stats",
    "atcache.codecs",
    "atcache.views",
    "atcache.store",
    "atcache.pictures",
    "atcache.teachers",
    "atcache.cache",
    "atcache.feed",
    "atcache.students",
    "atcache.pipelines.options",
    "atcache.pipelines.running",
    "atcache.pipelines.cluster",
    "atcache.pipelines.pack",
    "atcache.pipelines.fidelity",
    "atcache.pipelines.build",
    "atcache.pipelines.merge",
    "atcache.pipelines.publish",
    "atcache.pipelines.plan",
    "atcache.pipelines.train",
    "atcache.pipelines.probe",
    "atcache.pipelines.evaluate",
    "atcache.pipelines.maps",
    "atcache.pipelines.verify",
    "atcache.pipelines.stats",
    "atcache.pipelines.compare",
    "atcache.pipelines.pages",
    "atcache.pipelines.show",
    "atcache.pipelines.report",
    "atcache.pipelines.view",
    "atcache.pipelines.pretrain",
    "atcache.pipelines.demo",
    "atcache.pipelines.api",
    "atcache.cli",
]
# The public face imports from everywhere when it is called. So what is inside takes next to nothing from it.
FACE = "atcache"
MAY_BE_TAKEN_FROM_THE_FACE = {"__file__", "__version__", "open"}
WITHOUT_A_PLACE = {FACE, "atcache.pipelines"}


@dataclass(frozen=True)
class Import:
    """One name that one module imports.

    Attributes:
        importer: the module with the line.
        imported: the module that is imported, or that `name` is taken from.
        name: what is taken from it; None where the whole module is imported.
        where: file and line.
        is_eager: it happens as soon as the importer is imported, not in a function or for type checkers only.
    """

    importer: str
    imported: str
    name: str | None
    where: str
    is_eager: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.importer} -> {self.imported}" + (f", {self.name}" if self.name else "")


# Reading the tree


def find_modules(root: Path, folders: dict[str, str] = FOLDERS) -> dict[str, Path]:
    """The files of all modules by their dotted names; a package is named without its `__init__`."""
    modules: dict[str, Path] = {}
    for package, folder in folders.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


def read_imports(root: Path, modules: dict[str, Path]) -> list[Import]:
    """All imports of the modules, also those in functions and for type checkers, also of other libraries."""
    imports: list[Import] = []
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        for statement, is_eager in import_statements(tree, is_eager=True):
            where = f"{path.relative_to(root)}:{statement.lineno}"
            for source, name in named_by(statement, package, tree):
                is_module = name is not None and f"{source}.{name}" in modules
                found = (f"{source}.{name}", None) if is_module else (source, name)
                imports.append(Import(module, *found, where, is_eager))
    return imports


def named_by(statement: ast.Import | ast.ImportFrom, package: str, tree: ast.Module) -> list[tuple[str, str | None]]:
    """Modules and what is taken from each."""
    if isinstance(statement, ast.ImportFrom):
        source = absolute_name(statement, package)
        return [(source, alias.name) for alias in statement.names]
    if [alias.name for alias in statement.names] == [FACE]:
        return [(FACE, name) for name in attributes_of(FACE, tree)]
    return [(alias.name, None) for alias in statement.names]


def attributes_of(name: str, tree: ast.Module) -> list[str]:
    """What a module that says `import name` uses of it."""
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return sorted({node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == name})


def import_statements(node: ast.AST, *, is_eager: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_eager
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from import_statements(child, is_eager=is_eager and not is_function and not is_for_types)


def absolute_name(statement: ast.ImportFrom, package: str) -> str:
    if not statement.level:
        return statement.module or ""
    parts = package.split(".")
    above = parts[: len(parts) - (statement.level - 1)]
    return ".".join([*above, statement.module] if statement.module else above)


def place(module: str, order: list[str]) -> int | None:
    return next((i for i, room in enumerate(order) if module == room or module.startswith(f"{room}.")), None)


# The rules: each gives the lines that break it


def unplaced(modules: dict[str, Path], order: list[str] = ORDER) -> list[str]:
    return [name for name in modules if place(name, order) is None and name not in WITHOUT_A_PLACE]


def upward(imports: list[Import], order: list[str] = ORDER) -> list[str]:
    broken: list[str] = []
    for each in imports:
        here, there = place(each.importer, order), place(each.imported, order)
        if here is not None and there is not None and there > here:
            broken.append(str(each))
    return broken


def circle(imports: list[Import], modules: dict[str, Path]) -> list[str]:
    """One circle, if there is any."""
    inside = {
        (each.importer, each.imported): each
        for each in imports
        if each.imported in modules and FACE not in (each.importer, each.imported) and each.importer != each.imported
    }
    graph: dict[str, list[str]] = {name: [] for name in modules}
    for importer, imported in inside:
        graph[importer].append(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        names: list[str] = error.args[1]  # each is imported by the next one
        return [str(inside[importer, imported]) for imported, importer in itertools.pairwise(names)]
    return []


def taken_from_the_face(imports: list[Import]) -> list[str]:
    return [str(each) for each in imports if each.imported == FACE and each.name not in MAY_BE_TAKEN_FROM_THE_FACE]


def loaded_with_the_face(imports: list[Import], modules: dict[str, Path]) -> list[str]:
    """Other libraries that `import atcache` loads, whichever of our modules imports them."""
    broken: list[str] = []
    seen, left = {FACE}, [FACE]
    while left:
        module = left.pop()
        for each in imports:
            if each.importer != module or not each.is_eager:
                continue
            if each.imported in modules:
                # A module of a folder comes with the `__init__` of every folder above it.
                parts = each.imported.split(".")
                new = {".".join(parts[: i + 1]) for i in range(len(parts))} - seen
                seen |= new
                left += sorted(new)
            elif each.imported.partition(".")[0] not in sys.stdlib_module_names:
                broken.append(str(each))
    return broken


def importing_folders(imports: list[Import], modules: dict[str, Path]) -> list[str]:
    """Imports by the `__init__` of a folder: they would come unasked with every module of the folder."""
    return [str(each) for each in imports if modules[each.importer].name == "__init__.py" and each.importer != FACE]


# They hold


@pytest.fixture(scope="module")
def modules() -> dict[str, Path]:
    return find_modules(ROOT)


@pytest.fixture(scope="module")
def imports(modules) -> list[Import]:
    return read_imports(ROOT, modules)


def none_of(broken: list[str]) -> None:
    """Fail with every line that breaks the rule: pytest would shorten the list."""
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


def test_every_module_has_a_place_in_the_order(modules):
    none_of(unplaced(modules))


def test_no_module_imports_what_lies_above_it(imports):
    none_of(upward(imports))


def test_no_modules_import_each_other_in_a_circle(imports, modules):
    none_of(circle(imports, modules))


def test_next_to_nothing_is_taken_from_the_public_face(imports):
    none_of(taken_from_the_face(imports))


def test_importing_atcache_loads_no_other_library(imports, modules):
    none_of(loaded_with_the_face(imports, modules))


def test_folders_import_nothing_by_themselves(imports, modules):
    none_of(importing_folders(imports, modules))


# They would notice


def made_tree(root: Path, files: dict[str, str]) -> tuple[dict[str, Path], list[Import]]:
    """Modules and imports of a tree of these files, and of an `__init__.py` for each folder that has none."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for folder in {path.parent for path in root.rglob("*.py")} | {root / folder for folder in FOLDERS.values()}:
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    modules = find_modules(root)
    return modules, read_imports(root, modules)


LAZY = "def later():\n    {}\n"
FOR_TYPES = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    {}\n"


@pytest.mark.parametrize("wrap", ["{}\n", LAZY, FOR_TYPES], ids=["eager", "lazy", "for types"])
@pytest.mark.parametrize(
    "statement",
    [
        "from atcache.cache.lazy import Lazy",
        "from atcache.cache import lazy",
        "import atcache.cache.lazy",
        "from ..cache.lazy import Lazy",
        "from ..cache import lazy",
    ],
)
def test_an_import_of_what_lies_above_is_found(tmp_path, statement, wrap):
    files = {"atcache/cache/lazy.py": "from atcache.store.writer import write", "atcache/store/writer.py": "x = 1"}
    assert upward(made_tree(tmp_path, files)[1]) == []
    files["atcache/store/writer.py"] = wrap.format(statement)
    _, imports = made_tree(tmp_path, files)
    line = wrap[: wrap.index("{}")].count("\n") + 1
    (found,) = upward(imports)
    assert found.startswith(f"atcache/store/writer.py:{line}: atcache.store.writer -> atcache.cache.lazy")


def test_a_pipeline_that_imports_the_command_line_is_found(tmp_path):
    _, imports = made_tree(tmp_path, {"pipelines/pack.py": "from atcache.cli.main import cli", "cli/main.py": ""})
    assert upward(imports) == ["pipelines/pack.py:1: atcache.pipelines.pack -> atcache.cli.main, cli"]


@pytest.mark.parametrize("wrap", ["{}\n", LAZY, FOR_TYPES], ids=["eager", "lazy", "for types"])
def test_a_circle_is_found_and_told_line_by_line(tmp_path, wrap):
    files = {
        "atcache/codecs/base.py": "from .registry import parse",
        "atcache/codecs/registry.py": "import numpy\nfrom . import exact",
        "atcache/codecs/exact.py": "x = 1",
    }
    modules, imports = made_tree(tmp_path, files)
    assert circle(imports, modules) == []
    modules, imports = made_tree(tmp_path, {**files, "atcache/codecs/exact.py": wrap.format("from . import base")})
    line = wrap[: wrap.index("{}")].count("\n") + 1
    assert sorted(circle(imports, modules)) == [
        "atcache/codecs/base.py:1: atcache.codecs.base -> atcache.codecs.registry, parse",
        f"atcache/codecs/exact.py:{line}: atcache.codecs.exact -> atcache.codecs.base",
        "atcache/codecs/registry.py:2: atcache.codecs.registry -> atcache.codecs.exact",
    ]


def test_a_folder_without_a_place_is_found(tmp_path):
    modules, _ = made_tree(tmp_path, {"atcache/utils/misc.py": "", "atcache/helpers.py": "", "atcache/errors.py": ""})
    assert sorted(unplaced(modules)) == ["atcache.helpers", "atcache.utils", "atcache.utils.misc"]


def test_taking_more_from_the_face_is_found(tmp_path):
    text = "import atcache\nfrom atcache import __version__, errors, build\nimport atcache.errors\n"
    text += "cache = atcache.open(path)\natcache.train(cache)"
    _, imports = made_tree(tmp_path, {"cli/build.py": text, "atcache/errors.py": ""})
    assert taken_from_the_face(imports) == [
        "cli/build.py:1: atcache.cli.build -> atcache, train",
        "cli/build.py:2: atcache.cli.build -> atcache, build",
    ]


def test_a_library_that_comes_with_the_face_is_found(tmp_path):
    files = {
        "atcache/__init__.py": "import json\nfrom atcache.errors import AtcacheError\n" + LAZY.format("import torch"),
        "atcache/errors.py": FOR_TYPES.format("import numpy"),
    }
    modules, imports = made_tree(tmp_path, files)
    assert loaded_with_the_face(imports, modules) == []
    files["atcache/errors.py"] = "try:\n    import torch\nexcept ImportError:\n    pass\n"
    modules, imports = made_tree(tmp_path, files)
    assert loaded_with_the_face(imports, modules) == ["atcache/errors.py:2: atcache.errors -> torch"]


def test_a_folder_that_imports_is_found(tmp_path):
    files = {"atcache/codecs/__init__.py": "from atcache.codecs.base import Codec", "atcache/codecs/base.py": ""}
    modules, imports = made_tree(tmp_path, files)
    assert importing_folders(imports, modules) == [
        "atcache/codecs/__init__.py:1: atcache.codecs -> atcache.codecs.base, Codec"
    ]
