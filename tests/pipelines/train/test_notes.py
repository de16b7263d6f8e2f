"""What a user should know of a run is said, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from builds import picture, write_tar
from made_teachers import tiny_teacher
from training_runs import CPU, training_of, weights_of

from atcache.feed.order import choose_subset
from atcache.images.source import index_source
from atcache.pipelines.train import loop
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train


def test_an_average_over_more_steps_than_the_run_has_is_warned_of(config_for, capsys):
    config = config_for("scratch", ema=0.99, steps=20)
    train(config)
    expected = (
        "NOTE: --ema 0.99 averages over about 100 steps and the run has 20: 82% of what is validated and saved are"
    )
    assert expected in capsys.readouterr().err
    train(config_for("scratch", ema=0.8, steps=20))
    assert "NOTE" not in capsys.readouterr().err


def test_a_run_that_waits_for_data_is_told_of_workers(config_for, tiny_vit, tmp_path, capsys, monkeypatch):
    samples = [
        {"__key__": f"{number}", "jpg": picture(number, side=1024), "cls": f"{number % 2}"} for number in range(8)
    ]
    write_tar(tmp_path / "large.tar", samples)
    waits = config_for("scratch", cache=None, data=str(tmp_path / "large.tar"), student=tiny_vit, batch_size=8)
    monkeypatch.setattr(loop, "num_processors", lambda: 4)
    train(replace(waits, steps=11))
    assert "waiting for data" not in capsys.readouterr().err, "it is over too soon to matter"
    monkeypatch.setattr(loop, "ADVISES_AFTER_S", 0.0)
    waits = replace(waits, out=tmp_path / "waits", steps=21)
    train(waits)
    (note,) = (line for line in capsys.readouterr().err.splitlines() if "waiting for data" in line)
    assert re.fullmatch(r"NOTE: [3-9]\d% of the time is spent waiting for data\. .* with --workers 3: .*", note)
    train(replace(waits, out=tmp_path / "reads ahead", workers=3))
    assert "waiting for data" not in capsys.readouterr().err, "as many read ahead as there can be"


def test_missing_components_are_warned_about(config_for, tiny_vit, capsys):
    config = config_for("distill", student=f"{tiny_vit},init_values=0.1", steps=1)
    (note,) = open_training_data([config], CPU)[0].notes
    assert note.startswith("WARNING: the student's architecture differs from the teacher's: ")
    assert "LayerScale" in note
    assert note.endswith("leave --student out to use the teacher's own architecture.")  # it lacks nothing
    train(config)
    assert note in capsys.readouterr().err
    others = config_for("distill", student=tiny_vit), config_for("scratch", student=f"{tiny_vit},init_values=0.1")
    assert [open_training_data([other], CPU)[0].notes for other in others] == [(), ()]


def test_what_is_known_of_the_teacher_is_said_where_its_attention_is_used(config_for, tiny_vit, capsys):
    line = (
        "Teacher: no family that atcache knows; a plain ViT. Whether attention transfer works is not known: "
        "`atcache probe` measures it."
    )
    for mode in ("copy", "distill", "scratch"):
        train(config_for(mode, steps=1))
        assert capsys.readouterr().err.splitlines().count(line) == (mode != "scratch")


def test_a_student_is_told_how_to_get_what_it_lacks(config_for, tiny_cache, tiny_vit, tmp_path):
    cache = tiny_cache(**tiny_teacher(tmp_path, init_values=0.1, pre_norm=True))
    plain = config_for("distill", cache=cache, student=tiny_vit)
    (note,) = open_training_data([plain], CPU)[0].notes
    (better,) = re.findall(r"or give what is lacking: --student '(.*)'\.$", note)
    assert open_training_data([replace(plain, student=better)], CPU)[0].notes == ()


def test_a_distilled_student_whose_layer_scale_begins_near_nothing_is_told(config_for, tiny_cache, tmp_path):
    for start in ("low", "mid"):
        (tmp_path / start).mkdir()
    low, mid = (
        tiny_cache(**tiny_teacher(tmp_path / start, init_values=value))
        for start, value in (("low", 1e-5), ("mid", 0.1))
    )
    config = config_for("distill", cache=low)
    (note,) = open_training_data([config], CPU)[0].notes
    assert note.startswith("NOTE: the student's LayerScale begins at 1e-05, timm's value.")
    (better,) = re.findall(r"from 1 .*: --student '(.*)'\.$", note)
    (data,) = open_training_data([replace(config, student=better)], CPU)
    assert data.notes == ()
    assert data.student.model.get_parameter("blocks.0.ls1.gamma").eq(1).all()
    for other in (config_for("copy", cache=low), config_for("distill", cache=mid)):
        assert open_training_data([other], CPU)[0].notes == ()


def test_the_labels_say_how_many_classes_a_student_has(config_for, tiny_vit, capsys):
    for num_classes in (5, 0, 10):
        student = tiny_vit.replace("num_classes=10", f"num_classes={num_classes}")
        config = config_for("copy", student=student, steps=1)
        train(config)
        assert weights_of(config)["head.bias"].shape == (10,)
        said = "NOTE: the student's num_classes=5 is not used: the labels have 10 classes, from 0." in (
            capsys.readouterr().err.splitlines()
        )
        assert said == (num_classes == 5)


def test_a_validation_that_says_little_is_noted(config_for, tiny_cache, digits_tars, tiny_vit, capsys):
    fresh = {"cache": None, "student": tiny_vit, "steps": 1, "val_data": str(digits_tars[0])}
    train(config_for("scratch", **fresh, data=str(digits_tars[0])))
    assert "NOTE: the run is validated on images that it is trained on" in capsys.readouterr().err
    train(config_for("scratch", **fresh, data=str(digits_tars[1]), subset=10, batch_size=5))
    said = capsys.readouterr().err
    assert "validated on images that it is trained on" not in said
    train(config_for("copy", steps=1, val_cache=tiny_cache(policy="eval")))
    assert "NOTE: the run is validated on images that it is trained on" in capsys.readouterr().err


@pytest.mark.parametrize(("views", "steps", "warns"), [(1, 60, False), (1, 64, True), (2, 64, False)])
def test_too_few_views_for_so_many_epochs_are_noted(views, steps, warns, config_for, tiny_cache):
    run = training_of(config_for("copy", cache=tiny_cache(views=views), steps=steps))  # an epoch is two steps
    expected = (
        "NOTE: the cache has 1 view of an image, which the run shows 32 times each: students may learn them by heart. "
        "Build a cache with more --views, or vary the student's images with --student-jitter."
    )
    assert (expected in run.notes) == warns
    assert warns or not run.notes


def test_validation_images_of_classes_that_were_not_trained_on_are_counted(config_for, digits_tars, tiny_vit, capsys):
    index = index_source(str(digits_tars[0]))
    few = {"data": str(digits_tars[0]), "subset": 3, "batch_size": 3}
    config = config_for("scratch", cache=None, student=tiny_vit, steps=1, val_data=str(digits_tars[1]), **few)
    seen = index.label_S[choose_subset(index.label_S, np.arange(16), 3, config.seed)]
    num_unseen = int((~np.isin(index_source(str(digits_tars[1])).label_S, seen)).sum())
    train(config)
    assert (
        f"NOTE: {num_unseen} of 16 validation images are of classes without a training image" in capsys.readouterr().err
    )
