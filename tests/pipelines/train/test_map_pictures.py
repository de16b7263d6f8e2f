"""`train --log-maps`: pictures of the teacher's and the student's maps in TensorBoard, and nothing else changes."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import CPU, assert_equal_weights, training_of

from atcache.attention.blocks import has_class_token
from atcache.errors import ConfigError, UnsupportedAttentionError
from atcache.pipelines.train.map_pictures import MapPictures, is_pictured
from atcache.pipelines.train.run import train, train_sweep
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name


def pictures_of(folder) -> dict[str, list]:
    """All pictures by tag: lists of (step, uint8 array)."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: [
            (event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))) for event in events.Images(tag)
        ]
        for tag in events.Tags()["images"]
    }


def test_pictures_are_drawn_twenty_times_the_last_time_at_the_end():
    for num_steps in (1, 7, 20, 21, 99, 1000, 12345):
        steps = [step for step in range(1, num_steps + 1) if is_pictured(step, num_steps)]
        assert len(steps) == min(20, num_steps)
        assert steps[-1] == num_steps


def test_a_distilled_students_maps_stand_below_the_teachers_and_training_is_the_same(config_for):
    plain, logged = config_for("distill", steps=30), config_for("distill", steps=30, log_maps=3)
    train(plain)
    train(logged)
    assert_equal_weights(plain, logged)
    pictures = pictures_of(logged.out)
    assert sorted(pictures) == ["maps/row-0", "maps/row-23", "maps/row-47"]
    steps = [step for step, _ in pictures["maps/row-0"]]
    assert len(steps) == 20
    assert steps[-1] == 30
    shapes = {picture.shape for seen in pictures.values() for _, picture in seen}
    assert len(shapes) == 1
    assert pictures_of(plain.out) == {}
    first, last = (rows_of(pictures["maps/row-0"][at][1])[1] for at in (0, -1))
    assert not np.array_equal(first, last), "the student has learned"


def rows_of(picture: np.ndarray, side: int = 64) -> list[np.ndarray]:
    """The rows of maps in a picture: below each row's name, as high as `side`, and with a gap of 3."""
    rows = [picture[start + 14 :][:side, 64 * 3 :] for start in range(0, len(picture), 14 + side + 3)]
    return [row.astype(int) for row in rows]


def share_that_differs(picture: np.ndarray, other: np.ndarray) -> float:
    return float((np.abs(picture - other) > 3).any(axis=-1).mean())


def test_the_drawn_maps_are_those_of_teacher_and_student(config_for, tiny_weights):
    """A student with fresh weights has other maps than its teacher; with the teacher's own weights, the same."""
    run = training_of(config_for("distill"))
    pictures = MapPictures(run.data, 2, CPU, torch.float32)
    for weights, are_equal in ((None, False), (load_file(tiny_weights), True)):
        if weights is not None:
            run.student.model.load_state_dict(weights)
        first_teacher, first_student, last_teacher, last_student = rows_of(pictures.draw(run.student)["row-47"])
        # Codec exact stores float16: a patch may just be above the scale in one and not in the other.
        assert (share_that_differs(first_teacher, first_student) < 0.05) == are_equal
        assert (share_that_differs(last_teacher, last_student) < 0.05) == are_equal
        assert share_that_differs(first_teacher, last_teacher) > 0.3


def test_a_student_without_a_teacher_shows_its_own_maps(config_for):
    config = config_for("scratch", log_maps=2, steps=5)
    train(config)
    pictures = pictures_of(config.out)
    assert {len(seen) for seen in pictures.values()} == {5}


def test_a_sweep_draws_for_the_students_that_want_it(config_for):
    config, other = config_for("distill", log_maps=1, steps=4), config_for("distill", steps=4)
    train_sweep([config, other])
    assert len(pictures_of(config.out)) == 1
    assert pictures_of(other.out) == {}


def test_a_student_without_maps_is_refused_before_it_trains(config_for):
    data = training_of(config_for("scratch")).data
    convolutions = timm.create_model("resnet10t", num_classes=10)
    student = replace(data.student, module=convolutions, model=convolutions)
    with pytest.raises(UnsupportedAttentionError):
        MapPictures(replace(data, student=student), 2, CPU, torch.float32)


def test_a_student_that_copies_has_nothing_to_compare(config_for):
    with pytest.raises(ConfigError, match="log_maps=2: a student that copies has the teacher's maps"):
        config_for("copy", log_maps=2)


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("vit_tiny_patch16_224:img_size=32", True),
        ("vit_little_patch16_reg1_gap_256:img_size=32,depth=2", False),
        ("vit_tiny_patch16_224:img_size=32,class_token=False,global_pool=avg", False),
        ("cait_xxs24_224:img_size=32,depth=2", False),  # its class token comes after the blocks
    ],
)
def test_students_without_a_class_token_among_their_tokens_are_drawn_too(name, has, config_for, digits_tars):
    name = f"{name},num_classes=10"
    assert has_class_token(create_student(parse_model_name(name), 10)) == has
    config = config_for("scratch", cache=None, data=str(digits_tars[0]), student=name, log_maps=1, steps=1)
    train(config)
    assert [step for step, _ in pictures_of(config.out)["maps/row-0"]] == [1]
