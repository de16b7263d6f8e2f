"""Modules of one's own as teachers: their attention is found by watching, and checked against their own maps."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_models import (
    COLOURS,
    IMAGES,
    SIZES,
    GroupedRotary,
    HandSoftmax,
    HandWrittenViT,
    MultiHead,
    PackedFused,
    heads_of,
)
from torch import nn

import atcache
from atcache.attention.capture import FactorCapture, check_capture
from atcache.attention.factors import LayerFactors
from atcache.errors import ConfigError, TeacherError, UnsupportedAttentionError
from atcache.teachers.load import load_teacher


def own(module, **more):
    return atcache.own_teacher(module, **{**SIZES, **COLOURS, **more})


def captured(module, **more):
    """The checked factors of a module, and the maps that its own attention modules kept."""
    teacher = load_teacher(own(module, **more))
    check = check_capture(teacher.model, IMAGES, with_inputs=True)
    factors = FactorCapture(teacher.model)(IMAGES)
    with torch.no_grad():
        teacher.model.forward_features(IMAGES)
    return teacher, check, factors, [attention.last for attention in teacher.model.module.attentions()]


def assert_same_maps(factors, maps):
    assert len(factors) == len(maps) == 2
    for layer, own_map in zip(factors, maps, strict=True):
        assert isinstance(layer, LayerFactors)
        torch.testing.assert_close(layer.maps(), own_map, atol=2e-6, rtol=1e-4)


STYLES = ("matmul", "in place", "before", "einsum", "swapped einsum", "shifted")


@pytest.mark.parametrize("style", STYLES)
def test_a_softmax_by_hand_gives_the_q_and_k_that_it_came_from(style):
    teacher, check, factors, maps = captured(HandWrittenViT(partial(HandSoftmax, style=style)))
    assert_same_maps(factors, maps)
    assert check.geometry.scale == (1.0 if style == "before" else 8**-0.5)
    assert check.geometry.kind == "factors"
    assert (teacher.tokens.num_prefix_tokens, teacher.depth) == (1, 2)
    assert check.recipe is not None  # so the smallest codec can store its inputs


@pytest.mark.parametrize("make", [PackedFused, GroupedRotary])
def test_the_fused_call_gives_q_and_k_of_modules_that_timm_did_not_make(make):
    _, check, factors, maps = captured(HandWrittenViT(make))
    assert_same_maps(factors, maps)
    assert check.geometry.num_kv_heads == (2 if make is GroupedRotary else 4)


@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}, {"kdim": 32, "vdim": 32}], ids=str)
@pytest.mark.parametrize("want_maps", [False, True])
def test_torchs_multi_head_attention_is_taken_apart_into_its_q_and_k(options, want_maps):
    module = HandWrittenViT(partial(MultiHead, **options)).eval()
    for attention in module.attentions():
        attention.want_maps = want_maps
    teacher = load_teacher(own(module))
    check_capture(teacher.model, IMAGES)
    factors = FactorCapture(teacher.model, with_values=True)(IMAGES)
    for attention in module.attentions():
        attention.want_maps = True
    with torch.no_grad():
        module(IMAGES)
    assert_same_maps(factors, [attention.last for attention in module.attentions()])


def test_torchs_encoder_is_seen_into_though_it_has_a_fast_path():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_patches = nn.Conv2d(3, 32, 8, 8)
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

        def forward(self, images):
            return {"features": self.layers(self.to_patches(images).flatten(2).mT)}

    torch.manual_seed(0)
    teacher = load_teacher(own(Encoder(), version="1"))
    assert [type(block).__name__ for block in teacher.model.blocks_in_order] == ["TransformerEncoderLayer"] * 3
    assert teacher.tokens.num_prefix_tokens == 0
    check_capture(teacher.model, IMAGES)


def test_a_map_that_is_no_scaled_product_needs_query_key():
    module = HandWrittenViT(partial(HandSoftmax, style="temperature"))
    teacher = load_teacher(own(module))
    with pytest.raises(UnsupportedAttentionError, match=r"block 0 .* not scale \* q k\^T .* `query_key`"):
        check_capture(teacher.model, IMAGES)


def query_key(attention, x):
    q, k, _ = (heads_of(part, attention.num_heads) for part in attention.to_qkv(x).chunk(3, dim=-1))
    return q * attention.temperature, k


def test_query_key_says_how_the_maps_of_a_named_class_come_about():
    module = HandWrittenViT(partial(HandSoftmax, style="temperature"))
    _, check, factors, maps = captured(module, attention=HandSoftmax, query_key=query_key)
    assert_same_maps(factors, maps)
    assert check.geometry.scale == 1


def test_a_wrong_query_key_is_refused_before_anything_is_cached():
    module = HandWrittenViT(HandSoftmax)  # does not use its temperature
    teacher = load_teacher(own(module, attention=HandSoftmax, query_key=query_key))
    with pytest.raises(UnsupportedAttentionError, match=r"layer 0 softmax\(scale q k\^T\) differs .* by \d"):
        check_capture(teacher.model, IMAGES)


def test_the_users_module_is_left_as_it_was():
    module = HandWrittenViT(PackedFused).train()
    teacher = load_teacher(own(module))
    assert module.training
    assert next(module.parameters()).requires_grad
    assert not teacher.model.training
    FactorCapture(teacher.model)(IMAGES)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in teacher.model.modules())


class Shared(HandWrittenViT):
    def forward(self, images):
        x = self.to_patches(images).flatten(2).mT
        for _ in range(2):
            x = self.layers[0](x)
        return x


class Windowed(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        q, k, v = (heads_of(part, 4) for part in self.qkv(x[:, 1:].reshape(-1, 4, x.shape[-1])).chunk(3, dim=-1))
        patches = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 16, -1)
        return torch.cat([x[:, :1], patches], dim=1)


class NoSoftmax(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.q = nn.Linear(width, width)

    def forward(self, x):
        return self.q(x) @ self.q(x).mT @ x / 100


@pytest.mark.parametrize(
    ("module", "more", "message"),
    [
        (HandWrittenViT(Windowed), {}, r"its maps are 4 x 4, expected square ones over 16 patches of each image"),
        (HandWrittenViT(NoSoftmax), {}, r"no attention was seen: it calls neither"),
        (Shared(PackedFused), {}, r"layer 0 attends in a PackedFused that attends 2 times in one forward pass"),
        (HandWrittenViT(PackedFused), {"num_prefix_tokens": 2}, r"its maps are 17 x 17, .* 2 prefix tokens and 16"),
        (HandWrittenViT(PackedFused), {"patch_size": 4}, r"its maps are 17 x 17, expected .* 64 patches"),
    ],
    ids=["windows", "no softmax", "shared", "prefix", "patches"],
)
def test_what_cannot_be_cached_is_refused_when_the_teacher_is_loaded(module, more, message):
    with pytest.raises(UnsupportedAttentionError, match=message):
        load_teacher(own(module, **more))


def test_a_name_tells_code_apart_and_the_hash_weights():
    one, same, other_code = (HandWrittenViT(make) for make in (PackedFused, PackedFused, GroupedRotary))
    assert str(own(one)) == str(own(same))
    assert re.fullmatch(r"own:HandWrittenViT@[0-9a-f]{12}", str(own(one)))
    assert str(own(other_code)) != str(own(one))
    assert str(own(one, attention=PackedFused, query_key=query_key)) != str(own(one))
    hashes = [load_teacher(own(module)).weights_sha256 for module in (one, same)]
    assert hashes[0] == hashes[1]
    with torch.no_grad():
        same.head.bias.add_(1)
    assert load_teacher(own(same)).weights_sha256 != hashes[0]


def test_a_setting_of_the_same_code_and_weights_is_another_teacher():
    module, other = HandWrittenViT(PackedFused), HandWrittenViT(PackedFused)
    norm = next(child for child in other.modules() if isinstance(child, nn.LayerNorm))
    norm.eps *= 10
    assert str(own(other)) != str(own(module))
    assert str(own(other, version="1")) == str(own(module, version="1"))
    norm.eps /= 10
    norm.train(False)  # how it happens to be used is no setting
    assert str(own(other)) == str(own(module))


class Pinned(nn.Module):
    """The test below knows the hash of this class: change nothing here."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.num_heads, self.sizes, self.mode = 4, (8, 8.5), "x"


def test_a_module_without_hidden_tensors_has_the_name_that_earlier_versions_gave_it():
    assert str(own(Pinned())) == "own:Pinned@f981d33f520e"


def put_buffer(module, values):
    module.register_buffer("temp", torch.tensor(values), persistent=False)


def put_tensor(module, values):
    module.temp = torch.tensor(values)


def put_array(module, values):
    module.temp = np.array(values)


def put_tables(module, values):
    module.temp = {"tables": [None, (torch.tensor(values), "x")]}


def put_parameters(module, values):
    module.temp = [nn.Parameter(torch.tensor(values))]  # not a ParameterList, so no state dict has it


@pytest.mark.parametrize("put", [put_buffer, put_tensor, put_array, put_tables, put_parameters])
def test_tensors_that_no_state_dict_has_make_another_teacher(put):
    modules = [HandWrittenViT(PackedFused) for _ in range(3)]
    for module, values in zip(modules, ([1.0, 2.0], [1.0, 2.0], [1.0, 3.0]), strict=True):
        put(module.attentions()[1], values)
    one, same, other = map(str, map(own, modules))
    assert one == same
    assert other != one
    assert str(own(HandWrittenViT(PackedFused))) not in (one, other)
    assert str(own(modules[0], version="1")) == str(own(modules[2], version="1"))


@pytest.mark.parametrize("make", [lambda: torch.eye(2).to_sparse(), lambda: torch.empty(2, device="meta")])
def test_a_tensor_whose_values_cannot_be_read_needs_a_version(make):
    module = HandWrittenViT(PackedFused)
    module.table = make()
    with pytest.raises(ConfigError, match=r"the values of \.table, a tensor of layout torch\.\w+ on device \w+, c"):
        own(module)
    assert str(own(module, version="1")).startswith("own:HandWrittenViT@")


def test_attributes_without_numbers_make_no_other_teacher():
    module = HandWrittenViT(PackedFused)
    # What an object array holds are addresses, which differ in each process.
    module.names, module.act, module.empty = np.array(["a", None], dtype=object), F.gelu, {}
    assert str(own(module)) == str(own(HandWrittenViT(PackedFused)))


def test_code_without_a_source_needs_a_version():
    space: dict = {"nn": nn, "__name__": "__main__"}
    exec("class Typed(nn.Module):\n    pass", space)  # as in some interactive sessions
    with pytest.raises(ConfigError, match=r"the source of .*Typed cannot be read, .* give version='1'"):
        own(space["Typed"]())
    assert str(own(space["Typed"](), version="1")) != str(own(space["Typed"](), version="2"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"image_size": 30}, "image_size=30 cannot be cut into patches of patch_size=8"),
        ({"patch_size": (8, 0)}, r"patch_size=\(8, 0\): expected a number of pixels"),
        ({"std": (1.0, 0.0, 1.0)}, r"own_teacher: \"std\[1\]\" is 0.0, expected more than 0"),
        ({"query_key": query_key}, "attention and query_key go together"),
        (
            {"mean": (123, 116, 103), "std": (58, 57, 57)},
            r"mean=\(123, .* colours from 0 to 1.* divide mean and std by",
        ),
        ({"std": (58.4, 57.1, 57.4)}, r"std=\(58.4, .* colours from 0 to 1"),
        ({"std": 0.5}, r"std=0.5: expected three numbers"),
        ({"std": "abc"}, r"std='abc': expected three numbers"),
        ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\): expected three numbers"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens=-1: expected 0 or more"),
    ],
)
def test_values_that_do_not_fit_are_refused_at_once(more, message):
    with pytest.raises(ConfigError, match=message):
        own(HandWrittenViT(PackedFused), **more)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_colours_may_be_arrays_and_tensors(kind):
    teacher = own(HandWrittenViT(PackedFused), mean=kind([0.5, 0.25, 0.5]), std=kind([0.25, 0.5, 0.5]))
    assert (teacher.input.mean, teacher.input.std) == ((0.5, 0.25, 0.5), (0.25, 0.5, 0.5))


@pytest.mark.parametrize("given", ["vit_small_patch16_224", print], ids=["name", "function"])
def test_what_is_no_module_is_refused(given):
    with pytest.raises(ConfigError, match=r"own_teacher takes a torch.nn.Module, and got .*teacher='NAME'"):
        own(given)


def test_a_module_that_does_not_run_on_images_of_the_size_is_refused():
    module = own(HandWrittenViT(PackedFused), image_size=64)
    with pytest.raises(TeacherError, match=r"does not run on images of 64 x 64 pixels \(RuntimeError: .* made for\?"):
        load_teacher(module)


def test_a_module_alone_is_no_teacher(tmp_path):
    with pytest.raises(ConfigError, match=r"teacher=.*expected text or atcache.own_teacher\(\.\.\.\)"):
        atcache.build(teacher=HandWrittenViT(PackedFused), data="x.tar", out=tmp_path / "c.zarr")


def test_a_recorded_name_cannot_be_loaded_from_the_command_line():
    with pytest.raises(TeacherError, match=r"own:V@12: a module of one's own has no name to load it by"):
        load_teacher("own:V@12")


def test_naming_a_timm_teacher_imports_no_foreign_library():
    code = (
        "import sys, atcache.teachers.load, atcache.pipelines.build.run; "
        "print([name for name in ('transformers', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
