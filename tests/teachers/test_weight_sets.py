"""A model's weights are found in a checkpoint whatever its wrappers and its other sets are, and a note says which."""

from __future__ import annotations

import argparse
import itertools
import logging

import numpy as np
import pytest
import torch

from atcache.errors import TeacherError
from atcache.teachers.load import create_student, load_teacher
from atcache.teachers.names import parse_model_name
from atcache.teachers.weight_files import read_weights
from atcache.teachers.weights import load_weights, weights_sha256

TINY = "vit_tiny_patch16_224:img_size=32,embed_dim=32,depth=2,num_heads=2"
LABEL = "NOTE: vit_tiny_patch16_224: "

State = dict[str, torch.Tensor]


def fresh(seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_student(parse_model_name(TINY), 5)


@pytest.fixture(scope="module")
def state() -> State:
    return dict(fresh(0).state_dict())


@pytest.fixture
def other(state) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def loaded(checkpoint: object, tmp_path) -> torch.nn.Module:
    torch.save(checkpoint, tmp_path / "w.pth")
    model = fresh()
    load_weights(model, read_weights(tmp_path / "w.pth"))
    return model


def same(model: torch.nn.Module, state: State) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "wrappers",
    [
        *itertools.permutations(["module.", "_orig_mod.", "model."]),
        ("module.", "module."),
        ("_fsdp_wrapped_module.", "_orig_mod.", "model.", "backbone."),
        ("_forward_module.", "model.", "net."),
        ("whatever.its.author.called.it.",),
    ],
    ids="".join,
)
def test_prefixes_in_any_order_are_taken_off(wrappers, state, tmp_path):
    assert same(loaded({"state_dict": behind("".join(wrappers), state)}, tmp_path), state)


@pytest.mark.parametrize("inserted", ["_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"])
def test_what_is_inserted_at_each_block_is_taken_out(inserted, state, tmp_path):
    named = {}
    for name, tensor in state.items():
        parts = name.split(".")
        named[".".join([*parts[:2], inserted, *parts[2:]]) if parts[0] == "blocks" else name] = tensor
    assert named.keys() != state.keys()
    assert same(loaded(behind(f"{inserted}.", named), tmp_path), state)


def test_lightnings_checkpoint(state, tmp_path, caplog):
    caplog.set_level(logging.INFO, "atcache")
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": behind("model.backbone.", state) | {"criterion.weight": torch.ones(5)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "dirpath": "/x"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "hyper_parameters": {"lr": np.float64(0.1)},
    }
    assert same(loaded(checkpoint, tmp_path), state)
    assert caplog.messages == [
        f'{LABEL}the weights are those behind "state_dict.model.backbone." in the file\'s names.'
    ]


def test_dinov2s_training_checkpoint_with_blocks_in_chunks(state, other, tmp_path, caplog):
    caplog.set_level(logging.INFO, "atcache")
    # Of four blocks in two chunks, numbers run through: blocks.1.2 is the third.
    deep = create_student(parse_model_name(TINY.replace("depth=2", "depth=4")), 5)
    chunked = {
        name.replace("blocks.", f"blocks.{int(name.split('.')[1]) // 2}.") if name.startswith("blocks.") else name: t
        for name, t in deep.state_dict().items()
        if not name.startswith("head.")
    } | {"mask_token": torch.zeros(1, 32)}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in chunked.items()}
    assert "blocks.1.3.attn.qkv.weight" in chunked
    heads = {"teacher.dino_head.last_layer.weight": torch.zeros(8, 4), "student.dino_head.mlp.0.weight": torch.zeros(4)}
    checkpoint = {
        "model": behind("teacher.backbone.", chunked) | behind("student.backbone.", zeros) | heads,
        "iteration": 9,
    }
    torch.save(checkpoint, tmp_path / "w.pth")
    model = create_student(parse_model_name(TINY.replace("depth=2", "depth=4")), 5)
    load_weights(model, read_weights(tmp_path / "w.pth"))
    assert torch.equal(model.blocks[3].attn.qkv.weight, deep.blocks[3].attn.qkv.weight)
    assert weights_sha256(model, without=("head.",)) == weights_sha256(deep, without=("head.",))
    assert caplog.messages[0] == (
        f'{LABEL}the weights are those behind "model.teacher.backbone." in the file\'s names; '
        "'model.student.backbone.' would fit as well (averaged weights and teachers are taken before others); to have "
        "another set, save it alone."
    )
    assert caplog.records[0].levelno == logging.WARNING  # so that it is seen from Python, too


@pytest.mark.parametrize(
    ("averaged", "last"),
    [
        ("state_dict_ema", "state_dict"),
        ("model_ema", "model"),
        ("ema.module", "module"),
        ("ema_model", "model"),
        ("teacher", "student"),
        ("momentum_encoder", "base_encoder"),
        ("target_encoder", "encoder"),
        ("swa_model", "aaa"),
    ],
)
@pytest.mark.parametrize("averaged_is_first", [True, False])
def test_averaged_weights_are_taken_before_the_last(averaged, last, averaged_is_first, state, other, tmp_path, caplog):
    caplog.set_level(logging.INFO, "atcache")
    sets = [(averaged, state), (last, other)]
    assert same(loaded(dict(sets if averaged_is_first else sets[::-1]), tmp_path), state)
    assert f'behind "{averaged}."' in caplog.messages[0]
    assert f"'{last}.' would fit as well" in caplog.messages[0]


def test_a_student_that_fits_is_taken_if_the_teacher_is_another_model(state, tmp_path):
    wide = create_student(parse_model_name(TINY.replace("embed_dim=32", "embed_dim=64")), 5).state_dict()
    assert same(loaded({"teacher": dict(wide), "student": state}, tmp_path), state)


def test_the_choice_between_equals_does_not_depend_on_their_order(state, other, tmp_path):
    for checkpoint in ({"b": other, "a": state}, {"a": state, "b": other}):
        assert same(loaded(checkpoint, tmp_path), state)


def test_an_mae_checkpoint_of_any_wrapping_loses_its_decoder(state, tmp_path):
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    decoder |= {f"decoder_blocks.{n}.norm1.weight": torch.zeros(8) for n in range(8)}
    assert same(loaded({"model": behind("module.", state | decoder), "args": argparse.Namespace()}, tmp_path), state)


def test_optimizer_moments_named_like_weights_are_no_weights(state, other, tmp_path):
    assert same(loaded({"model": state, "optimizer": {"teacher": other}}, tmp_path), state)


def test_plain_names_give_no_note(state, tmp_path, caplog):
    caplog.set_level(logging.INFO, "atcache")
    assert same(loaded(state, tmp_path), state)
    assert caplog.messages == []


def test_a_teachers_sha256_is_the_same_in_any_wrapping(state, tmp_path):
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"model": behind("module.", state)}, tmp_path / "wrapped.pth")
    assert len({load_teacher(TINY, weights=tmp_path / f"{n}.pth").weights_sha256 for n in ("plain", "wrapped")}) == 1


def test_a_refused_file_says_what_it_holds_what_was_expected_and_what_is_nearest(state, tmp_path):
    part = {n: t for n, t in behind("net.", state).items() if "blocks.1." not in n}
    torch.save({"weights": part, "loss": {"scale": torch.zeros(7)}}, tmp_path / "w.pth")
    model = fresh()
    before = weights_sha256(model)
    with pytest.raises(TeacherError) as error:
        load_weights(model, read_weights(tmp_path / "w.pth"))
    assert weights_sha256(model) == before
    text = str(error.value)
    assert "12 of 32 tensors are missing in the weights, the first blocks.1.norm1.weight" in text
    assert "The file holds 21 tensors, the first weights.net.cls_token (1, 1, 32)" in text
    assert "at its top level weights (20), loss (1)" in text
    assert "Expected: cls_token (1, 1, 32), pos_embed (1, 5, 32), patch_embed.proj.weight (32, 3, 16, 16)" in text
    assert 'Nearest: behind "weights.net.", 16 of 28 names and shapes agree' in text
    assert "\n" not in text


def test_a_flattened_file_of_fsdp_is_named(tmp_path):
    with pytest.raises(
        TeacherError, match=r"are missing in the weights.*of FSDP, which has flattened.*full state dict"
    ):
        loaded({"model": {"_fsdp_wrapped_module._flat_param": torch.zeros(99)}}, tmp_path)


def test_a_file_of_another_kind_of_model_is_shown_as_it_stands(tmp_path):
    torch.save({f"layer{n}.conv.weight": torch.zeros(4, 3, 3, 3) for n in range(40)}, tmp_path / "w.pth")
    message = r"28 of 32 tensors are missing.*layer0.conv.weight \(4, 3, 3, 3\).*and 32 more.*as the names stand, 0 of"
    with pytest.raises(TeacherError, match=message):
        load_weights(fresh(), read_weights(tmp_path / "w.pth"))


def test_clips_visual_tower_is_found_beside_its_text_tower(tmp_path):
    name = "vit_base_patch16_clip_224:img_size=32,embed_dim=32,depth=2,num_heads=2"
    model = create_student(parse_model_name(name), 0)
    swaps = [
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("blocks.", "transformer.resblocks."),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
    ]
    visual = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in swaps:
            key = key.replace(ours, theirs)
        visual["ln_post." + key.removeprefix("norm.") if key.startswith("norm.") else key] = tensor
    visual["class_embedding"] = visual.pop("cls_token")[0, 0]
    visual["positional_embedding"] = visual.pop("pos_embed")[0]
    text = {"positional_embedding": torch.zeros(77, 32), "transformer.resblocks.0.ln_1.weight": torch.zeros(32)}
    torch.save({"state_dict": behind("module.", behind("visual.", visual) | text)}, tmp_path / "w.pt")
    ours = create_student(parse_model_name(name), 0)
    load_weights(ours, read_weights(tmp_path / "w.pt"))
    assert weights_sha256(ours) == weights_sha256(model)


def test_two_tensors_of_one_plain_name_are_refused(state, tmp_path):
    doubled = state | {"blocks.0._orig_mod.norm1.weight": torch.zeros(32)}
    torch.save(doubled, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"two tensors of the weights are blocks.0.norm1.weight without"):
        load_weights(fresh(), read_weights(tmp_path / "w.pth"))


@pytest.mark.parametrize("family", ["eva02_tiny_patch14_224", "deit3_small_patch16_224", "vit_small_patch16_dinov3"])
def test_families_with_their_own_conversion_are_found_in_wrappings_too(family, tmp_path, capsys):
    name = f"{family}:img_size=32,patch_size=16,embed_dim=32,depth=2,num_heads=2"
    torch.manual_seed(0)
    theirs, ours = (create_student(parse_model_name(name), 0) for _ in range(2))
    wrapped = {"model": behind("module.backbone.", dict(theirs.state_dict()))}
    torch.save(wrapped, tmp_path / "w.pth")
    load_weights(ours, read_weights(tmp_path / "w.pth"))
    assert weights_sha256(ours) == weights_sha256(theirs)
    assert capsys.readouterr().out == ""
