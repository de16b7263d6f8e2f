"""The pages of the API are what docs/make_api.py makes of the docstrings, and every example on them runs."""

from __future__ import annotations

import doctest
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_hub import a_hub_in_use
from foreign_models import HandWrittenViT, PackedFused
from PIL import Image

import atcache

DOCS = Path(__file__).parent.parent.parent / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What needs a teacher's weights and ImageNet. tests/docs/test_readme.py runs commands.
COMMAND = re.compile(r"^atcache\.(build|train)\(.*\n", re.MULTILINE)


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def names(tiny_cache, tmp_path, monkeypatch):
    """What examples may use: a small cache in place of ImageNet's, in the working folder."""
    shutil.copytree(tiny_cache(views=2), tmp_path / "in1k.zarr")
    monkeypatch.chdir(tmp_path)
    return {"atcache": atcache, "torch": torch, "cache": atcache.open("in1k.zarr")}


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in FENCE.findall((DOCS / page).read_text(encoding="utf-8")) if found == language]


def test_the_pages_are_what_the_docstrings_say(make_api):
    made = make_api.make_pages()
    assert {page: (DOCS / page).read_text(encoding="utf-8") for page in made} == made
    assert {"api.md", *(f"api/{path.name}" for path in DOCS.glob("api/*"))} == set(made)


@pytest.mark.parametrize(
    ("page", "num_blocks", "num_layers"),
    [("api.md", 11, 1), ("api/statistics.md", 1, 0), ("api/training.md", 7, 0)],
)
def test_the_examples_run(page, num_blocks, num_layers, names):
    examples = blocks(page, "python")
    assert len(examples) == num_blocks
    assert sum(example.count("layer=5") for example in examples) == num_layers, "of a large teacher's layers"
    for example in examples:
        exec(COMMAND.sub("", example).replace("layer=5", "layer=1"), dict(names))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # from huggingface_hub's way to send files
def test_the_examples_of_commands_run(tiny_vit, tiny_weights, tiny_cache, digits_tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "imagenet" / "train" / str(label) for label in range(2)]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (number * 200, 0, 0)).save(folder / "x.png")
    small = "device='cpu', precision='fp32', workers=0"
    stand_ins = {
        "train-{000000..001281}.tar": str(digits_tars[0].parent),
        "train-{0000..0099}.tar": str(digits_tars[0].parent),
        '"mae-vit-l"': f"{tiny_vit!r}, weights={str(tiny_weights)!r}",
        '"vit_small_patch16_224"': f"{tiny_vit!r}, steps=2, batch_size=8",
        "workers=8": "workers=0",
        "image_size=224, patch_size=16": "image_size=32, patch_size=8",
        'out="mine.zarr")': f'out="mine.zarr", {small})',
        ", views=2)": f", views=2, {small})",
        '"part-0.zarr"': repr(str(tiny_cache(data=str(digits_tars[0])))),
        '"part-1.zarr"': repr(str(tiny_cache(data=str(digits_tars[1])))),
        'out="runs/copy")': f'out="runs/copy", steps=2, batch_size=8, {small})',
        'out="distill.zarr")': f'out="distill.zarr", {small})',
        'out="probe")': f'out="probe", steps=2, batch_size=8, seeds=2, {small})',
        'out="runs")': f'out="runs", steps=2, batch_size=8, {small})',
    }
    examples = [text for page in ("caches", "moving", "runs") for text in blocks(f"api/{page}.md", "python")]
    assert len(examples) == 16
    printed_by = dict.fromkeys(stand_ins, 0)
    scope = {"atcache": atcache, "my_vit": HandWrittenViT(PackedFused)}
    # In the order in which one needs another's result; the page's is that of the commands.
    for name in (
        "pack",
        "pretrain",
        "plan",
        "probe",
        "build",
        "merge",
        "own_teacher",
        "verify",
        "train",
        "train_sweep",
        "evaluate",
        "report",
        "maps",
        "compare",
    ):
        (example,) = [text for text in examples if f"atcache.{name}(" in text.partition("\n")[0]]
        for printed, stand_in in stand_ins.items():
            printed_by[printed] += example.count(printed)
            example = example.replace(printed, stand_in)
        if name == "train":
            shutil.copytree("in1k.zarr", "in1k-val.zarr")
            distilled = {"mode": "distill", "cache": "in1k.zarr", "out": "runs/distill", "steps": 2, "batch_size": 8}
            atcache.train(**distilled, device="cpu", precision="fp32")
        exec(example, scope)
    with a_hub_in_use(tmp_path, monkeypatch):
        for name in ("push", "pull"):
            (example,) = [text for text in examples if f"atcache.{name}(" in text.partition("\n")[0]]
            assert example.count('out="in1k.zarr"') == (name == "pull")
            exec(example.replace('out="in1k.zarr"', 'out="pulled.zarr"'), scope)
    assert [printed for printed, count in printed_by.items() if count == 0] == [], "no longer printed"
    assert Path("runs/copy/model.safetensors").exists()


def test_the_examples_of_statistics_give_what_they_say():
    runner = doctest.DocTestRunner(verbose=False)
    examples = [text for page in ("statistics", "agreement") for text in blocks(f"api/{page}.md", "pycon")]
    for number, example in enumerate(examples):
        names = {"np": np, **vars(atcache.stats)}
        runner.run(doctest.DocTestParser().get_doctest(example, names, str(number), None, None))
    results = runner.summarize(verbose=False)
    assert (results.failed, results.attempted) == (0, 23)


def test_public_names_that_are_no_errors_are_on_a_page(make_api):
    shown = {
        *make_api.LOOKING,
        *make_api.LOOP,
        *make_api.MAKING,
        *make_api.MOVING,
        *make_api.SHOWING,
        *make_api.TRAINING,
        "pictures",
        "stats",
        "__version__",
    }
    assert shown == {name for name in atcache.__all__ if not name.endswith("Error")}


def test_the_script_renders_what_a_docstring_may_hold(make_api):
    def sample(size: int, *, scale: float = 1.0) -> list[str]:
        """The first line.

        Args:
            size: how many, in a text
                of two lines.

        Returns:
            The result.

        Raises:
            ConfigError: too many.

        Example:
            sample(3)

        >>> 1 + 1
        2
        """
        raise NotImplementedError

    assert make_api.render_function(sample, "atcache.sample", "###") == [
        "### `atcache.sample` -> `list[str]`",
        "The first line.",
        "- `size`: how many, in a text of two lines.\n- `scale=1.0`",
        "Returns: The result.",
        "Raises `ConfigError`: too many.",
        "```python\nsample(3)\n```",
        "```pycon\n>>> 1 + 1\n2\n```",
    ]
