"""The wheel holds everything, and nothing that would land beside `atcache` in a user's site-packages."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]

# Importing must not be rescued by an editable install's finder: a package missing from the wheel is to be missed.
IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import atcache
names = ["atcache", *(module.name for module in pkgutil.walk_packages(atcache.__path__, "atcache."))]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that git knows or would know."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in _source_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


def _source_files() -> list[str]:
    if not (ROOT / ".git").exists():  # an unpacked archive
        top = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
        below = [path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*")]
        return [str(path.relative_to(ROOT)) for path in top + below if path.is_file() and path.suffix != ".pyc"]
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def _modules_of_the_tree() -> set[str]:
    names: set[str] = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            names.add(".".join(parts).removesuffix(".__init__"))
    return names


def _run_installed(arguments: list[str], installed: Path) -> str:
    # Elsewhere than in the repository, whose own `atcache` folder would come first.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(arguments, cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_with_modules_is_a_listed_package():
    modules = _modules_of_the_tree()
    with_modules = {name.rpartition(".")[0] for name in modules} - {""}
    assert with_modules <= set(PACKAGES)
    assert set(PACKAGES) <= modules  # each has its __init__.py, which the editable install needs


def test_wheel_puts_only_atcache_into_site_packages(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"atcache", f"atcache-{PROJECT['project']['version']}.dist-info"}


def test_wheel_has_the_type_marker_the_licence_and_every_data_file(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    data = [name for name in _source_files() if name.startswith("atcache/") and not name.endswith(".py")]
    assert "atcache/py.typed" in data
    assert set(data) <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_has_the_page_of_the_viewer_and_not_its_source(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("atcache/pipelines/view/")}
    built = {f"atcache/{name}" for name in _source_files() if name.startswith("pipelines/view/built/")}
    assert {"index.html", "assets/page.js", "assets/page.css", "THIRD_PARTY.md"} <= {
        name.removeprefix("atcache/pipelines/view/built/") for name in built
    }
    assert {name for name in names if not name.endswith(".py")} == built


def test_every_module_imports_from_the_installed_wheel(installed: Path):
    files: dict[str, str] = json.loads(_run_installed([sys.executable, "-c", IMPORT_EVERYTHING], installed))
    assert set(files) == _modules_of_the_tree()
    assert [file for file in files.values() if not Path(file).is_relative_to(installed)] == []


def test_installed_command_says_its_version(installed: Path, wheel: Path):
    scripts = configparser.ConfigParser()
    scripts.read_string(
        zipfile.ZipFile(wheel).read(f"{next(installed.glob('*.dist-info')).name}/entry_points.txt").decode()
    )
    assert dict(scripts["console_scripts"]) == {"atcache": "atcache.cli.main:main"}
    said = _run_installed([str(installed / "bin" / "atcache"), "--version"], installed)
    assert said == f"atcache, version {PROJECT['project']['version']}\n"


def test_version_is_the_same_everywhere():
    from atcache import __version__

    assert __version__ == PROJECT["project"]["version"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_direct_dependency_exactly():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in pins if "==" not in line] == []
    pinned = {line.split("==")[0] for line in pins}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]
    names = {requirement.split("[")[0].split(">")[0].split("=")[0] for requirement in wanted}
    assert names - pinned == {"atcache"}  # dev has the other extras in it
