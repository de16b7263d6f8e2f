"""Names lead to timm models, weights are read without running them and must fit, and what differs is said."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from hub_server import serve_hub
from safetensors.torch import save_file

from atcache.errors import ConfigError, TeacherError, UnsupportedAttentionError
from atcache.teachers.components import component_differences
from atcache.teachers.devices import rounded_products
from atcache.teachers.hub import fetch_file
from atcache.teachers.inputs import input_config
from atcache.teachers.load import create_student, load_teacher
from atcache.teachers.names import ALIASES, ModelName, parse_model_name
from atcache.teachers.weight_files import read_weights
from atcache.teachers.weights import load_weights, weights_sha256

TINY = "vit_tiny_patch16_224:img_size=32,embed_dim=48,depth=2,num_heads=3"


@pytest.fixture
def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_student(parse_model_name(TINY), 5)


@pytest.fixture
def tiny_file(tiny, tmp_path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_file(tiny.state_dict(), path)
    return path


@pytest.mark.parametrize("alias", ALIASES)
def test_each_alias_is_a_model_and_a_set_of_weights_timm_knows(alias):
    name = parse_model_name(alias)
    assert timm.is_model(name.architecture)
    if alias != "demo-mae":
        assert name.timm_name in timm.list_pretrained()
        config = timm.models.get_pretrained_cfg(name.timm_name)
        assert config.hf_hub_id
        assert config.license


def test_licences_are_those_of_the_weights():
    def licence(alias):
        return timm.models.get_pretrained_cfg(ALIASES[alias]).license

    assert licence("mae-vit-l") == "cc-by-nc-4.0"
    assert licence("dinov2-vit-l") == "apache-2.0"
    assert licence("dinov3-vit-l") == "dinov3-license"


def test_model_names_survive_being_written_and_read():
    for text in ("mae-vit-l", "demo-mae", f"{TINY},global_pool=avg,mean=(0.5,0.25,0.5),class_token=False"):
        name = parse_model_name(text)
        assert parse_model_name(str(name)) == name


def test_arguments_are_literals_and_text_may_be_unquoted():
    name = parse_model_name(
        "vit_tiny_patch16_224:img_size=(32,64), global_pool=avg, class_token=False, init_values=1e-5"
    )
    assert name == ModelName(
        "vit_tiny_patch16_224",
        {"img_size": (32, 64), "global_pool": "avg", "class_token": False, "init_values": 1e-5},
    )


def test_arguments_after_an_alias_overrule_its_own():
    name = parse_model_name("demo-mae:depth=2")
    assert name.arguments["depth"] == 2
    assert name.arguments["img_size"] == 8


def test_a_name_in_the_home_of_nobody_is_refused():
    with pytest.raises(ConfigError, match="begins with ~, but there is no user 'nouser-of-atcache'"):
        parse_model_name("~nouser-of-atcache/vit")
    for name in ("local-dir:~nouser-of-atcache/vit", "transformers:~nouser-of-atcache/vit"):
        with pytest.raises(ConfigError, match="there is no user 'nouser-of-atcache'"):
            load_teacher(name)
    with pytest.raises(ConfigError, match="there is no user 'nouser-of-atcache'"):
        load_teacher(TINY, weights=Path("~nouser-of-atcache/w.safetensors"))


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("vit_base_patch16_clip_384.laion2b_ft_in1k", "squashes"),
        ("vit_base_patch16_siglip_224.webli", None),
        ("vit_tiny_patch16_224", None),
    ],
)
def test_a_note_says_that_views_are_not_squashed_or_padded_as_timm_does(name, verb, tmp_path, caplog):
    name = f"{name}:img_size=32,embed_dim=48,depth=1,num_heads=3,num_classes=0"
    student = create_student(parse_model_name(name), 0)
    save_file(student.state_dict(), tmp_path / "w.safetensors")
    input_config(student)
    assert not caplog.messages, "it is about teachers only"
    load_teacher(name, weights=tmp_path / "w.safetensors")
    note = f": its own transform {verb} images of another shape than its input. atcache crops the centre instead, "
    assert [note in message for message in caplog.messages] == [True] * (verb is not None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("./", r"If a folder is meant, give local-dir:\./, or transformers:\./"),
        ("mae-vit-x", "model 'mae-vit-x' is unknown. Did you mean .*mae-vit-l"),
        ("v" * 300, "is unknown. timm.list_models"),
        ("vit_tinny_patch16_224", "Did you mean .*vit_tiny_patch16_224"),
        ("zzz", r"timm.list_models\(\) lists all names"),
        ("vit_base_patch16_224.fb", "no weights with this tag. Known: .*vit_base_patch16_224.mae"),
        ("vit_tiny_patch16_224:", "nothing follows the colon"),
        ("vit_tiny_patch16_224:32", "cannot read its arguments '32'. Write name=value"),
        ("vit_tiny_patch16_224:img_size=f()", "cannot read its arguments"),
        ("vit_tiny_patch16_224:img_size=32,img_size=16", "cannot read its arguments"),
        ("vit_tiny_patch16_224:img_size={[1]:2}", "cannot read its arguments"),
        (f"vit_tiny_patch16_224:img_size={'-' * 9999}1", "cannot read its arguments"),
        ("vit_tiny_patch16_224:**{}", "cannot read its arguments"),
        ("vit_tiny_patch16_224:checkpoint_path='x'", "the argument checkpoint_path cannot be given"),
        ("hf-hub:vit", "expected hf-hub:ORG/MODEL or hf-hub:ORG/MODEL@REVISION"),
    ],
)
def test_names_that_cannot_be_used_say_why(text, message):
    with pytest.raises(TeacherError, match=message):
        parse_model_name(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("imgsize=32", "vit_tiny_patch16_224 has no argument 'imgsize'. Did you mean img_size"),
        ("act_layer=silu2", r"cannot make it with these arguments \(it knows no 'silu2'\)"),
        ("depth=two", "model vit_tiny_patch16_224:depth=two: "),
        ("norm_layer=5", "vit_tiny_patch16_224:norm_layer=5"),
        ("img_size=(1,)", "timm cannot make it with these arguments"),
        ("embed_dim=50", "cannot make it with these arguments .*divisible by num_heads"),
    ],
)
def test_arguments_the_model_does_not_take_are_named(arguments, message):
    with pytest.raises(TeacherError, match=message):
        create_student(parse_model_name(f"vit_tiny_patch16_224:{arguments}"), 10)


def test_a_teacher_is_ready_to_run_and_described(tiny_file):
    teacher = load_teacher(TINY, weights=tiny_file)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.depth == 2
    assert teacher.source == "tiny.safetensors"
    assert teacher.licence is None
    assert teacher.tokens.to_json() == {"num_prefix_tokens": 1, "grid_height": 2, "grid_width": 2}
    assert (teacher.input.height, teacher.input.width) == (32, 32)


def test_loading_a_teacher_draws_nothing_from_the_callers_generator(tiny_file):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_teacher(TINY, weights=tiny_file)
    assert torch.equal(torch.rand(3), expected)


def test_weights_given_for_a_tag_keep_its_licence(tiny_file):
    teacher = load_teacher(TINY.replace("224:", "224.augreg_in21k:"), weights=tiny_file)
    assert teacher.licence == "apache-2.0"


def test_the_input_follows_the_models_size_and_the_names_arguments():
    name = parse_model_name("vit_base_patch16_224.mae:img_size=(64,96),depth=1,mean=(0.1,0.2,0.3),crop_pct=1.0")
    found = input_config(create_student(name, 0))
    assert (found.height, found.width) == (64, 96)
    assert found.mean == (0.1, 0.2, 0.3)
    assert found.std == (0.229, 0.224, 0.225)
    assert (found.interpolation, found.crop_pct) == ("bicubic", 1.0)
    assert found.to_json()["mean"] == [0.1, 0.2, 0.3]


def test_a_model_without_token_maps_is_refused_before_its_weights_are_fetched():
    with pytest.raises(UnsupportedAttentionError, match="WindowAttention"):
        load_teacher("swin_tiny_patch4_window7_224")


def test_arguments_without_a_tag_need_a_file():
    with pytest.raises(TeacherError, match=r"no weights are known for it. Give a file with --weights"):
        load_teacher(TINY)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unreachable_hub_names_the_file_to_fetch_within_seconds(offline, tmp_path):
    code = (
        "from atcache.teachers.load import load_teacher\n"
        "from atcache.errors import TeacherError\n"
        "try: load_teacher('vit_tiny_patch16_224.augreg_in21k')\n"
        "except TeacherError as error: print(error)\n"
    )
    # No proxy listens on the discard port, and an empty cache has no copy: the hub is out of reach on any machine.
    unreachable = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")}
    environment = {**os.environ, **unreachable, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    start_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start_s < 60
    assert "hub cannot be reached. Download model.safetensors of https://huggingface.co/timm/vit_tiny" in done.stdout
    assert "--weights FILE" in done.stdout


def test_a_connection_that_breaks_during_a_download_is_a_sentence(tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "broken/vit").mkdir(parents=True)
    (tmp_path / "broken/vit/model.safetensors").write_bytes(bytes(5000))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serve_hub(tmp_path) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(TeacherError, match=r"vit: the Hugging Face hub cannot be reached\. Download model\.safe"):
            fetch_file("broken/vit", ["model.safetensors"], who="vit", then="give it with --weights FILE")


def test_a_copy_in_the_hubs_cache_needs_no_network(tiny, tmp_path):
    revision = tmp_path / "hub" / "models--timm--vit_tiny_patch16_224.augreg_in21k"
    (revision / "refs").mkdir(parents=True)
    (revision / "refs" / "main").write_text("abc")
    (revision / "snapshots" / "abc").mkdir(parents=True)
    save_file(tiny.state_dict(), revision / "snapshots" / "abc" / "model.safetensors")
    name = TINY.replace("224:", "224.augreg_in21k:")
    code = (
        f"from atcache.teachers.load import load_teacher\nt = load_teacher({name!r})\nprint(t.weights_sha256, t.source)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    sha256, source = done.stdout.split()
    assert source == "hub:timm/vit_tiny_patch16_224.augreg_in21k/model.safetensors"
    assert len(sha256) == 64


def test_the_same_weights_have_the_same_sha256_in_any_file(tiny, tmp_path):
    state = tiny.state_dict()
    torch.save({"model": dict(reversed(state.items())), "epoch": 3}, tmp_path / "a.pth")
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "b.safetensors")
    shas = {load_teacher(TINY, weights=tmp_path / name).weights_sha256 for name in ("a.pth", "b.safetensors")}
    assert len(shas) == 1
    tiny.blocks[0].attn.qkv.bias.data[0] += 1e-3
    save_file(tiny.state_dict(), tmp_path / "c.safetensors")
    assert load_teacher(TINY, weights=tmp_path / "c.safetensors").weights_sha256 not in shas


def test_the_sha256_covers_names_types_and_shapes():
    layer = torch.nn.Linear(2, 2)
    before = weights_sha256(layer)
    assert weights_sha256(layer.half()) != before
    turned = torch.nn.Linear(4, 1)
    turned.weight.data = layer.float().weight.data.reshape(1, 4)
    assert weights_sha256(turned) != before
    assert weights_sha256(torch.nn.BatchNorm1d(1))  # has a scalar
    assert weights_sha256(layer.bfloat16())


def test_a_teachers_sha256_does_not_depend_on_its_head(tiny, tmp_path):
    state = tiny.state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    save_file({n: t for n, t in state.items() if not n.startswith(("head", "norm."))}, tmp_path / "body.safetensors")
    shas = {load_teacher(TINY, weights=tmp_path / f"{name}.safetensors").weights_sha256 for name in ("whole", "body")}
    assert len(shas) == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {"step": 1}},
        lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}},
        lambda state: {"model_ema": state, "model": {n: torch.zeros_like(t) for n, t in state.items()}},
        lambda state: {"state_dict_ema": state, "state_dict": {n: torch.zeros_like(t) for n, t in state.items()}},
        lambda state: {
            "teacher": {f"module.backbone.{n}": t for n, t in state.items()},
            "student": {f"module.backbone.{n}": torch.zeros_like(t) for n, t in state.items()},
            "args": argparse.Namespace(lr=0.1),
        },
        lambda state: {f"encoder.{n}": t for n, t in state.items()} | {"decoder.embed.weight": torch.zeros(2)},
        lambda state: {f"_orig_mod.{n}": t for n, t in state.items()},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(wrap, tiny, tmp_path):
    torch.save(wrap(tiny.state_dict()), tmp_path / "wrapped.pth")
    student = create_student(parse_model_name(TINY), 5)
    load_weights(student, read_weights(tmp_path / "wrapped.pth"))
    assert weights_sha256(student) == weights_sha256(tiny)


def test_old_style_torch_files_are_read(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pth").keys() == tiny.state_dict().keys()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_style", [True, False])
def test_a_pickle_bomb_does_not_go_off(new_style, tiny, tmp_path):
    file = tmp_path / "bomb.pth"
    torch.save(
        {"model": tiny.state_dict(), "x": Bomb(tmp_path / "bang")}, file, _use_new_zipfile_serialization=new_style
    )
    with pytest.raises(TeacherError, match=r"bomb.pth: the file holds pickled Python objects.*it was not read"):
        read_weights(file)
    assert not (tmp_path / "bang").exists()
    torch.load(file, weights_only=False)  # the bomb is a real one
    assert (tmp_path / "bang").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"not weights at all", "neither a safetensors nor a torch file"),
        (b"PK\x03\x04 cut short", "neither a safetensors nor a torch file"),
        (b"\x10\0\0\0\0\0\0\0{damaged", "damaged safetensors file"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(TeacherError, match=message):
        read_weights(tmp_path / "weights")


def test_files_without_tensors_are_refused(tmp_path):
    with pytest.raises(TeacherError, match="no such file"):
        read_weights(tmp_path / "none.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(TeacherError, match="no tensors found"):
        read_weights(tmp_path / "empty.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(TeacherError, match="no tensors found"):
        read_weights(tmp_path / "list.pth")


def test_missing_tensors_are_counted_and_the_first_named(tiny):
    state = {name: t for name, t in tiny.state_dict().items() if not name.startswith("blocks.1.")}
    before = weights_sha256(tiny)
    with pytest.raises(
        TeacherError, match=r"12 of 32 tensors are missing .*blocks.1.norm1.weight, blocks.1.norm1.bias"
    ):
        load_weights(tiny, {name: t * 0 for name, t in state.items()})
    assert weights_sha256(tiny) == before


def test_tensors_of_another_shape_are_named(tiny):
    wide = create_student(parse_model_name(TINY.replace("48", "96")), 5)
    with pytest.raises(TeacherError, match=r"another shape in the weights, the first .*96.*expected .*48"):
        load_weights(tiny, wide.state_dict())


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            "depth=2",
            r"12 tensors of the weights, which maps .* have no place in the model, .* blocks\.1\.norm1\.weight",
        ),
        ("depth=1,init_values=0.1", r"2 tensors of the weights, .* first blocks\.0\.ls1\.gamma, blocks\.0\.ls2"),
    ],
)
def test_weights_with_more_in_their_blocks_than_the_model_are_refused(theirs, message):
    richer = create_student(parse_model_name(TINY.replace("depth=2", theirs)), 5)
    model = create_student(parse_model_name(TINY.replace("depth=2", "depth=1")), 5)
    before = weights_sha256(model)
    with pytest.raises(TeacherError, match=message):
        load_weights(model, richer.state_dict())
    assert weights_sha256(model) == before


def test_resized_patches_are_said(tiny, caplog):
    load_weights(create_student(parse_model_name(TINY), 5), tiny.state_dict())
    assert not caplog.messages
    load_weights(create_student(parse_model_name(f"{TINY},patch_size=8"), 5), tiny.state_dict())
    assert caplog.messages == [
        "WARNING: the weights are for patches of 16 x 16 pixels, vit_tiny_patch16_224 takes 8 x 8. They were resized; "
        "unless the model was trained for several sizes, give patch_size=16."
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("in_chans=1", r"images have three colours \(in_chans=3\)\. Leave in_chans out"),
        ("img_size=30", "images of 30 x 30 pixels cannot be cut into patches of 16 x 16. Give an img_size that is"),
    ],
)
def test_what_no_image_fits_is_refused(arguments, message):
    with pytest.raises(TeacherError, match=message):
        create_student(parse_model_name(f"vit_tiny_patch16_224:depth=1,{arguments}"), 5)


def test_published_sizes_that_leave_a_rim_out_are_taken():
    assert input_config(create_student(parse_model_name("vit_so400m_patch14_siglip_gap_384:depth=1"), 5)).height == 384


def test_an_mae_checkpoint_loses_its_decoder_and_only_what_else_is_left_over_is_said(tiny, caplog):
    caplog.set_level(logging.INFO, "atcache")
    student = create_student(parse_model_name(TINY), 5)
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 48)}
    load_weights(student, tiny.state_dict() | decoder)
    assert weights_sha256(student) == weights_sha256(tiny)
    assert caplog.messages == []
    extra = {f"neck.{number}.weight": torch.zeros(1) for number in range(4)}
    load_weights(student, tiny.state_dict() | decoder | extra)
    assert caplog.messages == [
        "NOTE: vit_tiny_patch16_224: 4 tensors of the weights are not in the model and not used, the first "
        "neck.0.weight, neck.1.weight, neck.2.weight."
    ]


def test_another_head_is_left_out_and_the_rest_loaded(tiny, caplog):
    caplog.set_level(logging.INFO, "atcache")
    student = create_student(parse_model_name(TINY), 7)
    head = student.head.weight.clone()
    load_weights(student, tiny.state_dict())
    assert torch.equal(student.head.weight, head)
    assert torch.equal(student.norm.weight, tiny.norm.weight)
    assert caplog.messages == []


def test_a_student_is_told_of_a_norm_that_stays_fresh_and_a_teacher_is_not(tiny, tiny_file, caplog):
    caplog.set_level(logging.INFO, "atcache")
    pooled = f"{TINY},global_pool=avg"  # its norm comes after pooling, and has another name
    load_teacher(pooled, weights=tiny_file)
    assert caplog.messages == []
    create_student(parse_model_name(pooled), 7, weights=tiny_file)
    assert caplog.messages == [
        "NOTE: vit_tiny_patch16_224: 2 tensors of the weights are not in the model and not used, the first "
        "norm.bias, norm.weight; 2 tensors of the model are not in the weights and stay at their initial values, the "
        "first fc_norm.weight, fc_norm.bias."
    ]


def test_fine_tuning_starts_from_the_weights_with_a_fresh_head(tiny, tiny_file):
    for weights in (tiny_file, tiny.state_dict()):
        student = create_student(parse_model_name(TINY), 5, weights=weights)
        assert torch.equal(student.blocks[1].mlp.fc1.weight, tiny.blocks[1].mlp.fc1.weight)
        assert not torch.equal(student.head.weight, tiny.head.weight)
        assert student.training
        assert all(parameter.requires_grad for parameter in student.parameters())


def test_embeddings_of_another_size_are_interpolated(tiny):
    larger = create_student(parse_model_name(TINY.replace("img_size=32", "img_size=64,patch_size=8")), 5)
    load_weights(larger, tiny.state_dict())
    assert larger.pos_embed.shape == (1, 65, 48)
    torch.testing.assert_close(larger.pos_embed[:, 0], tiny.pos_embed[:, 0])
    assert torch.equal(larger.blocks[0].attn.qkv.weight, tiny.blocks[0].attn.qkv.weight)


def test_deit3_layer_scales_of_the_authors_files_find_their_place():
    name = parse_model_name("deit3_small_patch16_224:img_size=32,embed_dim=48,depth=2,num_heads=3")
    model, other = create_student(name, 5), create_student(name, 5)
    authors = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in model.state_dict().items()
    }
    assert "blocks.0.gamma_1" in authors
    load_weights(other, authors)
    assert weights_sha256(other) == weights_sha256(model)


def test_students_are_fresh_and_drop_paths_when_asked():
    name = parse_model_name(TINY)
    assert weights_sha256(create_student(name, 5)) != weights_sha256(create_student(name, 5))
    student = create_student(name, 3, drop_path=0.2)
    assert student.head.out_features == 3
    assert student.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_a_model_has_no_differences_to_itself():
    for name in ("vit_small_patch14_reg4_dinov2", "beitv2_base_patch16_224", "vit_small_patch16_dinov3"):
        assert component_differences(timm.create_model(name, depth=1), timm.create_model(name, depth=1)) == []


@pytest.mark.parametrize(
    ("teacher", "difference"),
    [
        ("vit_small_patch14_dinov2", "LayerScale: the teacher has it, the student lacks it."),
        ("vit_small_patch14_reg4_dinov2", "register tokens: 4 in the teacher, 0 in the student."),
        ("beitv2_base_patch16_224", "relative position bias: the teacher has it, the student lacks it."),
        ("beitv2_base_patch16_224", "LayerScale: the teacher has it, the student lacks it."),
        ("beitv2_base_patch16_224", "absolute position embedding: the student has it, the teacher lacks it."),
        ("eva02_base_patch14_224", "rotary position embedding: the teacher has it, the student lacks it."),
        ("eva02_base_patch14_224", "gated MLP: the teacher has it, the student lacks it."),
        ("eva02_base_patch14_224", "norm inside the MLP: the teacher has it, the student lacks it."),
        ("vit_base_patch16_clip_224", "norm before the blocks: the teacher has it, the student lacks it."),
        ("vit_base_patch16_siglip_224", "class token: the student has it, the teacher lacks it."),
        ("vit_base_patch16_siglip_224", "pooling: 'map' in the teacher, 'token' in the student."),
        ("vit_relpos_small_patch16_rpn_224", "norm after attention and MLP: the teacher has it, the student lacks it."),
        ("vit_pwee_patch16_reg1_gap_256", "attention and MLP side by side: the teacher has it, the student lacks it."),
    ],
)
def test_what_a_plain_student_lacks_is_named(teacher, difference):
    student = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert difference in component_differences(timm.create_model(teacher, depth=1), student)


def test_q_k_norm_and_scale_norms_are_named():
    plain = timm.create_model("vit_tiny_patch16_224", depth=1)
    normed = timm.create_model("vit_tiny_patch16_224", depth=1, qk_norm=True, scale_attn_norm=True)
    assert component_differences(normed, plain) == [
        "q/k norm: the teacher has it, the student lacks it.",
        "norm on the attention output: the teacher has it, the student lacks it.",
    ]


def test_rounded_products_are_for_gpus_only():
    before = torch.get_float32_matmul_precision()
    with rounded_products("cpu"):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="rounding products takes a GPU")
def test_products_are_rounded_on_a_gpu_only_meanwhile():
    before = torch.get_float32_matmul_precision()
    left, right = torch.rand(2, 512, 512, device="cuda")
    exact = left @ right
    with rounded_products("cuda"):
        rounded = left @ right
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(left @ right, exact)
    assert torch.allclose(rounded, exact, rtol=2e-3)
