"""`atcache build` prints its plan and one line of JSON, and answers bad input with one sentence."""

from __future__ import annotations

import json
import re

import pytest
from builds import run_cli


def test_the_command_prints_its_plan_and_one_line_of_json(config):
    result = run_cli(config)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["complete"]["num_stored"] == record["num_built_views"] == 48
    assert "48 samples x 1 views, 2 layers x 2 heads x 17 tokens" in result.stderr
    assert f"{config.out} is complete: 48 views stored, 0 bad" in result.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "nowhere/x.tar"}, r"nowhere/x\.tar' matches no file"),
        ({"data": "nowhere/x-{0000..0003}.tar"}, r"nowhere/x-\{0000\.\.0003\}\.tar' matches no file"),
        ({"teacher": "vit_tinny_patch16_224"}, r"vit_tinny_patch16_224.*vit_tiny_patch16_224"),
        ({"weights": "nowhere.safetensors"}, r"nowhere\.safetensors"),
        ({"codec": "int9"}, r"int9.*int8"),
        ({"layers": "0-9"}, r"layer 2 does not exist: the model has 2"),
        ({"heads": "2"}, r"head 2 does not exist: the model has 2"),
        ({"policy": "eval", "views": "2"}, r"views=2: policy eval always makes the same view"),
        ({"device": "tpu"}, r"tpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_answered_with_a_sentence_and_exit_code_1(config, options, sentence):
    result = run_cli(config, **options)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert re.search(sentence, last), last
    assert not config.out.exists()


def test_an_out_that_is_no_cache_is_refused(config, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    result = run_cli(config, out=str(tmp_path / "photos"))
    assert result.exit_code == 1
    assert "photos exists and is not a cache. Give another --out, or remove it." in result.stderr
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_other_parameters_are_refused_at_the_command_line(config):
    assert run_cli(config).exit_code == 0
    result = run_cli(config, seed="7")
    assert result.exit_code == 1
    assert "views.policy.seed is 0 there and 7 here" in result.stderr
