"""Teachers of transformers and OpenCLIP: their maps against the libraries' own, their input, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from itertools import product

import pytest
import torch
from foreign_models import FAMILIES, IMAGES, PREFIX_TOKENS, PROCESSOR, eager_maps, save_transformers
from safetensors.torch import load_file, save_file

from atcache.attention.capture import FactorCapture, check_capture
from atcache.errors import TeacherError
from atcache.teachers.foreign.image_processor import processor_input
from atcache.teachers.load import load_teacher
from atcache.teachers.weights import weights_sha256
from atcache.views.draw import draw_eval


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    return {family: save_transformers(folder / family, family) for family in FAMILIES}


def assert_maps(teacher, expected, images=IMAGES):
    factors = FactorCapture(teacher.model)(images)
    for layer, own_map in zip(factors, expected, strict=True):
        torch.testing.assert_close(layer.maps(), own_map, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_that_transformers_returns_itself(folders, family):
    teacher = load_teacher(f"transformers:{folders[family]}")
    assert (teacher.depth, teacher.tokens.num_patches) == (2, 16)
    assert teacher.tokens.num_prefix_tokens == PREFIX_TOKENS.get(family, 1)
    check = check_capture(teacher.model, IMAGES, with_inputs=True)
    assert check.recipe is not None
    assert (check.bias_LHQK is not None) == (family == "beit")
    in_order = {"noise": torch.arange(16.0).expand(3, -1)} if family == "vit_mae" else {}
    assert_maps(teacher, eager_maps(folders[family], family, IMAGES, **in_order))


def test_a_masked_autoencoder_sees_all_patches_in_their_order(folders, tmp_path):
    """The same weights in a plain ViT, which never shuffles, give the same maps."""
    plain = save_transformers(tmp_path / "vit", "vit")
    weights = load_file(folders["vit_mae"] / "model.safetensors")
    names = load_file(plain / "model.safetensors").keys()
    save_file({name: weights[name] for name in names if name in weights}, plain / "model.safetensors", {"format": "pt"})
    teacher = load_teacher(f"transformers:{folders['vit_mae']}")
    assert_maps(teacher, eager_maps(plain, "vit", IMAGES))
    one, other = (FactorCapture(teacher.model)(IMAGES)[1].maps() for _ in range(2))
    assert torch.equal(one, other)


def test_the_image_tower_of_a_whole_clip_is_the_teacher(tmp_path):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, text_config={**sizes, "vocab_size": 50}
    )
    torch.manual_seed(0)
    clip = transformers.CLIPModel(config)
    clip.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    teacher = load_teacher(f"transformers:{tmp_path}")
    clip.set_attn_implementation("eager")
    with torch.no_grad():
        expected = clip.eval().vision_model(pixel_values=IMAGES, output_attentions=True).attentions
    assert_maps(teacher, expected)


def test_positions_are_resized_when_the_processor_makes_larger_images(folders, tmp_path):
    folder = shutil.copytree(folders["dinov2"], tmp_path / "larger")
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "size": {"height": 48, "width": 48}}))
    teacher = load_teacher(f"transformers:{folder}")
    assert (teacher.input.height, teacher.tokens.grid_height, teacher.tokens.num_tokens) == (48, 6, 37)
    images = torch.randn(2, 3, 48, 48)
    assert_maps(teacher, eager_maps(folder, "dinov2", images), images)


def test_the_same_weights_have_the_same_hash_and_others_another(folders, tmp_path):
    again = save_transformers(tmp_path / "again", "vit")
    other = save_transformers(tmp_path / "other", "vit", seed=1)
    at = shutil.copytree(again, tmp_path / "me@work/vit@2")
    assert load_teacher(f"transformers:{at}").source == "vit@2"
    first, second, third = (load_teacher(f"transformers:{path}") for path in (folders["vit"], at, other))
    assert first.weights_sha256 == second.weights_sha256 != third.weights_sha256
    assert first.source == "vit"


def other_value(value):
    """Another value of a config for this one; lists and dicts stay as they are."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 0.5
    return {str: "relu", type(None): 0.5}.get(type(value), value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_the_config_that_changes_maps_changes_the_hash(folders, tmp_path, family):
    import transformers

    folder = shutil.copytree(folders[family], tmp_path / "edited")
    written = json.loads((folder / "config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    teacher = load_teacher(f"transformers:{folder}")
    maps = [layer.maps() for layer in FactorCapture(teacher.model)(IMAGES)]
    has_changed_maps = set()
    for name in config.keys() - {"model_type"}:
        (folder / "config.json").write_text(json.dumps({**written, name: other_value(config[name])}))
        try:
            edited = load_teacher(f"transformers:{folder}")
        except TeacherError:  # most say another shape than the weights have
            continue
        others = [layer.maps() for layer in FactorCapture(edited.model)(IMAGES)]
        if len(others) != len(maps) or not all(map(torch.equal, maps, others)):
            assert edited.weights_sha256 != teacher.weights_sha256, name
            has_changed_maps.add(name)
    assert "hidden_act" in has_changed_maps


def test_usual_values_of_the_config_leave_the_hash_of_earlier_versions(tmp_path):
    folder = save_transformers(tmp_path / "vit", "vit", hidden_size=64, num_attention_heads=1)

    def teacher(**edited):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **edited}))
        return load_teacher(f"transformers:{folder}")

    first = teacher()
    of_weights = weights_sha256(first.model.module, without=("pooler.", "embeddings.mask_token"))
    assert first.weights_sha256 == of_weights
    assert teacher(architectures=["Other"], initializer_range=0.5, id2label={"0": "cat"}).weights_sha256 == of_weights
    edits = list(product(("gelu", "quick_gelu"), (1e-12, 1e-6)))
    hashes = [teacher(hidden_act=act, layer_norm_eps=eps).weights_sha256 for act, eps in edits]
    assert hashes[0] == of_weights
    assert len(set(hashes)) == len(edits)


def damaged(folder, tmp_path, change):
    folder = shutil.copytree(folder, tmp_path / "damaged")
    change(folder)
    return f"transformers:{folder}"


def drop_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["layers.1.layernorm_before.weight" if "layers.1.layernorm_before.weight" in weights else min(weights)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def another_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "swin"}))


def own_code(folder):
    settings = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("raise SystemExit('ran code of the repository')")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1), "code": pickle.loads}, folder / "pytorch_model.bin")


def no_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def wider(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 64}))


def swin_without_processor(folder):
    another_type(folder)
    no_processor(folder)


def fewer_layers(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 1}))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 86\n")


def missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swin_without_processor, r"its model_type is 'swin', expected one of"),
        (fewer_layers, r"\d+ tensors of its weights are of layers that its config.json does not have, the first .*1\."),
        (cut_short, r"damaged safetensors file .*Download it again"),
        (pointer, r"a Git LFS pointer .*git lfs pull"),
        (missing_shard, r"1 of its 1 files are missing, the first model-1.safetensors"),
        (drop_a_tensor, r"1 tensors are missing in its weights, the first \S+\. "),
        (another_type, r"its model_type is 'swin', expected one of beit, clip, .*own_teacher"),
        (own_code, r"it needs code of its repository, which is never run"),
        (pickled, r"its weights hold pickled Python objects .* not read"),
        (no_processor, r"it has no preprocessor_config.json, which says the size, mean and std"),
        (wider, r"\d tensors have another shape in its weights, the first .*mlp"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_be_used_is_refused_in_a_sentence(folders, tmp_path, change, message):
    name = damaged(folders["vit"], tmp_path, change)
    with pytest.raises(TeacherError, match=message) as raised:
        load_teacher(name)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["transformers:/no/such/folder", "transformers:dinov2-small", "transformers:"])
def test_a_name_that_is_neither_folder_nor_repository_is_refused_without_asking_the_hub(name):
    with pytest.raises(TeacherError, match=r"there is no folder .*ORG/MODEL"):
        load_teacher(name)


def test_a_folder_has_neither_revisions_nor_arguments(folders):
    with pytest.raises(TeacherError, match=r"a folder, which has no revisions. Leave out @main"):
        load_teacher(f"transformers:{folders['vit']}@main")
    with pytest.raises(TeacherError, match=r"Leave out :img_size=112"):
        load_teacher("transformers:org/vit:img_size=112")


def test_weights_are_not_named_twice(folders, tmp_path):
    with pytest.raises(TeacherError, match=r"it comes with its weights\. Leave out --weights"):
        load_teacher(f"transformers:{folders['vit']}", weights=tmp_path / "x.safetensors")


CLIP_LIKE = {
    **PROCESSOR,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (PROCESSOR, (32, 32, "bicubic", 1.0)),
        (CLIP_LIKE, (224, 224, "bicubic", 0.875)),
        ({**PROCESSOR, "size": 224, "resample": 2}, (224, 224, "bilinear", 1.0)),  # before 2022
        ({**CLIP_LIKE, "size": 224, "crop_size": 224}, (224, 224, "bicubic", 1.0)),
        ({**PROCESSOR, "size": {"height": 256, "width": 192}}, (256, 192, "bicubic", 1.0)),
        ({**PROCESSOR, "do_resize": False}, (64, 64, "bicubic", 1.0)),
    ],
)
def test_an_image_processor_becomes_the_input(settings, expected):
    made = processor_input("m", settings, (64, 64))
    assert (made.height, made.width, made.interpolation, made.crop_pct) == expected
    assert made.mean == (0.5, 0.4, 0.3)
    assert made.std == (0.2, 0.3, 0.4)


@pytest.mark.parametrize(("crop", "resized"), [(384, 450), (448, 491), (378, 462), (224, 256), (224, 224), (518, 592)])
def test_views_are_resized_as_the_image_processor_does(crop, resized):
    settings = {**CLIP_LIKE, "size": {"shortest_edge": resized}, "crop_size": {"height": crop, "width": crop}}
    made = processor_input("m", settings, None)
    assert made.crop_pct == pytest.approx(crop / resized, rel=1e-15)
    drawn = draw_eval(900, 700, image_height=crop, image_width=crop, crop_pct=made.crop_pct)
    assert drawn[4:6] == (resized * 900 // 700, resized)


@pytest.mark.parametrize(
    ("settings", "squashes"),
    [
        (PROCESSOR, True),
        ({**PROCESSOR, "size": 32}, True),  # before 2022
        ({**PROCESSOR, "do_resize": False}, False),
        ({**CLIP_LIKE, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, False),
        ({**CLIP_LIKE, "size": 40, "crop_size": 32}, False),
        ({**CLIP_LIKE, "size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}, True),
    ],
)
def test_a_note_says_that_views_are_not_squashed(folders, tmp_path, caplog, settings, squashes):
    folder = shutil.copytree(folders["vit"], tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    load_teacher(f"transformers:{folder}")
    note = f"NOTE: transformers:{folder}: its own transform squashes images of another shape than its input. atcache"
    assert [message[: len(note)] for message in caplog.messages] == [note] * squashes


def test_pixels_that_are_not_normalised_stay_in_0_to_1():
    made = processor_input("m", {**PROCESSOR, "do_normalize": False}, None)
    assert (made.mean, made.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**PROCESSOR, "rescale_factor": 1.0}, "it does not divide pixels by 255"),
        ({**PROCESSOR, "size": {"shortest_edge": 224}}, "does not crop them"),
        ({name: PROCESSOR[name] for name in PROCESSOR if name != "image_mean"}, "it has no 'image_mean'"),
        ({**PROCESSOR, "image_std": [1, 1]}, "unpack"),
        ({**PROCESSOR, "size": {"longest_edge": 9}}, "the size of its images is"),
        ({**PROCESSOR, "resample": 77}, "77 is not a valid Resampling"),
    ],
)
def test_an_image_processor_that_makes_other_images_is_refused(settings, message):
    with pytest.raises(TeacherError, match=f"model m: its image processor .* cannot be used: .*{message}"):
        processor_input("m", settings, None)


# OpenCLIP

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A file of random weights of the model "tiny-clip", which OpenCLIP then knows, also with QuickGELU."""
    import open_clip

    folder = tmp_path_factory.mktemp("open-clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    (folder / "tiny-clip-quickgelu.json").write_text(json.dumps({**TINY_CLIP, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip", load_weights=False)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors", model.visual.eval()


def test_maps_of_open_clip_are_those_that_torchs_attention_returns(tiny_clip):
    weights, visual = tiny_clip
    teacher = load_teacher("open-clip:tiny-clip", weights=weights)
    assert (teacher.tokens.num_prefix_tokens, teacher.depth, teacher.input.height) == (1, 2, 32)
    assert teacher.input.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    check = check_capture(teacher.model, IMAGES, with_inputs=True)
    assert check.recipe is not None
    inputs = []
    attentions = [block.attn for block in visual.transformer.resblocks]
    handles = [one.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for one in attentions]
    with torch.no_grad():
        visual(IMAGES)
        for handle in handles:
            handle.remove()
        expected = [
            attention(x, x, x, need_weights=True, average_attn_weights=False)[1]
            for attention, x in zip(attentions, inputs, strict=True)
        ]
    assert_maps(teacher, expected)


def test_the_activation_of_open_clip_is_the_one_that_a_tags_weights_were_trained_with(tiny_clip, monkeypatch):
    import open_clip

    weights, visual = tiny_clip
    tags = {"gelu": {"file": str(weights)}, "quick": {"file": str(weights), "quick_gelu": True}}
    for tag in tags.values():
        tag |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", tags)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip-quickgelu", tags)
    plain, quick = (load_teacher(f"open-clip:tiny-clip/{tag}") for tag in tags)
    own = open_clip.create_model("tiny-clip-quickgelu", pretrained="quick", require_pretrained=True).visual.eval()
    for teacher, tower in ((plain, visual), (quick, own)):
        with torch.no_grad():
            torch.testing.assert_close(teacher.model.module(IMAGES), tower(IMAGES))
    # A cache of the same weights with the other activation is not continued.
    assert plain.weights_sha256 != quick.weights_sha256
    named = load_teacher("open-clip:tiny-clip-quickgelu/quick")
    assert_maps(named, [layer.maps() for layer in FactorCapture(quick.model)(IMAGES)])
    with pytest.raises(TeacherError, match=r"has the activation QuickGELU, .* trained with GELU\. .* --weights FILE\."):
        load_teacher("open-clip:tiny-clip-quickgelu/gelu")


@pytest.mark.parametrize(
    ("mode", "verb"), [("squash", "squashes"), ("longest", "pads"), ("shortest", None)], ids=lambda value: str(value)
)
def test_a_note_says_that_views_are_not_squashed_or_padded_as_open_clip_does(
    tiny_clip, monkeypatch, caplog, mode, verb
):
    import open_clip

    tag = {"file": str(tiny_clip[0]), "interpolation": "bicubic", "resize_mode": mode}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"tag": tag})
    load_teacher("open-clip:tiny-clip/tag")
    notes = [message for message in caplog.messages if message.startswith("NOTE: open-clip:tiny-clip/tag: its own")]
    assert [f"transform {verb} images" in note for note in notes] == [True] * (verb is not None)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("open-clip:ViT-B-99/x", None, "OpenCLIP has no model 'ViT-B-99'. Nearest are ViT-B-"),
        ("open-clip:nope", None, "OpenCLIP has no model 'nope'. Nearest are ([^,]+, ){5}[^,]+; open_clip.list_models"),
        ("open-clip:ViT-B-32/nonsense", None, "has no weights 'nonsense' for it. Known: openai, .* --weights"),
        ("open-clip:ViT-B-32", None, "has no weights '' for it"),
        ("open-clip:ViT-B-32/openai", "weights", "named twice"),
        ("open-clip:ViT-B-32", "missing", "no such file"),
        ("open-clip:RN50", "weights", "OpenCLIP cannot load it"),
    ],
)
def test_what_open_clip_does_not_know_is_refused_in_a_sentence(tiny_clip, tmp_path, name, weights, message):
    given = {None: None, "weights": tiny_clip[0], "missing": tmp_path / "no.safetensors"}[weights]
    with pytest.raises(TeacherError, match=message):
        load_teacher(name, weights=given)


def test_pickled_objects_are_not_run_by_open_clip(tiny_clip, tmp_path):
    del tiny_clip
    torch.save({"state_dict": {"x": torch.zeros(1)}, "code": pickle.loads}, tmp_path / "p.pt")
    with pytest.raises(TeacherError, match="which could run code; it was not read"):
        load_teacher("open-clip:tiny-clip", weights=tmp_path / "p.pt")
