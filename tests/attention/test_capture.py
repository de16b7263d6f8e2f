"""Captured factors are those of the model's own attention, for every family, and what is no such softmax is refused."""

from __future__ import annotations

import gc
import json

import pytest
import timm
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from atcache.attention.blocks import find_blocks, token_layout
from atcache.attention.capture import FactorCapture, check_capture
from atcache.attention.finite import NotFiniteError
from atcache.attention.geometry import FactorGeometry
from atcache.attention.indices import parse_indices
from atcache.errors import ConfigError, UnsupportedAttentionError

SIZE = 48
PLAIN = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit with q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 42}),
    "beitv2": ("beitv2_base_patch16_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 42}),
    "eva02 with split q, k, v": ("eva02_base_patch14_224", {"img_size": 42}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "deit with a distillation token": ("deit_tiny_distilled_patch16_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "relative position": ("vit_relpos_small_patch16_224", {}),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", {}),
    "parallel blocks": ("vit_pwee_patch16_reg1_gap_256", {}),
}


def make(family: str) -> torch.nn.Module:
    timm_name, arguments = PLAIN[family]
    torch.manual_seed(0)
    model = timm.create_model(timm_name, **{"img_size": SIZE, "depth": 2, **arguments}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # what starts near zero would hide its own absence
            if "gamma" in name:
                parameter.fill_(1.0)
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num().clamp_min(0.05))
    return model


def some_images(model: torch.nn.Module, count: int = 2) -> torch.Tensor:
    height, width = model.patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def own_maps(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The maps timm itself forms when its attention is not fused: what its attention dropout is given."""
    maps, handles = [], []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    for name, module in model.blocks.named_modules():
        if name.endswith("attn_drop"):
            handles.append(module.register_forward_hook(lambda _module, _args, output: maps.append(output)))
    with torch.no_grad():
        model.forward_features(images)
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return maps


@pytest.mark.parametrize("family", PLAIN)
def test_captured_maps_are_the_models_own_unfused_maps(family):
    model = make(family)
    images = some_images(model)
    factors = FactorCapture(model)(images)
    expected = own_maps(model, images)
    assert len(factors) == len(expected) == 2
    for layer, maps in zip(factors, expected, strict=True):
        torch.testing.assert_close(layer.maps(), maps, atol=2e-5, rtol=1e-4)


class GivenMaps(TorchFunctionMode):
    """Attention with given maps instead of its own."""

    def __init__(self, maps):
        super().__init__()
        self.maps = iter(maps)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            attn_BHQK = next(self.maps, None)
            if attn_BHQK is not None:  # a pooling head after the blocks attends by itself
                return attn_BHQK @ args[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_given_its_captured_maps_gives_its_own_output(family):
    model = make(family)
    images = some_images(model)
    maps = [layer.maps() for layer in FactorCapture(model)(images)]
    with torch.no_grad():
        expected = model(images)
        with GivenMaps(maps):
            given = model(images)
        with GivenMaps([torch.flip(layer_maps, [1, 2]) for layer_maps in maps]):
            wrong = model(images)
    torch.testing.assert_close(given, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(wrong, expected, atol=1e-3, rtol=1e-3)


class GivenValues(TorchFunctionMode):
    """Attention to given values instead of its own."""

    def __init__(self, values):
        super().__init__()
        self.values = iter(values)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            return func(query, key, next(self.values, value), *args[3:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_given_its_captured_values_gives_its_own_output(family):
    model = make(family)
    images = some_images(model)
    geometry = check_capture(model, images, with_values=True).geometry
    values = [layer.v_BHTD for layer in FactorCapture(model, with_values=True)(images)]
    assert values[0].shape == (2, geometry.num_kv_heads, geometry.tokens.num_tokens, geometry.v_head_dim)
    assert all(v_BHTD.untyped_storage().nbytes() == v_BHTD.numel() * 4 for v_BHTD in values)
    with torch.no_grad():
        expected = model(images)
        with GivenValues(values):
            given = model(images)
        with GivenValues([v_BHTD.flip(1) for v_BHTD in values]):
            wrong = model(images)
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(wrong, expected, atol=1e-3, rtol=1e-3)
    assert FactorCapture(model)(images)[0].v_BHTD is None


@pytest.mark.parametrize("family", PLAIN)
def test_the_checked_geometry_describes_the_factors(family):
    model = make(family)
    geometry, bias_LHQK = check_capture(model, some_images(model))[:2]
    factors = FactorCapture(model)(some_images(model))
    num_tokens = geometry.tokens.num_tokens
    assert geometry.layers == (0, 1)
    assert factors[0].q_BHTD.shape == (2, len(geometry.heads), num_tokens, geometry.head_dim)
    assert factors[0].k_BHTD.shape == (2, geometry.num_kv_heads, num_tokens, geometry.head_dim)
    if family in ("beitv2", "relative position"):
        assert bias_LHQK is not None
        assert bias_LHQK.shape == (2, len(geometry.heads), num_tokens, num_tokens)
        torch.testing.assert_close(bias_LHQK[1], factors[1].bias[0])
        assert not torch.equal(bias_LHQK[0], bias_LHQK[1])
    else:
        assert bias_LHQK is None


REFUSED = {
    "swin_tiny_patch4_window7_224": "WindowAttention.*windowed",
    "swinv2_tiny_window8_256": "WindowAttention.*windowed",
    "xcit_nano_12_p16_224": "XCA.*channel x channel",
    "hiera_tiny_224": "MaskUnitAttention.*windows",
    "mvitv2_tiny": "MultiScaleAttention.*not square",
    "levit_128s": r"Attention.*no list of equal blocks \(`.blocks`\)",
    "convit_tiny": "GPSA.*two softmaxes",
    "volo_d1_224": "OutlookAttention.*not a softmax",
    "pvt_v2_b0": "Attention.*not square",
    "crossvit_9_240": "CrossAttention.*one row",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention.*two softmaxes, so it can be negative",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock.*two softmaxes",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_is_refused_by_name_and_reason(name):
    with pytest.raises(UnsupportedAttentionError, match=f"^{name}: attention class {REFUSED[name]}"):
        find_blocks(timm.create_model(name))


def test_a_model_without_attention_is_said_to_be_no_vit():
    message = r"^resnet18 is no plain ViT: the model has no list of equal blocks \(`.blocks`\).*Choose a plain ViT"
    with pytest.raises(UnsupportedAttentionError, match=message):
        find_blocks(timm.create_model("resnet18"))


def test_windows_are_noticed_in_a_class_nobody_listed():
    model = timm.create_model("samvit_base_patch16", img_size=224, depth=1, embed_dim=48, num_heads=2).eval()
    with pytest.raises(UnsupportedAttentionError, match="windowed or grouped"):
        FactorCapture(model)(torch.zeros(1, 3, 224, 224))


def test_two_attentions_in_a_block_are_refused():
    model = timm.create_model("vit_small_patch16_18x2_224", img_size=32, depth=1).eval()
    with pytest.raises(UnsupportedAttentionError, match="block 0 attends more than once"):
        FactorCapture(model)(torch.zeros(1, 3, 32, 32))


def test_unfused_attention_is_refused_and_says_what_to_set():
    model = make("vit")
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(UnsupportedAttentionError, match=r"never calls scaled_dot_product_attention.*`fused_attn`"):
        FactorCapture(model)(some_images(model))


def test_attention_dropout_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, attn_drop_rate=0.1).train()
    with pytest.raises(UnsupportedAttentionError, match=r"dropout_p=0.1.*model.eval\(\)"):
        FactorCapture(model)(torch.zeros(1, 3, 32, 32))
    FactorCapture(model.eval())(torch.zeros(1, 3, 32, 32))


def test_images_of_another_size_are_refused():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, dynamic_img_size=True).eval()
    with pytest.raises(UnsupportedAttentionError, match=r"10 tokens, expected 1 prefix tokens \+ 2 x 2 patches"):
        FactorCapture(model)(torch.zeros(1, 3, 48, 48))


class ImageBias(torch.nn.Module):
    """Attention whose bias is made from the tokens."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, tokens, **_ignored):
        return self.attention(tokens, attn_mask=tokens.detach().mean(-1)[:, None, None, :].expand(-1, 1, 10, 10))


def test_a_bias_that_depends_on_the_image_is_refused():
    model = make("vit")
    model.blocks[1].attn = ImageBias(model.blocks[1].attn)
    with pytest.raises(UnsupportedAttentionError, match="in layer 1 the bias on the logits depends on the image"):
        check_capture(model, some_images(model))


class CallMask(torch.nn.Module):
    """Attention under a given mask."""

    def __init__(self, attention, **mask):
        super().__init__()
        self.attention, self.mask = attention, mask

    def forward(self, tokens, **_ignored):
        return self.attention(tokens, **self.mask)


@pytest.mark.parametrize("mask", [{"is_causal": True}, {"attn_mask": torch.ones(10, 10, dtype=torch.bool).tril()}])
def test_boolean_and_causal_masks_become_biases(mask):
    model = make("vit")
    model.blocks[0].attn = CallMask(model.blocks[0].attn, **mask)
    geometry, bias_LHQK = check_capture(model, some_images(model))[:2]
    attn_BHQK = FactorCapture(model)(some_images(model))[0].maps()
    assert bool((attn_BHQK.triu(1) == 0).all())
    assert bias_LHQK.shape == (2, 1, 10, 10)
    assert bool((bias_LHQK[1] == 0).all())
    assert geometry.tokens.num_tokens == 10


class Grouped(torch.nn.Module):
    """Four query heads on two key heads, grouped by the attention call itself; values half as wide."""

    def forward(self, tokens, **_ignored):
        query = tokens.reshape(*tokens.shape[:2], 4, -1).transpose(1, 2)
        key, value = query[:, :2] * 0.7, query[:, 2:, :, ::2]
        out = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.5)
        return out.repeat(1, 1, 1, 2).transpose(1, 2).reshape(tokens.shape)


def test_grouped_key_heads_are_kept_once_and_repeated_for_chosen_heads():
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=2, num_heads=4).eval()
    for block in model.blocks:
        block.attn = Grouped()
    images = some_images(model)
    geometry = check_capture(model, images).geometry
    assert (geometry.num_model_heads, geometry.num_kv_heads, geometry.scale) == (4, 2, 0.5)
    whole = FactorCapture(model)(images)[1].maps()
    chosen = FactorCapture(model, heads=[1, 2])
    factors = chosen(images)[1]
    assert chosen.geometry.num_kv_heads == 2
    assert chosen.geometry.heads == (1, 2)
    torch.testing.assert_close(factors.maps(), whole[:, [1, 2]])


def test_grouped_values_are_kept_once_in_their_own_width():
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=2, num_heads=4).eval()
    for block in model.blocks:
        block.attn = Grouped()
    images = some_images(model)
    geometry = check_capture(model, images, with_values=True).geometry
    assert (geometry.num_kv_heads, geometry.head_dim, geometry.v_head_dim) == (2, 48, 24)
    assert FactorGeometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry
    whole = FactorCapture(model, with_values=True)(images)[1]
    chosen = FactorCapture(model, heads=[1, 2], with_values=True)(images)[1]
    assert whole.v_BHTD.shape == (2, 2, 10, 24)
    torch.testing.assert_close(chosen.v_BHTD, whole.v_BHTD)  # head 1 uses the first, head 2 the second
    torch.testing.assert_close(whole.select_heads([3, 0]).v_BHTD, whole.v_BHTD.flip(1))


def test_chosen_layers_and_heads_are_those_of_the_whole_capture():
    model = make("beitv2")
    images = some_images(model)
    everything = FactorCapture(model)(images)
    for layers in ([0], [1]):
        chosen = FactorCapture(model, layers=layers, heads=[2, 5, 11])
        for _ in range(2):  # the first call runs its last block to the end, later ones stop at the attention
            (factors,) = chosen(images)
            torch.testing.assert_close(factors.maps(), everything[layers[0]].maps()[:, [2, 5, 11]])
        assert chosen.geometry.num_model_heads == 12
        assert check_capture(model, images, layers, [2, 5, 11]).bias_LHQK.shape == (1, 3, 10, 10)


def test_the_forward_stops_after_the_last_wanted_layer():
    model = make("siglip")
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda *_: seen.append("block 1"))
    model.norm.register_forward_pre_hook(lambda *_: seen.append("norm"))
    capture = FactorCapture(model, layers=[0])
    capture(some_images(model))
    capture(some_images(model))
    FactorCapture(model)(some_images(model))
    assert seen == ["block 1"]


def test_nothing_is_left_on_the_model_even_after_a_failure():
    model = make("vit")
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    capture = FactorCapture(model)
    capture(some_images(model))
    with pytest.raises(AssertionError):
        capture(torch.zeros(1, 3, 7, 7))
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


@pytest.mark.parametrize("family", PLAIN)
def test_captured_tensors_keep_no_other_memory_alive(family):
    model = make(family)
    factors = FactorCapture(model)(some_images(model))
    gc.collect()
    for layer in factors:
        for tensor in (layer.q_BHTD, layer.k_BHTD):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert not tensor.requires_grad


def test_under_autocast_factors_come_in_the_type_attention_runs_in():
    model = make("vit with q/k norm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        geometry = check_capture(model, some_images(model)).geometry
        factors = FactorCapture(model)(some_images(model))
    assert factors[0].q_BHTD.dtype == factors[0].k_BHTD.dtype == torch.bfloat16
    exact = FactorCapture(model)(some_images(model))
    assert float((factors[0].maps() - exact[0].maps()).abs().max()) < 0.05
    assert geometry.num_model_heads == 3


def test_under_autocast_maps_of_strong_heads_are_whole():
    model = make("vit")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight *= 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_capture(model, some_images(model))
        attn_BHQK = FactorCapture(model)(some_images(model))[0].maps()
    assert attn_BHQK.dtype == torch.float32
    assert torch.allclose(attn_BHQK.sum(-1), torch.ones(()), atol=1e-5)


def test_weights_that_are_not_finite_are_noticed():
    model = make("vit")
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"not finite: from layer 1 on \(q\), for (\d) of \1 images, .*in float32"):
        check_capture(model, some_images(model))


def test_layers_of_unlike_shape_are_refused():
    model = make("vit")
    model.blocks[1].attn.num_heads, model.blocks[1].attn.head_dim = 6, 32
    with pytest.raises(UnsupportedAttentionError, match="layers differ in heads, head dim or scale"):
        FactorCapture(model)(some_images(model))
    FactorCapture(model, layers=[1])(some_images(model))


def test_missing_layers_and_heads_are_named():
    model = make("vit")
    with pytest.raises(ConfigError, match="layer 2 does not exist: the model has 2, numbered 0 to 1"):
        FactorCapture(model, layers=[0, 2])
    with pytest.raises(ConfigError, match="head 3 does not exist: the model has 3"):
        FactorCapture(model, heads=[3])(some_images(model))
    with pytest.raises(ConfigError, match="ascending, without repeats"):
        FactorCapture(model, layers=[1, 0])


def test_geometry_is_not_guessed_before_the_first_call():
    with pytest.raises(RuntimeError, match="known after the first call"):
        _ = FactorCapture(make("vit")).geometry


def test_token_layout_counts_class_and_register_tokens():
    layout = token_layout(make("dinov2 with registers"))
    assert (layout.num_prefix_tokens, layout.grid_height, layout.grid_width) == (5, 3, 3)


def test_indices_are_read_from_ranges():
    assert parse_indices("0-2, 5", 6) == (0, 1, 2, 5)
    assert parse_indices("3,1,1-2", 4) == (1, 2, 3)
    assert parse_indices("all", 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-17", "layer 12 does not exist: the model has 12, numbered 0 to 11"),
        ("a", "layers 'a': 'a' is not an index"),
        ("3-1", "the range 3-1 is backwards"),
        ("", "'' is not an index"),
        ("-1", "'-1' is not an index"),
    ],
)
def test_unreadable_indices_are_named(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_indices(text, 12)
