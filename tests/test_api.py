"""`import atcache` shows the API and imports nothing heavy; each name is imported when it is first used."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import atcache

HEAVY = {"torch", "timm", "zarr", "numpy", "dask", "xarray", "click", "matplotlib"}


def imported_by(statement: str) -> set[str]:
    script = f"import atcache\n{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_atcache_imports_nothing_heavy():
    assert imported_by("dir(atcache); atcache.__version__; atcache.ConfigError") & HEAVY == set()


def test_opening_a_cache_waits_for_neither_torch_nor_zarr(tiny_cache):
    assert imported_by(f"atcache.open({str(tiny_cache())!r})") & {"torch", "timm", "zarr", "dask"} == set()


def test_the_import_guard_bites():
    assert "torch" in imported_by("atcache.batches")


@pytest.mark.parametrize("name", sorted(atcache.__all__))
def test_every_public_name_is_there_and_explains_itself(name):
    value = getattr(atcache, name)
    assert name in dir(atcache)
    if name != "__version__":
        assert (inspect.getdoc(value) or "").strip()
        assert value is getattr(atcache, name)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'atcache' has no attribute 'opne'"):
        atcache.opne  # noqa: B018


def test_all_names_every_error():
    from atcache import errors

    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined <= set(atcache.__all__)
