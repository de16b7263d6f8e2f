"""Planning: the arithmetic is right, the size is what a build writes, and what is assumed is not measured."""

from __future__ import annotations

import io
import json
import re
import resource
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from hypothesis import given, strategies as st
from PIL import Image

from atcache.cli.main import COMMANDS, cli
from atcache.codecs.registry import CODECS
from atcache.errors import CodecError, ConfigError, TeacherError
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.plan.config import ASSUMABLE, PlanConfig, parse_assumptions
from atcache.pipelines.plan.disk import DiskProbe
from atcache.pipelines.plan.measure import DEFAULT_CODECS
from atcache.pipelines.plan.run import plan
from atcache.pipelines.plan.verdict import CodecCost, Machine, Workload, assess, decide, live_epoch

WORKLOAD = Workload(num_samples=1000, num_views=2, epochs=10, runs=1)
MACHINE = Machine(
    teacher_img_per_s=100,
    student_img_per_s=50,
    load_img_per_s=400,
    write_nbytes_per_s=1_000_000,
    free_nbytes=1_000_000_000,
)
COST = CodecCost(
    codec="int8",
    nbytes_per_view=10_000,
    read_nbytes_per_s=2_000_000,
    student_img_per_s=40,
    encode_img_per_s=100,
    compress_img_per_s=1000,
    unpack_img_per_s=800,
)
ASSUMED_DISK = ("disk-read-gb-per-s=2", "disk-write-gb-per-s=1", "disk-free-tb=8")
ALL_ASSUMED = (
    *("samples=1000", "nbytes-per-view=750000", "teacher-img-per-s=2000", "student-img-per-s=700"),
    *ASSUMED_DISK,
)


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# The arithmetic


def test_times_are_those_worked_out_by_hand():
    one = assess(WORKLOAD, MACHINE, COST)
    # A view: 10 ms teacher + 10 ms encoding; 2.5 ms loading; 1 ms compressing; 10 kB at 1 MB/s = 10 ms.
    assert (one.build_s, one.build_limit) == (pytest.approx(2000 * 0.020), "teacher and encoding")
    # A sample: 25 ms student; 2.5 + 1.25 ms loading and unpacking; 10 kB at 2 MB/s = 5 ms.
    assert (one.epoch_s, one.epoch_limit) == (pytest.approx(25), "the student")
    # Live: 20 ms student without decoding + 10 ms teacher.
    assert live_epoch(WORKLOAD, MACHINE) == (pytest.approx(30), "teacher and student")
    assert one.payback_epochs == pytest.approx(40 / 5)
    assert one.total_nbytes == 20_000_000
    assert one.needed_nbytes_per_s == 400_000
    assert one.total_s == pytest.approx(40 + 10 * 25)
    assert one.verdict == "pays"


def test_what_a_codec_was_fitted_to_counts_once():
    one = assess(WORKLOAD, replace(MACHINE, free_nbytes=20_000_500), replace(COST, state_nbytes=501))
    assert (one.total_nbytes, one.verdict) == (20_000_501, "does not fit")


def test_what_shares_processors_is_added_up():
    machine = replace(MACHINE, shares_processors=True)
    one = assess(WORKLOAD, machine, COST)
    assert (one.build_s, one.build_limit) == (pytest.approx(2000 * 0.0235), "teacher and encoding")
    assert (one.epoch_s, one.epoch_limit) == (pytest.approx(28.75), "the student")
    assert live_epoch(WORKLOAD, machine)[0] == pytest.approx(32.5)
    slow_disk = assess(WORKLOAD, machine, replace(COST, read_nbytes_per_s=200_000))
    assert (slow_disk.epoch_s, slow_disk.epoch_limit) == (pytest.approx(50), "the disk")


@pytest.mark.parametrize(("replays", "expected_s"), [(True, 1000 * (1 / 20 + 1 / 800)), (False, 1000 / 40)])
def test_stored_pixels_need_no_loading_of_images(replays, expected_s):
    machine = replace(MACHINE, load_img_per_s=20)
    one = assess(replace(WORKLOAD, replays_images=replays), machine, COST)
    assert one.epoch_s == pytest.approx(expected_s)
    assert live_epoch(WORKLOAD, machine) == (pytest.approx(50), "loading images")


@pytest.mark.parametrize(
    ("workload", "machine", "cost", "verdict"),
    [
        ({}, {}, {}, "pays"),
        ({"epochs": 7}, {}, {}, "too late"),
        ({"epochs": 7, "runs": 2}, {}, {}, "pays"),
        ({}, {}, {"read_nbytes_per_s": 300_000}, "slower"),
        ({}, {"load_img_per_s": 20}, {}, "slower"),
        ({}, {"free_nbytes": 19_999_999}, {}, "does not fit"),
        ({}, {"free_nbytes": 20_000_000}, {}, "pays"),
    ],
)
def test_verdicts(workload, machine, cost, verdict):
    one = assess(replace(WORKLOAD, **workload), replace(MACHINE, **machine), replace(COST, **cost))
    assert one.verdict == verdict


@given(
    teacher=st.floats(0.1, 1e4),
    student=st.floats(0.1, 1e4),
    read=st.floats(1e4, 1e10),
    nbytes=st.integers(1, 10**8),
    epochs=st.floats(0.5, 1000),
)
def test_a_cache_pays_exactly_where_it_takes_less_time_in_all(teacher, student, read, nbytes, epochs):
    workload = replace(WORKLOAD, epochs=epochs)
    machine = replace(MACHINE, teacher_img_per_s=teacher, student_img_per_s=student, free_nbytes=10**18)
    cost = replace(COST, nbytes_per_view=nbytes, read_nbytes_per_s=read, student_img_per_s=student)
    one = assess(workload, machine, cost)
    live_s = live_epoch(workload, machine)[0]
    if one.payback_epochs is not None:
        spent_s = one.build_s + one.payback_epochs * one.epoch_s
        assert spent_s == pytest.approx(one.payback_epochs * live_s, rel=1e-6)
    if one.total_s != pytest.approx(epochs * live_s, rel=1e-9):
        assert (one.verdict == "pays") == (one.total_s < epochs * live_s)


def test_of_settings_that_are_as_good_the_smallest_is_taken():
    costs = [
        replace(COST, codec="exact", nbytes_per_view=19_000),
        replace(COST, codec="small", nbytes_per_view=5000, student_img_per_s=39),
        replace(COST, codec="smallest but slow", nbytes_per_view=100, student_img_per_s=35),
    ]
    workload = replace(WORKLOAD, epochs=100)
    decision = decide(workload, MACHINE, [assess(workload, MACHINE, cost) for cost in costs])
    assert (decision.cache, decision.codec) == (True, "small")


def test_answers_say_their_numbers():
    decision = decide(WORKLOAD, MACHINE, [assess(WORKLOAD, MACHINE, COST)])
    assert decision.sentence == (
        "Cache, with codec int8: one epoch takes 25 s from the cache and 30 s with a live teacher. The build takes 40 "
        "s and 20 MB; it has paid for itself after 8 epochs. In all, 4.83 min instead of 5 min."
    )
    workload = replace(WORKLOAD, epochs=3, runs=5)
    decision = decide(workload, MACHINE, [assess(workload, MACHINE, replace(COST, codec=None))])
    assert "Cache, at the assumed size: " in decision.sentence
    assert "after 8 epochs (2.67 runs of 3 epochs)." in decision.sentence


@pytest.mark.parametrize(
    ("workload", "machine", "cost", "reason"),
    [
        (
            {"epochs": 4},
            {},
            {},
            "With codec int8 one epoch takes 25 s from the cache, where the student is the limit, and 30 s with a live "
            "teacher; the build takes 40 s and would have paid for itself only after 8 epochs (2 runs of 4 epochs), "
            "but only 4 are planned.",
        ),
        (
            {},
            {},
            {"read_nbytes_per_s": 250_000},
            "With codec int8 one epoch takes 40 s from the cache, where the disk is the limit, and 30 s with a live "
            "teacher: there is nothing to save.",
        ),
        ({}, {"free_nbytes": 5000}, {}, "With codec int8 the cache takes 20 MB, but only 5 kB are free."),
    ],
)
def test_no_is_said_plainly_and_why(workload, machine, cost, reason):
    changed = replace(WORKLOAD, **workload), replace(MACHINE, **machine)
    decision = decide(*changed, [assess(*changed, replace(COST, **cost))])
    assert (decision.cache, decision.codec) == (False, None)
    assert decision.sentence == f"Do not cache: run live. {reason}"


def test_the_setting_that_came_closest_explains_a_no():
    machine = replace(MACHINE, free_nbytes=30_000_000)
    workload = replace(WORKLOAD, epochs=2)
    costs = [replace(COST, codec="exact", nbytes_per_view=20_000), COST]
    decision = decide(workload, machine, [assess(workload, machine, cost) for cost in costs])
    assert "With codec int8 one epoch takes 25 s" in decision.sentence


# What is assumed


def test_names_and_units_of_assumptions():
    texts = [f"{name}={number}" for number, name in enumerate(ASSUMABLE, start=1)]
    assumed = parse_assumptions(texts)
    assert (assumed.num_samples, assumed.nbytes_per_view, assumed.teacher_img_per_s) == (1, 2, 3)
    assert (assumed.student_img_per_s, assumed.encode_img_per_s, assumed.load_img_per_s) == (4, 5, 6)
    assert (assumed.read_nbytes_per_s, assumed.write_nbytes_per_s) == (7e9, 8e9)
    assert assumed.free_nbytes == 9 * 10**12


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["gpu=3"], r"assume 'gpu=3': 'gpu' is unknown; expected one of samples, nbytes-per-view, .* disk-free-tb\."),
        (["samples"], "assume 'samples': expected samples=NUMBER, with a number above 0"),
        (["samples=many"], "assume 'samples=many': expected samples=NUMBER"),
        (["disk-free-tb=0"], "assume 'disk-free-tb=0': expected disk-free-tb=NUMBER"),
        (["disk-free-tb=inf"], "expected disk-free-tb=NUMBER"),
        (["disk-free-tb=nan"], "expected disk-free-tb=NUMBER"),
        (["samples=2", "samples=3"], "assume 'samples=3': samples is given twice"),
    ],
)
def test_an_assumption_that_cannot_be_used_is_refused(texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_assumptions(texts)


def test_the_help_names_all_that_can_be_assumed():
    (option,) = (p for p in COMMANDS["plan"].load().params if isinstance(p, click.Option) and p.name == "assume")
    assert (option.help or "").partition("Names: ")[2].rstrip(".").split(", ") == list(ASSUMABLE)


def test_where_all_is_assumed_no_teacher_and_no_image_is_needed(tmp_path):
    config = PlanConfig(teacher="no_such_model", data="no-such.tar", out=tmp_path, assume=ALL_ASSUMED)
    made = plan(config)
    (one,) = made.assessments
    # 1000 samples: 1 / 700 s a step, and 1 / 2000 s for the teacher when it runs live; 0.75 MB at 2 and 1 GB/s.
    assert one.epoch_s == pytest.approx(1000 / 700)
    assert made.decision.live_epoch_s == pytest.approx(1000 / 700 + 1000 / 2000)
    assert (one.build_s, one.build_limit) == (pytest.approx(0.75), "the disk")
    assert one.payback_epochs == pytest.approx(1.5)
    assert made.machine.free_nbytes == 8 * 10**12
    assert made.verdict is None
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("name", ["nbytes-per-view", "teacher-img-per-s", "student-img-per-s"])
def test_where_one_thing_is_not_assumed_the_teacher_is_loaded(name, digits_tars, tmp_path):
    assume = tuple(text for text in ALL_ASSUMED if not text.startswith(name))
    with pytest.raises(TeacherError, match="'no_such_model' is unknown"):
        plan(PlanConfig(teacher="no_such_model", data=str(digits_tars[0]), out=tmp_path, assume=assume))
    with pytest.raises(ConfigError, match=f"--data is missing: {name} can only be measured with a teacher and images"):
        PlanConfig(teacher="vit_tiny_patch16_224", assume=assume)


def test_samples_are_counted_in_the_tars(digits_tars, tmp_path):
    without = ALL_ASSUMED[1:]
    assert plan(PlanConfig(data=str(digits_tars[0].parent), out=tmp_path, assume=without)).workload.num_samples == 48
    with pytest.raises(ConfigError, match=r"give --data, or --assume samples=NUMBER"):
        PlanConfig(assume=without)


def test_bad_samples_are_not_counted_but_told(tmp_path):
    tar = write_tar(tmp_path / "some.tar", 3, missing_label=1)
    made = plan(PlanConfig(data=str(tar), out=tmp_path, assume=ALL_ASSUMED[1:]))
    assert made.workload.num_samples == 2
    assert made.notes[0] == "Samples without image or label: 1. To leave them out, build with --on-bad-image skip."


def test_an_unknown_codec_is_refused_before_anything_is_run():
    with pytest.raises(CodecError, match="codec 'int9' is unknown"):
        PlanConfig(codec=("int9",), assume=ALL_ASSUMED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "eval", "views": 3}, "views=3: policy eval always makes the same view.* Give --views 1"),
        ({"policy": "eval", "mixup": 0.8}, "views of policy eval are never mixed: leave mixup and cutmix out"),
        ({"policy": "eval", "cutmix": 1.0}, "views of policy eval are never mixed: leave mixup and cutmix out"),
        ({"mix_prob": 0.5}, r"mix_prob=0\.5 without mixup or cutmix"),
    ],
)
def test_views_that_a_build_refuses_are_refused_before_anything_is_run(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as by_plan:
        PlanConfig(assume=ALL_ASSUMED, **fields)
    with pytest.raises(ConfigError) as by_build:
        BuildConfig(teacher="demo-mae", data="x.tar", out=tmp_path / "x.zarr", **fields)
    assert str(by_plan.value) == str(by_build.value)


def test_a_size_cannot_be_assumed_for_two_codecs():
    with pytest.raises(ConfigError, match=r"nbytes-per-view is assumed, and 2 codecs are named: exact, int8\."):
        PlanConfig(codec=("exact", "int8"), assume=ALL_ASSUMED)


# What is measured


def structured_image(generator: np.random.Generator, side: int = 32) -> Image.Image:
    """A few soft blobs on a gradient with more or less noise: neither flat nor noise alone, as photographs are."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    pixels = np.stack([generator.uniform(0, 200) + generator.uniform(-80, 80) * rows for _ in range(3)], axis=-1)
    for _ in range(generator.integers(1, 6)):
        row, column, radius = generator.uniform(0, 1, 3) * (1, 1, 0.3) + (0, 0, 0.03)
        blob = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / radius**2)
        pixels += blob[..., None] * generator.uniform(-150, 150, 3)
    pixels += generator.normal(0, generator.uniform(0, 60), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_tar(path: Path, num_samples: int, missing_label: int | None = None) -> Path:
    generator = np.random.default_rng(0)
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for number in range(num_samples):
            encoded = io.BytesIO()
            structured_image(generator).save(encoded, format="JPEG", quality=90)
            sample = {"__key__": f"{number:05d}", "jpg": encoded.getvalue(), "cls": str(number % 10).encode()}
            if number == missing_label:
                del sample["cls"]
            writer.write(sample)
    return path


TEACHER = "vit_tiny_patch16_224:img_size=32,patch_size=4,embed_dim=64,depth=3,num_heads=2,num_classes=10"


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory) -> Path:
    """Weights of TEACHER whose maps are far from uniform, and differ from image to image."""
    import torch
    from safetensors.torch import save_file

    from atcache.teachers.load import create_student
    from atcache.teachers.names import parse_model_name

    torch.manual_seed(0)
    weights = create_student(parse_model_name(TEACHER), num_classes=10).state_dict()
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    factors = {"qkv.weight": 12, "patch_embed.proj.weight": 30}
    larger = {
        name: tensor * next((f for end, f in factors.items() if end in name), 1) for name, tensor in weights.items()
    }
    save_file(larger, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A tar of 240 images of 32 x 32 pixels."""
    return write_tar(tmp_path_factory.mktemp("images") / "images.tar", 240)


@pytest.fixture
def config(images, teacher_weights, tmp_path) -> PlanConfig:
    """A plan whose disk is assumed; the rest is measured."""
    return PlanConfig(
        teacher=TEACHER,
        weights=teacher_weights,
        data=str(images),
        out=tmp_path / "cache.zarr",
        batch_size=16,
        workers=1,
        device="cpu",
        precision="fp32",
        assume=ASSUMED_DISK,
    )


@pytest.mark.parametrize("fields", [{}, {"policy": "eval", "pixels": "store"}], ids=["two views", "pixels"])
def test_the_size_is_within_5_percent_of_what_a_build_writes(config, fields):
    views = 1 if fields else 2
    made = plan(replace(config, views=views, **fields))
    assert [one.cost.codec for one in made.assessments] == list(DEFAULT_CODECS["factors"])
    for one in made.assessments:
        built = build(
            BuildConfig(
                teacher=TEACHER,
                weights=config.weights,
                data=config.data or "",
                out=config.out.with_name(f"{one.cost.codec}.zarr".replace(":", "-")),
                views=views,
                codec=one.cost.codec or "",
                calibration_samples=config.calibration_samples,
                batch_size=config.batch_size,
                workers=0,
                device="cpu",
                precision="fp32",
                **fields,
            )
        )
        assert built.complete is not None
        assert built.plan is not None
        assert one.cost.state_nbytes == pytest.approx(built.plan.state_nbytes, rel=0.1)
        views_nbytes = one.total_nbytes - one.cost.state_nbytes
        assert views_nbytes == pytest.approx(built.complete["nbytes"], rel=0.05)
        assert one.cost.row_kl_nats == pytest.approx(built.complete["quality"]["row_kl_nats"]["mean"], rel=1, abs=1e-6)
        assert one.cost.map_nbytes_per_view == built.plan.map_nbytes_per_view


def test_every_codec_is_compared_for_some_teacher():
    assert DEFAULT_CODECS["maps"] == ("logmap",)
    assert {*DEFAULT_CODECS["factors"], "logmap"} == set(CODECS)


def test_speeds_that_are_assumed_are_used_and_the_others_measured(config):
    assumed = ("samples=1000000", "teacher-img-per-s=12345", "load-img-per-s=777", *ASSUMED_DISK)
    made = plan(replace(config, codec=("int8",), assume=assumed))
    assert made.workload.num_samples == 1_000_000
    assert made.machine.teacher_img_per_s == 12345
    assert made.machine.load_img_per_s == 777
    assert made.scratch_img_per_s is not None
    (one,) = made.assessments
    assert 0 < one.cost.student_img_per_s < 12345
    # This machine's processors say nothing of the one with that teacher.
    assert (one.cost.encode_img_per_s, one.cost.compress_img_per_s, one.cost.unpack_img_per_s) == (None, None, None)
    assert "is that the same machine?" in made.notes[0]


def test_an_assumed_size_is_used_with_a_measured_teacher(config):
    made = plan(replace(config, calibration_samples=8, batch_size=12, assume=("nbytes-per-view=1000", *ASSUMED_DISK)))
    (one,) = made.assessments
    assert (one.cost.codec, one.cost.nbytes_per_view) == (DEFAULT_CODECS["factors"][0], 1000)
    assert one.total_nbytes == 240 * 1000 + one.cost.state_nbytes
    assert one.cost.state_nbytes > 0


def test_a_distilled_student_is_timed_too(config):
    made = plan(replace(config, mode="distill", codec=("int8",)))
    assert made.assessments[0].cost.student_img_per_s > 1
    assert made.machine.student_img_per_s > 1


def test_all_speeds_are_measured_and_nothing_is_left(config):
    before = listing(config.out.parent)
    made = plan(replace(config, layers="0-1", heads="1", codec=("int8",), assume=()))
    assert listing(config.out.parent) == before
    assert open_probes() == []
    (one,) = made.assessments
    assert one.cost.map_nbytes_per_view == 2 * 1 * 65 * 65 * 2
    for speed in (
        *(made.machine.teacher_img_per_s, made.machine.student_img_per_s, made.machine.load_img_per_s),
        *(made.machine.write_nbytes_per_s, made.scratch_img_per_s, one.cost.student_img_per_s),
        *(one.cost.encode_img_per_s, one.cost.compress_img_per_s, one.cost.unpack_img_per_s),
        one.cost.read_nbytes_per_s,
    ):
        assert speed is not None
        assert 1 < speed < 1e12
    assert made.assessments[0].total_nbytes == one.cost.nbytes_per_view * 240
    assert made.images is not None
    assert made.images.reduced_view_ms is not None
    assert made.machine.load_img_per_s == pytest.approx(made.images.num_workers * 1e3 / made.images.view_ms)
    assert any(note.startswith("Images cost ") for note in made.notes)
    json.dumps(made.to_json(), allow_nan=False)


def test_a_student_of_another_size_is_refused(config):
    with pytest.raises(ConfigError, match=r"takes 16 x 16 pixels, .* 32 x 32\. Give --student with img_size=32"):
        plan(replace(config, student=TEACHER.replace("img_size=32,patch_size=4", "img_size=16,patch_size=2")))


def open_probes() -> list[str]:
    """Probe files this process still has open."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("this system does not list open files")
    return [name for entry in descriptors.iterdir() if "atcache-plan" in (name := str(entry.resolve()))]


def test_the_probe_reads_views_of_any_size_and_leaves_nothing(tmp_path):
    with DiskProbe(tmp_path, max_nbytes=8 * 2**20) as probe:
        assert probe.write_nbytes_per_s > 0
        for view_nbytes in (700, 10**6, 10**9):
            assert probe.read_nbytes_per_s(view_nbytes, 4) > 0
            assert probe.page_cache in ("dropped", "kept", "unknown")
    assert listing(tmp_path) == set()
    assert open_probes() == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no folder in memory")
def test_reads_that_cannot_be_told_from_memory_are_noted():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assume = tuple(text for text in ALL_ASSUMED if not text.startswith("disk-read"))
        made = plan(PlanConfig(out=Path(folder), assume=assume))
    assert re.search(r"page cache .* --assume disk-read-gb-per-s\.", made.notes[-1])


def test_where_a_cache_fits_in_memory_the_disk_is_not_blamed_for_all_epochs(tmp_path):
    assume = ["samples=10", "nbytes-per-view=1000", "teacher-img-per-s=2e9", "student-img-per-s=1e9"]
    made = plan(PlanConfig(out=tmp_path, assume=tuple([*assume, "disk-write-gb-per-s=1"])))
    assert made.assessments[0].epoch_limit == "the disk"
    assert made.notes[-1].startswith("A cache of 10 kB fits in the ")


def test_the_probe_leaves_nothing_after_an_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match="File too large"), DiskProbe(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(ZeroDivisionError), DiskProbe(tmp_path, max_nbytes=2**20):
        _ = 1 / 0
    assert listing(tmp_path) == set()
    assert open_probes() == []


# The command


def run_plan(*arguments: str):
    return CliRunner().invoke(cli, ["plan", *arguments])


def test_the_command_prints_tables_and_one_line_of_json(config, tmp_path):
    out = tmp_path / "new" / "cache.zarr"
    result = run_plan(
        *("--teacher", TEACHER, "--weights", str(config.weights), "--data", str(config.data), "--out", str(out)),
        *("--batch-size", "16", "--workers", "1", "--device", "cpu", "--epochs", "20", "--runs", "3"),
        *(word for text in ASSUMED_DISK for word in ("--assume", text)),
    )
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    made = json.loads(line)
    assert made["workload"] == {"num_samples": 240, "num_views": 1, "epochs": 20, "runs": 3, "replays_images": True}
    assert [one["cost"]["codec"] for one in made["assessments"]] == list(DEFAULT_CODECS["factors"])
    for codec in DEFAULT_CODECS["factors"]:
        assert re.search(rf"^ ?{codec} ", result.stderr, re.MULTILINE)
        assert f"{codec} cache" in result.stderr
    assert "240 samples x 1 view; 3 runs of 20 epochs, mode copy" in result.stderr
    assert result.stderr.rstrip().endswith(made["decision"]["sentence"])
    assert listing(tmp_path) == set()


def test_an_unknown_assumption_is_one_sentence():
    result = run_plan("--assume", "gpus=8")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: assume 'gpus=8': 'gpus' is unknown; expected one of samples, ")
    assert result.stderr.count("\n") == 1


def test_the_documented_example_gives_the_documented_answer():
    guide = (Path(__file__).parent.parent.parent.parent / "docs" / "guide" / "plan.md").read_text(encoding="utf-8")
    examples = re.findall(r"```sh\n(atcache plan [^`]*?--assume[^`]*)```\n+```text\n(.*?)```", guide, re.DOTALL)
    assert len(examples) == 2
    for command, answer in examples:
        result = run_plan(*shlex.split(command.replace("\\\n", " "))[2:])
        assert result.exit_code == 0, result.output
        assert result.stderr.rstrip().endswith(" ".join(answer.split()))
