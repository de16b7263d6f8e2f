"""Training from a cache equals training with the teacher, and continues exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file
from training_runs import assert_equal_weights, batches_of, losses_of, run_until_killed, training_of, weights_of

from atcache.choices import MODES
from atcache.errors import CacheMismatchError, ConfigError
from atcache.feed.loader import BatchStream
from atcache.pipelines.running.metrics import Speed, read_metrics
from atcache.pipelines.train.data import open_training_data
from atcache.pipelines.train.run import train
from atcache.pipelines.train.student_run import Reports, TrainingRun


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


def test_without_validation_the_ends_of_epochs_save_nothing(config_for):
    config = config_for("copy", steps=5, checkpoint_every=1000, validate_every=1.0)
    (data,) = open_training_data([config], torch.device("cpu"))
    run = TrainingRun(config, data, torch.device("cpu"))
    for batch in BatchStream(data.views, data.label_S, data.order, num_steps=4):  # two epochs
        run.take(batch, Speed(1), Reports())
        assert not run.checkpoint.exists()
    assert run.step == 4


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


def test_whoever_may_read_the_run_may_read_its_weights(config_for):
    config = config_for("scratch", steps=1)
    train(config)
    weights, folder = config.out / "model.safetensors", config.out
    assert weights.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666
