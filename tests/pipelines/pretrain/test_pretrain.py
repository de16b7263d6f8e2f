"""Masked autoencoding hides what it should, learns, and continues exactly where it stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from atcache.cli.main import cli
from atcache.errors import CacheMismatchError, ConfigError
from atcache.feed.sample_views import FreshViews
from atcache.pipelines.pretrain.autoencoder import MaskedAutoencoder, PatchMask, num_kept_patches
from atcache.pipelines.pretrain.config import PretrainConfig
from atcache.pipelines.pretrain.run import pretrain
from atcache.teachers.load import load_teacher

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit without a class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "eva02, rotary": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "dinov3, rotary without positions": ("vit_small_patch16_dinov3", {}),
}


def autoencoder(family: str = "vit", **arguments) -> MaskedAutoencoder:
    name, model_arguments = FAMILIES[family]
    torch.manual_seed(0)
    encoder = timm.create_model(name, **{"img_size": 64, "depth": 2, "num_classes": 0, **model_arguments})
    return MaskedAutoencoder(encoder, **{"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, **arguments})


def some_images(model: MaskedAutoencoder, count: int = 3) -> torch.Tensor:
    height, width = model.encoder.patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def config_for(tars: list[Path], model: str, out: Path, **fields) -> PretrainConfig:
    return PretrainConfig(
        **{
            "model": model,
            "data": str(tars[0].parent),
            "out": out,
            "steps": 12,
            "batch_size": 32,
            "decoder_dim": 32,
            "policy": "eval",
            "precision": "fp32",
            "device": "cpu",
            **fields,
        }
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_runs_on_the_prefix_and_a_quarter_of_the_patches(family):
    model = autoencoder(family)
    seen = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _block, args: seen.append(args[0].shape))
    images = some_images(model)
    order_BT = model.draw_order(len(images), torch.Generator().manual_seed(0))
    model(images, order_BT)
    assert model.tokens.num_patches == 16
    assert model.num_kept == 4
    assert seen == [(3, model.tokens.num_prefix_tokens + 4, model.encoder.embed_dim)]


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_depend_on_every_seen_patch_and_on_no_hidden_one(family):
    model = autoencoder(family).eval()
    images = some_images(model, 1).requires_grad_()
    order_BT = model.draw_order(1, torch.Generator().manual_seed(3))
    keep_BK, hidden_BT = order_BT[:, :4], order_BT[:, 4:]
    model.predict(images, keep_BK, hidden_BT).square().sum().backward()
    reach_T = model.patches(images.grad)[0].abs().sum(-1)
    assert bool((reach_T[keep_BK[0]] > 0).all())
    assert bool((reach_T[hidden_BT[0]] == 0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_patches_in_order_is_the_plain_model(family):
    model = autoencoder(family).eval()
    images = some_images(model)
    with torch.no_grad():
        plain = model.encoder.forward_features(images)
        model.mask.keep_BK = torch.arange(16).expand(3, -1)
        masked = model.encoder.forward_features(images)
    torch.testing.assert_close(masked, plain, atol=1e-4, rtol=1e-4)


def test_the_loss_is_over_hidden_patches_only():
    model = autoencoder().eval()
    images = some_images(model)
    order_BT = model.draw_order(3, torch.Generator().manual_seed(0))
    predicted_BTC = model.predict(images, order_BT[:, :4], order_BT[:, 4:]).detach()
    total, count = 0.0, 0
    for image in range(3):
        for position, patch in enumerate(order_BT[image, 4:].tolist()):
            row, column = divmod(patch, 4)
            pixels = images[image, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            target = pixels.permute(1, 2, 0).reshape(-1)
            target = (target - target.mean()) / math.sqrt(float(target.var()) + 1e-6)
            total += float((predicted_BTC[image, position] - target).square().sum())
            count += target.numel()
    assert model(images, order_BT).item() == pytest.approx(total / count, rel=1e-5)


def test_targets_may_stay_unnormalised():
    model = autoencoder(normalise_targets=False).eval()
    images = some_images(model)
    order_BT = model.draw_order(3, torch.Generator().manual_seed(0))
    predicted_BTC = model.predict(images, order_BT[:, :4], order_BT[:, 4:]).detach()
    targets_BTC = model.patches(images).gather(1, order_BT[:, 4:, None].expand(-1, -1, 768))
    expected = (predicted_BTC - targets_BTC).square().mean().item()
    assert model(images, order_BT).item() == pytest.approx(expected)


def test_masks_are_drawn_evenly_and_from_the_generator_alone():
    model = autoencoder()
    order_BT = model.draw_order(4000, torch.Generator().manual_seed(0))
    assert torch.equal(order_BT.sort(1).values, torch.arange(16).expand(4000, -1))
    share_T = torch.bincount(order_BT[:, :4].flatten(), minlength=16) / 4000
    assert float((share_T - 0.25).abs().max()) < 0.03
    assert torch.equal(order_BT, model.draw_order(4000, torch.Generator().manual_seed(0)))


def test_a_mask_that_was_told_nothing_keeps_all():
    tokens_BTC = torch.randn(2, 5, 3)
    assert PatchMask(1, returns_indices=False)(tokens_BTC) is tokens_BTC
    assert PatchMask(1, returns_indices=True)(tokens_BTC) == (tokens_BTC, None)


def test_the_encoder_keeps_timms_names_and_no_others():
    model = autoencoder("eva02, rotary")
    plain = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=0)
    assert model.encoder.state_dict().keys() == plain.state_dict().keys()


def test_positions_and_mask_token_are_not_decayed():
    assert autoencoder().no_weight_decay() >= {"encoder.pos_embed", "encoder.cls_token", "mask_token"}


def test_models_that_need_all_patches_are_refused():
    with pytest.raises(ConfigError, match="beitv2_base_patch16_224 cannot run on a part of its patches"):
        MaskedAutoencoder(timm.create_model("beitv2_base_patch16_224", depth=1, img_size=32))


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_ratios_that_hide_nothing_or_everything_are_refused(ratio):
    with pytest.raises(ConfigError, match="at least 1 seen and 1 hidden"):
        num_kept_patches(16, ratio)


def test_the_loss_falls_and_the_weights_make_a_teacher(digits_tars, tiny_vit, tmp_path):
    config = config_for(digits_tars, tiny_vit, tmp_path / "out", steps=300, base_lr=4e-2, warmup_steps=20)
    summary = pretrain(config)
    assert (
        summary.final_loss < 0.85 * summary.first_loss
    )  # the first is a mean over 50 steps, when it has fallen already
    assert summary.final_loss < 0.6  # guessing each patch's mean gives 1
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert summary.final_loss == rows[-1]["loss"]
    assert rows[-1]["lr"] < 0.01 * config.lr
    files = {path.name for path in config.out.iterdir() if not path.name.startswith("events.")}
    assert files == {"config.json", "metrics.jsonl", "model.safetensors"}
    teacher = load_teacher(summary.model, weights=summary.weights)
    assert torch.equal(teacher.model.blocks[1].attn.qkv.weight, load_file(summary.weights)["blocks.1.attn.qkv.weight"])


class Interrupted(Exception):
    """Stands for a crash."""


def test_a_run_that_died_continues_to_the_same_weights(digits_tars, tiny_vit, tmp_path, monkeypatch):
    fields = {"policy": "crop-flip", "checkpoint_every": 5, "batch_size": 20}
    model = f"{tiny_vit},drop_path_rate=0.3,pos_drop_rate=0.1"
    config = config_for(digits_tars, model, tmp_path / "whole", **fields)
    whole = pretrain(config)
    died = replace(config, out=tmp_path / "died")
    read, num_reads = FreshViews.read, 0

    def dies_at_step_8(views, sample, epoch):
        nonlocal num_reads
        num_reads += 1
        if num_reads > 8 * died.batch_size:
            raise Interrupted
        return read(views, sample, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(FreshViews, "read", dies_at_step_8)
        with pytest.raises(Interrupted):
            pretrain(died)
    assert torch.load(died.out / "checkpoint.pt", weights_only=True)["step"] == 5
    assert not (died.out / "model.safetensors").exists()
    torch.manual_seed(99)
    assert pretrain(died).weights_sha256 == whole.weights_sha256
    assert not (died.out / "checkpoint.pt").exists()
    steps = [json.loads(line)["step"] for line in (died.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [12]


def test_a_finished_run_is_not_run_again(digits_tars, tiny_vit, tmp_path):
    config = config_for(digits_tars, tiny_vit, tmp_path / "out")
    summary = pretrain(config)
    changed_at = (config.out / "model.safetensors").stat().st_mtime_ns
    assert pretrain(replace(config, workers=1, precision="auto")) == summary  # which it was begun in
    assert (config.out / "model.safetensors").stat().st_mtime_ns == changed_at


def test_another_config_in_the_same_folder_is_refused_by_name(digits_tars, tiny_vit, tmp_path):
    config = config_for(digits_tars, tiny_vit, tmp_path / "out")
    pretrain(config)
    with pytest.raises(CacheMismatchError, match="--seed is 0 there and 1 here; --steps is 12 there and 13 here"):
        pretrain(replace(config, seed=1, steps=13))
    with pytest.raises(CacheMismatchError, match="another run: its images are different"):
        pretrain(replace(config, data=str(digits_tars[0])))


@pytest.mark.parametrize("name", ["run.json", "model.safetensors"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(name, digits_tars, tiny_vit, tmp_path):
    out = tmp_path / "students"
    out.mkdir()
    (out / name).write_bytes(b"precious")
    with pytest.raises(ConfigError, match=rf"holds something else: there is {name}, but no config\.json"):
        pretrain(config_for(digits_tars, tiny_vit, out))
    assert [(file.name, file.read_bytes()) for file in out.iterdir()] == [(name, b"precious")]


def test_pretraining_leaves_the_callers_random_numbers_alone(digits_tars, tiny_vit, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    pretrain(config_for(digits_tars, tiny_vit, tmp_path / "out", steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_no_number_stops_the_run(digits_tars, tiny_vit, tmp_path):
    config = config_for(digits_tars, tiny_vit, tmp_path / "out", steps=6, base_lr=1e30, warmup_steps=0)
    with pytest.raises(
        ConfigError, match=r"the loss is (nan|inf) after 6 steps, expected a finite one\. Lower base_lr"
    ):
        pretrain(config)
    assert not (config.out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0: expected more than 0 and less than 1"),
        ({"base_lr": 0.0}, "base_lr=0.0: expected more than 0"),
        ({"warmup_steps": 12}, "warmup_steps=12: expected at most 11"),
        ({"workers": -1}, "workers=-1: expected at least 0"),
        ({"base_lr": float("inf")}, "base_lr=inf: expected a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay=nan: expected a finite number"),
        ({"seed": 2**63}, "seed=9223372036854775808: expected 0 to"),
        ({"decoder_heads": -2}, "decoder_heads=-2: expected at least 1"),
    ],
)
def test_values_that_cannot_be_used_are_refused(fields, message, digits_tars, tiny_vit, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_for(digits_tars, tiny_vit, tmp_path, **fields)


def test_a_decoder_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="decoder_dim 30: expected a multiple of 4 and of 2 heads"):
        autoencoder(decoder_dim=30)


def test_the_command_prints_the_summary(digits_tars, tiny_vit, tmp_path):
    arguments = ["--model", tiny_vit, "--data", str(digits_tars[0].parent), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, ["pretrain", *arguments, "--steps", "2", "--batch-size", "8", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["steps"] == 2
    assert Path(summary["weights"]).is_file()


@pytest.mark.parametrize("option", [["--mask-ratio", "0.5"], ["--no-normalise-targets"], ["--decoder-heads", "4"]])
def test_what_is_trained_depends_on_each_option(option, digits_tars, tiny_vit, tmp_path):
    common = ["--model", tiny_vit, "--data", digits_tars[0].parent, "--steps", 1, "--batch-size", 8]
    common += ["--decoder-dim", 32, "--policy", "eval", "--precision", "fp32", "--device", "cpu"]
    losses = []
    for number, options in enumerate([[], option]):
        words = ["pretrain", *map(str, common), *options, "--out", str(tmp_path / str(number))]
        result = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        losses.append(json.loads(result.stdout)["final_loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
