"""The page of families is what the script makes of the table in the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from atcache.teachers.families import FAMILIES

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_page_is_what_the_table_says():
    spec = importlib.util.spec_from_file_location("make_families", DOCS / "make_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    assert page == module.make_page()
    assert page.count("\n| ") == 1 + len(FAMILIES)
