"""docs/look.md, the tutorial about looking inside a teacher: its commands and its code, on a small teacher."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
from builds import picture, write_tar
from click.testing import CliRunner
from safetensors.torch import save_file

from atcache.cli.main import cli

DOCS = Path(__file__).parent.parent.parent / "docs"
LOOK = (DOCS / "look.md").read_text(encoding="utf-8")
# As many layers and heads as the page speaks of, on a grid that has its query.
SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 12, "num_heads": 6, "num_classes": 0}
STAND_INS = {
    "vit_small_patch14_dinov2:img_size=224": "vit_tiny_patch16_224:"
    + ",".join(f"{name}={value}" for name, value in SIZES.items())
}


def test_the_tutorial_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("vit_tiny_patch16_224", **SIZES).state_dict(), "small.safetensors")
    Path("photo-tars").mkdir()
    write_tar(tmp_path / "photo-tars" / "photos-000000.tar", [{"jpg": picture(seed, side=40)} for seed in range(16)])
    Path("atcache.toml").write_text(
        '[build]\nweights = "small.safetensors"\nworkers = 0\nsamples-per-shard = 8\n[stats]\nworkers = 1\n'
    )
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", LOOK, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    commands: list[str] = []
    for language, text in blocks:
        if language == "python":
            exec(text, names)
            continue
        for line in text.splitlines():
            words = [STAND_INS.get(word, word) for word in shlex.split(line)]
            commands.append(words[1])
            if words[1] == "view" and "--export" not in words:  # it serves until Ctrl-C; its own tests do that
                continue
            result = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
            assert result.exit_code == 0, result.output
    assert commands == ["build", "stats", "show", "show", "build", "compare", "view", "view"]
    printed = capsys.readouterr().out.splitlines()
    assert [line[:7] for line in printed[:6]] == [f"head {head}:" for head in range(6)]
    assert {"stats.png", "local.png", "wall.png", "page.html"} <= {path.name for path in Path().iterdir()}
    pictures = re.findall(r"!\[[^\]]+\]\(([a-z/-]+\.(?:png|jpg))\)", LOOK)
    assert len(pictures) == 4
    assert [name for name in pictures if not (DOCS / name).is_file()] == []
