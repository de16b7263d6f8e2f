"""Runs to report on, made once for each file of tests, whose classes have names that a page must not take for text."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from pathlib import Path

import pytest

from atcache.pipelines.report.after_training import train
from atcache.pipelines.train.config import TrainConfig

HOSTILE = "<script>document.title = 'taken'</script>"
PLACE = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="package")
def named_caches(tiny_cache, digits_tars, tmp_path_factory) -> tuple[Path, Path]:
    """A cache to train from and one to validate on, of the same 48 digits, whose classes have names."""
    folder = tmp_path_factory.mktemp("named")
    for tar in digits_tars:
        shutil.copy(tar, folder)
    names = [HOSTILE, 'a "quoted" & odd one', *(f"digit {number}" for number in range(2, 10))]
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    common = {"data": str(folder), "codec": "exact:dtype=float32"}
    return tiny_cache(**common, policy="crop-flip"), tiny_cache(**common, policy="eval")


@pytest.fixture(scope="package")
def run_of(named_caches, tmp_path_factory):
    """A function: a mode and fields of `TrainConfig` -> the folder of a finished run, the same for equal ones."""
    made: dict[tuple[object, ...], Path] = {}

    def run_of(mode: str, **fields) -> Path:
        key = (mode, *sorted(fields.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / mode
            data = {"cache": named_caches[0], "val_cache": named_caches[1]}
            recipe = {"steps": 30, "batch_size": 24, "base_lr": 2e-2, "validate_every": 5}
            train(TrainConfig(mode=mode, out=made[key], **{**data, **recipe, **PLACE, **fields}))
        return made[key]

    return run_of


def words_of(page: Path) -> str:
    """What a reader of a page sees, without the marks."""
    body = page.read_text().partition("<main>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).replace("\xa0", " ").split())


def commands_of(page: Path) -> list[list[str]]:
    """The commands on a page, as words."""
    return [shlex.split(html.unescape(text)) for text in re.findall(r"<pre>(.*?)</pre>", page.read_text(), re.DOTALL)]
