"""Training from a cache equals training with the teacher, continues exactly, and refuses by name what does not fit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from training_runs import assert_equal_weights, run_until_killed, weights_of

from atcache.choices import MODES
from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError, CorruptCacheError, TeacherError
from atcache.feed.loader import BatchStream
from atcache.feed.order import choose_subset
from atcache.images.source import index_source
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.build.run import build
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train
from atcache.pipelines.train.student_run import TrainingRun
from atcache.store.manifest import commit_path
from atcache.store.reader import CacheReader

CPU = torch.device("cpu")


@pytest.fixture
def config_for(tiny_cache, tmp_path):
    """A function: mode and fields -> the config of a short run, in a folder of its own."""
    numbers = iter(range(100))

    def config_for(mode, **fields) -> TrainConfig:
        common = {"cache": tiny_cache(), "out": tmp_path / f"run-{next(numbers)}", "steps": 20, "batch_size": 24}
        recipe = {"base_lr": 2e-2, "warmup_epochs": 1.0, "device": "cpu", "precision": "fp32", "validate_every": 0}
        return TrainConfig(mode=mode, **{**common, **recipe, **fields})

    return config_for


def losses_of(config) -> list[float]:
    return [row["loss"] for row in read_metrics(config.out, "train")]


def training_of(config) -> TrainingRun:
    """The state of a run before its first step."""
    (data,) = open_training_data([config], CPU)
    return TrainingRun(config, data, CPU)


def batches_of(run, stop_step=1):
    """The first batches of a run's stream."""
    data = run.data
    return iter(BatchStream(data.views, data.label_S, data.order, num_steps=stop_step))


def images_of(run, batch) -> torch.Tensor:
    """The student's input, normalised by hand."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (run.student.input.mean, run.student.input.std))
    return (batch.pixels_BHWC.permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_a_cache_trains_the_student_that_the_live_teacher_trains(mode, config_for, tiny_cache, tiny_weights):
    # crop-flip views, two of them: the live teacher must be given the very pixels of the cache.
    float32, float16 = (tiny_cache(codec=f"exact:dtype={dtype}", views=2) for dtype in ("float32", "float16"))
    live = config_for(mode, cache=float32, live_teacher=True, weights=tiny_weights)
    exact, half = config_for(mode, cache=float32), config_for(mode, cache=float16)
    for config in (live, exact, half):
        train(config)
    # Equal to the bit where both were measured; another machine's kernels may differ between batch sizes.
    assert losses_of(exact) == pytest.approx(losses_of(live), rel=1e-5)
    assert losses_of(half) == pytest.approx(losses_of(live), rel=1e-3)
    for name, tensor in weights_of(live).items():
        torch.testing.assert_close(weights_of(exact)[name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights_of(half)[name], tensor, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_in_each_mode_and_the_run_is_written_down(mode, config_for, tiny_weights):
    config = config_for(mode, steps=80, weights=tiny_weights if mode == "finetune" else None)
    summary = train(config)
    rows = read_metrics(config.out, "train")
    assert [row["step"] for row in rows] == list(range(10, 90, 10))
    assert rows[-1]["label_loss"] < 0.88 * rows[0]["label_loss"]
    if mode == "distill":
        assert rows[-1]["loss"] == pytest.approx(rows[-1]["label_loss"] + 3 * rows[-1]["attention_loss"])
        assert rows[-1]["attention_loss"] < rows[0]["attention_loss"]
    assert summary.steps == 80
    assert summary.loss == rows[-1]["loss"]
    assert summary.validation is None
    files = {path.name for path in config.out.iterdir() if not path.name.startswith("events.")}
    assert files == {"run.json", "metrics.jsonl", "model.safetensors", "summary.json"}


def test_a_copying_student_has_no_q_and_k_to_train_or_to_save(config_for):
    training = training_of(config_for("copy"))
    plain = training_of(config_for("scratch"))
    names = {name for name, _ in training.student.model.named_parameters()}
    assert not [name for name in names if "qkv" in name]
    optimised = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in training.student.model.parameters()}

    def count(run):
        return sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])

    assert count(plain) - count(training) == 2 * (2 * 32 * 32 + 2 * 32)  # two blocks' weights and biases of q and k
    summary_names = set(training.student.model.state_dict())
    assert "blocks.0.attn.v.weight" in summary_names
    assert not [name for name in summary_names if "qkv" in name]


def test_layers_left_out_keep_their_own_attention(config_for):
    config = config_for("copy", layers="0")
    train(config)
    names = set(weights_of(config))
    assert "blocks.0.attn.v.weight" in names
    assert "blocks.1.attn.qkv.weight" in names
    both, upper = (training_of(config_for("distill", layers=layers)) for layers in (None, "1"))
    lower = training_of(config_for("distill", layers="0"))
    attention_losses = [float(run.train_step(next(batches_of(run)))["attention_loss"]) for run in (both, lower, upper)]
    assert attention_losses[0] == pytest.approx(sum(attention_losses[1:]) / 2, rel=1e-5)


def test_the_attention_weight_scales_the_attention_loss_alone(config_for):
    run = training_of(config_for("distill", attention_weight=0.5))
    losses = run.train_step(next(batches_of(run)))
    assert float(losses["loss"]) == pytest.approx(float(losses["label_loss"]) + 0.5 * float(losses["attention_loss"]))


STOCHASTIC = {"drop_path": 0.4, "ema": 0.9, "steps": 40, "checkpoint_every": 15, "clip_grad": 1.0}


def test_a_run_that_was_killed_continues_to_the_same_weights_bit_for_bit(config_for):
    whole = config_for("copy", **STOCHASTIC)
    died = replace(whole, out=whole.out.with_name("died"))
    run_until_killed(died)
    summary = train(whole)
    continued = train(died)
    assert_equal_weights(died, whole)
    assert not (died.out / "checkpoint.pt").exists()
    assert [row["step"] for row in read_metrics(died.out)] == [10, 20, 30, 40]
    assert losses_of(died) == losses_of(whole)
    assert (continued.loss, continued.validation) == (summary.loss, summary.validation)


def test_stopping_validating_and_reading_ahead_change_nothing(config_for, digits_tars):
    plain = config_for("distill", **STOCHASTIC)
    train(plain)
    val = {"val_data": str(digits_tars[2]), "out": plain.out.with_name("other")}
    other = replace(plain, validate_every=1.0, checkpoint_every=7, workers=1, keep_mib=0, **val)
    train(other)
    assert_equal_weights(other, plain)
    # Steps are of 24, an epoch of 48: validated every second step, the last one once.
    assert [row["step"] for row in read_metrics(other.out, "validation")] == list(range(2, 42, 2))


def test_training_leaves_the_callers_random_numbers_alone(config_for):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(config_for("scratch", steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_another_seed_is_another_run(config_for):
    zero, again, one = config_for("scratch"), config_for("scratch"), config_for("scratch", seed=1)
    for config in (zero, again, one):
        train(config)
    assert_equal_weights(zero, again)
    assert not torch.equal(weights_of(zero)["head.weight"], weights_of(one)["head.weight"])


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_accumulating_parts_of_a_batch_equals_the_whole_batch(mode, config_for):
    whole, parts = config_for(mode), config_for(mode, accumulate=4)
    train(whole)
    train(parts)
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-3)
    for name, tensor in weights_of(whole).items():
        torch.testing.assert_close(weights_of(parts)[name], tensor, rtol=1e-2, atol=2e-3)


def test_accumulated_gradients_are_those_of_the_whole_batch(config_for):
    # The exact statement behind the test above, before Adam divides small differences by small numbers.
    grads = []
    for accumulate in (1, 4):
        run = training_of(config_for("distill", accumulate=accumulate, optimizer="sgd", base_lr=1.0, weight_decay=0.0))
        before = [p.detach().clone() for p in run.student.model.parameters()]
        for group in run.optimizer.param_groups:
            group["lr"] = 1.0
        run.train_step(next(batches_of(run)))
        grads.append([b - p.detach() for b, p in zip(before, run.student.model.parameters(), strict=True)])
    for whole, parts in zip(*grads, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert max(float(grad.abs().max()) for grad in grads[0]) > 1e-3


def test_layer_decay_gives_lower_blocks_lower_learning_rates(config_for):
    run = training_of(config_for("copy", layer_decay=0.5, steps=20))
    run.scheduler.step_update(5)
    names = {id(p): name for name, p in run.student.model.named_parameters()}
    lr = {names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert lr["blocks.0.attn.v.weight"] == pytest.approx(0.5 * lr["blocks.1.attn.v.weight"])
    assert lr["blocks.1.attn.v.weight"] == pytest.approx(0.5 * lr["head.weight"])
    assert lr["patch_embed.proj.weight"] == pytest.approx(0.25 * lr["blocks.1.attn.v.weight"])
    assert run.lr() == lr["head.weight"]


def test_the_end_of_the_cosine_decays_with_the_layers_too(config_for):
    run = training_of(config_for("copy", layer_decay=0.5, min_lr=1e-4, steps=20))
    run.scheduler.step_update(20)
    names = {id(p): name for name, p in run.student.model.named_parameters()}
    lr = {names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert lr["head.weight"] == pytest.approx(1e-4)
    assert lr["blocks.0.attn.v.weight"] == pytest.approx(0.25e-4)


def test_the_learning_rate_rises_and_falls_to_its_end(config_for):
    config = config_for("scratch", steps=100, batch_size=48, warmup_epochs=5.0, base_lr=1e-2, min_lr=1e-5)
    train(config)
    rates = [row["lr"] for row in read_metrics(config.out, "train")]
    assert max(rates) < 1e-2 * 48 / 256
    assert rates[0] > 0.98 * 1e-2 * 48 / 256  # warm-up is over after 5 epochs, which are 5 steps
    assert rates == sorted(rates, reverse=True)
    assert 1e-5 < rates[-1] < 1.2e-5  # of the last step, which comes just before the end of the cosine


def test_the_logged_learning_rate_is_the_one_that_was_used(config_for):
    config = config_for("scratch", steps=20, batch_size=24, min_lr=0.0)
    run = training_of(config)
    used: dict[int, float] = {}

    def note_rate(optimizer, *_):
        used[run.step + 1] = optimizer.param_groups[-1]["lr"]

    run.optimizer.register_step_pre_hook(note_rate)
    for batch in batches_of(run, stop_step=20):
        run.train_step(batch)
    train(config)
    assert {row["step"]: row["lr"] for row in read_metrics(config.out, "train")} == {10: used[10], 20: used[20]}
    assert used[20] > 0


def test_a_beta2_given_later_is_another_run(config_for):
    for optimizer in ("lion", "adamw"):  # lion's own is 0.99
        config = config_for("scratch", steps=2, optimizer=optimizer)
        train(config)
        with pytest.raises(CacheMismatchError, match=r"another run: --beta2 is None there and 0\.999 here"):
            train(replace(config, beta2=0.999))


def test_biases_and_norms_are_not_decayed(config_for):
    run = training_of(config_for("distill"))
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    of = {name: decay[id(p)] for name, p in run.student.model.named_parameters()}
    assert of["blocks.0.mlp.fc1.weight"] == 0.05
    assert of["blocks.0.mlp.fc1.bias"] == of["blocks.0.norm1.weight"] == of["pos_embed"] == of["cls_token"] == 0


def test_gradients_are_clipped_to_the_norm(config_for):
    moved = []
    for clip_grad in (None, 1e-3):
        run = training_of(
            config_for("scratch", clip_grad=clip_grad, optimizer="sgd", base_lr=1.0, weight_decay=0.0, warmup_epochs=0)
        )
        before = torch.nn.utils.parameters_to_vector(run.student.model.parameters()).detach().clone()
        lr = run.lr()
        run.train_step(next(batches_of(run)))
        after = torch.nn.utils.parameters_to_vector(run.student.model.parameters()).detach()
        moved.append(float((after - before).norm()) / lr)
    assert moved[0] > 0.1
    assert moved[1] <= 1.001e-3 * 1.9  # timm's sgd is Nesterov's: the first step is (1 + momentum) gradients


def test_the_moving_average_is_what_is_saved_and_validated(config_for, digits_tars):
    config = config_for("scratch", steps=3, ema=0.5)
    run = training_of(config)
    average = None
    for number, batch in enumerate(batches_of(run, 3)):
        run.train_step(batch)
        now = {name: tensor.clone() for name, tensor in run.student.model.state_dict().items()}
        average = now if number == 0 else {name: 0.5 * average[name] + 0.5 * now[name] for name in now}
    train(config)
    for name, tensor in weights_of(config).items():
        torch.testing.assert_close(tensor, average[name])
    assert not torch.allclose(average["head.weight"], now["head.weight"], atol=1e-4)


def test_an_average_over_more_steps_than_the_run_has_is_warned_of(config_for, capsys):
    config = config_for("scratch", ema=0.99, steps=20)
    train(config)
    expected = (
        "NOTE: --ema 0.99 averages over about 100 steps and the run has 20: 82% of what is validated and saved are"
    )
    assert expected in capsys.readouterr().err
    train(config_for("scratch", ema=0.8, steps=20))
    assert "NOTE" not in capsys.readouterr().err


def test_drop_path_rises_to_its_value_over_the_blocks(config_for):
    for mode in MODES[:3]:
        blocks = training_of(config_for(mode, drop_path=0.3)).student.model.blocks
        assert [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.0, 0.3])


def test_a_finished_run_gives_its_summary_without_training(config_for):
    config = config_for("scratch")
    summary = train(config)
    changed = {path: path.stat().st_mtime_ns for path in config.out.iterdir()}
    assert train(replace(config, workers=2, keep_mib=1, checkpoint_every=3)) == summary
    assert {path: path.stat().st_mtime_ns for path in config.out.iterdir()} == changed


def test_a_cache_that_was_moved_is_the_same_run(config_for, tiny_cache, tmp_path):
    config = config_for("copy")
    summary = train(config)
    (tmp_path / "moved.zarr").symlink_to(tiny_cache())
    assert train(replace(config, cache=tmp_path / "moved.zarr")) == summary


def test_a_run_keeps_the_precision_it_was_begun_in(config_for):
    config = config_for("copy", steps=2)  # in fp32
    summary = train(config)
    assert train(replace(config, precision="auto")) == summary
    with pytest.raises(CacheMismatchError, match=r"--precision is 'fp32' there and 'bf16' here"):
        train(replace(config, precision="bf16"))
    begun = config_for("copy", steps=2, precision="auto")
    train(begun)
    assert recorded_precision(begun) in ("fp32", "bf16")


def recorded_precision(config) -> str:
    return json.loads((config.out / "run.json").read_text())["settings"]["precision"]


def test_other_settings_for_an_existing_run_are_refused_with_each_difference_named(config_for, tiny_cache):
    config = config_for("distill", steps=3)
    train(config)
    expected = (
        r"holds another run: --drop-path is 0.0 there and 0.1 here; --steps is 3 there and 4 here\. "
        r"Give another --out, or the same options"
    )
    with pytest.raises(CacheMismatchError, match=expected):
        train(replace(config, steps=4, drop_path=0.1))
    with pytest.raises(CacheMismatchError, match=r"another run: num_views is 1 there and 2 here"):
        train(replace(config, cache=tiny_cache(views=2)))
    with pytest.raises(CacheMismatchError, match=r"holds another run: .*codec\.name is 'exact' there and 'int8' here"):
        train(replace(config, cache=tiny_cache(codec="int8")))


def test_validation_takes_maps_from_a_cache_or_images_from_tars(config_for, tiny_cache, tiny_weights, digits_tars):
    val_cache = tiny_cache(policy="eval")
    copied = config_for("copy", val_cache=val_cache, validate_every=2.0)
    score = train(copied).validation
    assert score.num_samples == 48
    rows = read_metrics(copied.out, "validation")
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    assert (rows[-1]["top1"], rows[-1]["loss"]) == (score.top1, score.loss)
    tars = str(digits_tars[0].parent)
    for mode in ("distill", "scratch"):
        scores = [train(config_for(mode, **v)).validation for v in ({"val_cache": val_cache}, {"val_data": tars})]
        assert scores[0] == scores[1]
    live = config_for(
        "copy", cache=tiny_cache(codec="exact:dtype=float32"), val_data=tars, live_teacher=True, weights=tiny_weights
    )
    assert train(live).validation.loss == pytest.approx(score.loss, rel=1e-3)


def test_scratch_and_finetune_can_do_without_a_cache(config_for, digits_tars, tiny_vit, tiny_weights):
    tars = str(digits_tars[0].parent)
    for mode, weights in (("scratch", None), ("finetune", tiny_weights)):
        kept = config_for(mode, cache=None, data=tars, student=tiny_vit, weights=weights)
        read = replace(kept, out=kept.out.with_name(f"read-{mode}"), keep_mib=0)
        train(kept)
        train(read)
        assert_equal_weights(kept, read)
    start = training_of(kept)
    assert torch.equal(
        start.student.model.blocks[0].attn.qkv.weight, load_file(tiny_weights)["blocks.0.attn.qkv.weight"]
    )


def test_a_subset_trains_on_so_many_samples(config_for):
    run = training_of(config_for("scratch", subset=20))
    label_S = run.data.label_S
    assert len(run.data.order.sample_S) == 20
    assert sorted(label_S[run.data.order.sample_S].tolist()) == sorted([*range(10)] * 2)
    with pytest.raises(ConfigError, match="subset=49: only 48 samples can be used"):
        train(config_for("scratch", subset=49))


def test_a_distilled_student_is_a_plain_timm_model(config_for):
    config = config_for("distill")
    train(config)
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )
    assert not any(plain.load_state_dict(weights_of(config), strict=True))


def test_label_smoothing_is_that_of_torch(config_for):
    run = training_of(config_for("scratch", label_smoothing=0.5))
    batch = next(batches_of(run))
    logits = run.student.model(images_of(run, batch)).detach()
    loss = torch.nn.functional.cross_entropy(logits, batch.label_B)
    towards_all = -torch.log_softmax(logits, 1).mean()
    assert float(run.train_step(batch)["loss"]) == pytest.approx(float(0.5 * loss + 0.5 * towards_all), rel=1e-5)


def test_missing_components_are_warned_about(config_for, tiny_vit, capsys):
    config = config_for("distill", student=f"{tiny_vit},init_values=0.1", steps=1)
    (note,) = open_training_data([config], CPU)[0].notes
    assert note.startswith("WARNING: the student's architecture differs from the teacher's: ")
    assert "LayerScale" in note
    assert note.endswith("leave --student out to use the teacher's own architecture.")
    train(config)
    assert note in capsys.readouterr().err
    others = config_for("distill", student=tiny_vit), config_for("scratch", student=f"{tiny_vit},init_values=0.1")
    assert [open_training_data([other], CPU)[0].notes for other in others] == [(), ()]


STUDENT = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=2"


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (STUDENT.replace("heads=2", "heads=4"), "has 4 heads a layer, the teacher 2"),
        (STUDENT.replace("patch_size=2", "patch_size=4"), r"1 \+ 2x2 tokens, the teacher 1 \+ 4x4 tokens"),
        (STUDENT + ",class_token=False,global_pool=avg", r"0 \+ 4x4 tokens, the teacher 1 \+ 4x4 tokens"),
        (STUDENT.replace("depth=2", "depth=1"), "1 layers and so no layer 1"),
    ],
)
@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_students_that_the_maps_do_not_fit_are_refused(mode, student, message, config_for):
    with pytest.raises(TeacherError, match=message):
        train(config_for(mode, student=student))


def test_other_image_sizes_are_refused(config_for):
    larger = STUDENT.replace("img_size=8", "img_size=16")
    expected = r"the views of .* are 8 x 8 pixels, the student takes 16 x 16\. Give --student with img_size=8"
    with pytest.raises(ConfigError, match=expected):
        train(config_for("scratch", student=larger))
    same_grid = larger.replace("patch_size=2", "patch_size=4")
    with pytest.raises(ConfigError, match=expected):
        train(config_for("copy", student=same_grid))


def test_an_unfinished_cache_is_refused(config_for, digits_tars, tiny_vit, tiny_weights, tmp_path):
    out = tmp_path / "half.zarr"
    build(
        BuildConfig(
            teacher=tiny_vit, weights=tiny_weights, data=str(digits_tars[0]), out=out, workers=0, samples_per_shard=8
        )
    )
    commit_path(out, CacheReader(out).layout.tasks()[1]).unlink()
    expected = r"half\.zarr is not complete: 1 of 2 tasks are missing\. Run its `atcache build` command again"
    with pytest.raises(CacheMismatchError, match=expected):
        train(config_for("scratch", cache=out))


def test_a_cache_that_does_not_say_what_its_teacher_was_is_refused(tiny_cache, config_for, tmp_path):
    root = json.loads((tiny_cache() / "zarr.json").read_text())
    del root["attributes"]["atcache"]["geometry"]
    (tmp_path / "other.zarr").mkdir()
    (tmp_path / "other.zarr" / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CorruptCacheError, match=r'other\.zarr/zarr\.json says nothing of "geometry"'):
        train(config_for("copy", cache=tmp_path / "other.zarr"))


def test_a_layer_that_the_cache_does_not_hold_is_refused(config_for, tiny_cache):
    with pytest.raises(ConfigError, match="layer 0 is not in the cache, which holds layers 1"):
        train(config_for("distill", cache=tiny_cache(layers="1"), layers="0"))


@pytest.fixture(scope="session")
def other_weights(tiny_weights, tmp_path_factory):
    """Weights of the same architecture that give other maps."""
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(tiny_weights).items()}, path)
    return path


def test_validation_that_does_not_fit_the_student_is_refused(config_for, tiny_cache, digits_tars, other_weights):
    other = tiny_cache(policy="eval", weights=other_weights)
    with pytest.raises(
        CacheMismatchError, match=r"holds maps of .* \(sha256 .*\), the student copies .* with the same t"
    ):
        train(config_for("copy", val_cache=other))
    with pytest.raises(CacheMismatchError, match="has no maps of layer 0, which the student copies"):
        train(config_for("copy", val_cache=tiny_cache(policy="eval", layers="1")))
    with pytest.raises(CacheMismatchError, match="has no maps of head 0, which the student copies"):
        train(config_for("copy", val_cache=tiny_cache(policy="eval", heads="1")))
    with pytest.raises(ConfigError, match="a copying student needs the teacher's maps to predict: give a validation"):
        train(config_for("copy", val_data=str(digits_tars[0])))
    # Students with attention of their own do not mind whose maps these are.
    assert train(config_for("distill", steps=1, val_cache=other)).validation.num_samples == 48


def test_weights_other_than_the_caches_teacher_are_refused(config_for, other_weights):
    with pytest.raises(
        CacheMismatchError, match=r"finetune would begin from other\.safetensors .* the cache's teacher"
    ):
        train(config_for("finetune", weights=other_weights))
    with pytest.raises(CacheMismatchError, match=r"from other\.safetensors has weights of sha256 .*, expected"):
        train(config_for("copy", live_teacher=True, weights=other_weights))


def test_a_loss_that_is_no_number_stops_the_run(config_for):
    config = config_for("scratch", base_lr=1e30, warmup_epochs=0.0)
    with pytest.raises(ConfigError, match=r"step 10: the loss is (nan|inf)\. Lower --base-lr or give --clip-grad 1"):
        train(config)
    assert not (config.out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "imitate"}, "mode='imitate': expected one of copy, distill, scratch, finetune"),
        ({"steps": 0}, "steps=0: expected more than 0"),
        ({"subset": 0}, "subset=0: expected more than 0"),
        ({"accumulate": 5}, "batch_size=256 cannot be cut into accumulate=5 equal parts"),
        ({"ema": 1.0}, "ema=1.0: expected 0 or more, and less than 1"),
        ({"drop_path": -0.1}, "drop_path=-0.1: expected 0 or more, and less than 1"),
        ({"layer_decay": 1.5}, "layer_decay=1.5: expected more than 0, and at most 1"),
        ({"clip_grad": 0.0}, "clip_grad=0.0: expected more than 0"),
        (
            {"min_lr": 2e-3, "batch_size": 128},
            r"min_lr=0\.002 is over the learning rate 0\.0005 .*: it would rise\. Lower",
        ),
        ({"workers": -1}, "workers=-1: expected 0 or more"),
        ({"validate_every": -1.0}, "validate_every=-1.0: expected 0 or more"),
        ({"cache": None}, "mode copy needs the teacher's attention: give --cache"),
        ({"cache": None, "mode": "scratch", "data": "tars"}, "without --cache, give --data and --student"),
        ({"mode": "scratch", "live_teacher": True}, "live_teacher is for copy and distill: mode scratch uses"),
        ({"mode": "finetune", "layers": "0"}, "layers is for copy and distill: mode finetune uses"),
        ({"mode": "copy", "weights": Path("w")}, "weights are for finetune and --live-teacher: mode copy begins fresh"),
        ({"mode": "scratch", "policy": "eval"}, "policy=eval: the views of .* are drawn already"),
        ({"attention_weight": 1.0}, r"attention_weight=1\.0: mode copy has no attention loss to weigh\. Leave"),
        ({"beta2": 1.0}, r"beta2=1\.0: expected 0 or more, and less than 1"),
        *(
            ({name: value}, f"{name}={value}: expected a number")
            for name in ("epochs", "base_lr", "weight_decay", "clip_grad", "min_lr", "warmup_epochs", "validate_every")
            for value in (float("nan"), float("inf"))
        ),
        ({"seed": 2**63}, r"seed=9223372036854775808: expected 0 to 9223372036854775807"),
    ],
)
def test_values_that_cannot_be_used_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"mode": "copy", "out": Path("run"), "cache": Path("c.zarr"), **fields})


def test_a_refused_run_leaves_nothing_that_stands_in_the_way_of_the_right_one(config_for):
    config = config_for("scratch", steps=2)
    with pytest.raises(ConfigError, match="optimizer"):
        train(replace(config, optimizer="nosuch"))
    assert not config.out.exists()
    wild = replace(config, base_lr=1e30, steps=20, checkpoint_every=15)
    with pytest.raises(ConfigError, match="step 10: the loss is"):
        train(wild)
    assert not (config.out / "checkpoint.pt").exists()
    assert train(config).steps == 2


def test_the_labels_say_how_many_classes_a_student_has(config_for, tiny_vit, capsys):
    for num_classes in (5, 0, 10):
        student = tiny_vit.replace("num_classes=10", f"num_classes={num_classes}")
        config = config_for("copy", student=student, steps=1)
        train(config)
        assert weights_of(config)["head.bias"].shape == (10,)
        said = "NOTE: the student's num_classes=5 is not used: the labels are of 10 classes, from 0." in (
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
        "Build it with more --views, or vary what is seen with --student-jitter."
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


def test_an_optimizer_that_timm_does_not_know_is_refused(config_for):
    with pytest.raises(ConfigError, match=r"optimizer='adamx': .*timm\.optim\.list_optimizers\(\) names all"):
        train(config_for("scratch", optimizer="adamx"))


def test_beta2_reaches_every_optimizer_with_two_betas_and_is_refused_by_others(config_for):
    def betas(**fields):
        (betas,) = {group.get("betas") for group in training_of(config_for("scratch", **fields)).optimizer.param_groups}
        return betas

    assert betas() == (0.9, 0.999)
    assert betas(beta2=0.95) == (0.9, 0.95)
    assert betas(optimizer="lion") == (0.9, 0.99)
    assert betas(optimizer="lion", beta2=0.95) == (0.9, 0.95)
    assert betas(optimizer="sgd") is None
    for name in ("sgd", "adan", "adafactor"):
        with pytest.raises(ConfigError, match=rf"beta2=0\.95: optimizer='{name}' does not have two betas\. Leave"):
            training_of(config_for("scratch", optimizer=name, beta2=0.95))


def test_every_field_of_the_config_is_an_option_of_the_command():
    options = {parameter.name for parameter in cli.get_command(None, "train").params}
    assert options == {field.name for field in dataclasses.fields(TrainConfig)} | {"sweep"}


def test_the_command_prints_the_summary(tiny_cache, tmp_path):
    arguments = ["train", "--mode", "copy", "--cache", str(tiny_cache()), "--out", str(tmp_path / "run")]
    arguments += ["--val-cache", str(tiny_cache(policy="eval")), "--steps", "4", "--batch-size", "24"]
    done = CliRunner().invoke(cli, [*arguments, "--device", "cpu", "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["mode"], summary["steps"], summary["validation"]["num_samples"]) == ("copy", 4, 48)
    refused = CliRunner().invoke(cli, [*arguments, "--device", "cpu", "--precision", "fp32", "--seed", "1"])
    assert refused.exit_code == 1
    assert "--seed is 0 there and 1 here" in refused.stderr


def test_whoever_may_read_the_run_may_read_its_weights(config_for):
    config = config_for("scratch", steps=1)
    train(config)
    weights, folder = config.out / "model.safetensors", config.out
    assert weights.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt", "config.json", "zarr.json"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(name, config_for):
    config = config_for("scratch", steps=1)
    config.out.mkdir(parents=True)
    (config.out / name).write_bytes(b"precious")
    with pytest.raises(ConfigError, match=rf"holds something else: there is {name}, but no run\.json"):
        train(config)
    assert [file.name for file in config.out.iterdir()] == [name]
    assert (config.out / name).read_bytes() == b"precious"
