"""Learning rates, decay, clipping and averages are what the config says, layer by layer."""

from __future__ import annotations

import pytest
import torch
from training_runs import batches_of, images_of, training_of, weights_of

from atcache.choices import MODES
from atcache.errors import ConfigError
from atcache.pipelines.running.metrics import read_metrics
from atcache.pipelines.train.run import train


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


def test_drop_path_rises_to_its_value_over_the_blocks(config_for):
    for mode in MODES[:3]:
        blocks = training_of(config_for(mode, drop_path=0.3)).student.model.blocks
        assert [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.0, 0.3])


def test_label_smoothing_is_that_of_torch(config_for):
    run = training_of(config_for("scratch", label_smoothing=0.5))
    batch = next(batches_of(run))
    logits = run.student.model(images_of(run, batch)).detach()
    loss = torch.nn.functional.cross_entropy(logits, batch.label_B)
    towards_all = -torch.log_softmax(logits, 1).mean()
    assert float(run.train_step(batch)["loss"]) == pytest.approx(float(0.5 * loss + 0.5 * towards_all), rel=1e-5)


def test_an_optimizer_that_timm_does_not_know_is_refused(config_for):
    with pytest.raises(ConfigError, match=r"optimizer='adamx': .*timm\.optim\.list_optimizers\(\) lists all names"):
        train(config_for("scratch", optimizer="adamx"))
    with pytest.raises(
        ConfigError, match=r"optimizer='bnbadam': .* those of bnb and fused need libraries of their own"
    ):
        train(config_for("scratch", optimizer="bnbadam"))
    with pytest.raises(ConfigError, match=r"optimizer='adahessian' needs second derivatives"):
        train(config_for("scratch", optimizer="adahessian"))


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
