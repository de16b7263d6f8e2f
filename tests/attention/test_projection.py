"""The recipe found for a layer gives the model's own q and k out of the layer's input, in every family."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from made_factors import make_geometry
from timm.layers import RmsNorm
from torch import nn
from torch.nn import functional

from atcache.attention.capture import FactorCapture, check_capture
from atcache.attention.factors import LayerFactors
from atcache.attention.projection import HeadNorm, HeadProjection, HeadRotation
from atcache.errors import AttentionShapeError, CodecError, ConfigError, UnsupportedAttentionError

SIZE = 48
# What each family is: a timm model, its arguments, and the parts of the recipe: norm of q, pairs, rotations in a token.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}, None, None, 0),
    "vit without biases": ("vit_tiny_patch16_224", {"qkv_bias": False}, None, None, 0),
    "layer norm of q and k": ("vit_tiny_patch16_224", {"qk_norm": True}, "layer", None, 0),
    "rms norm of q and k": ("vit_tiny_patch16_224", {"qk_norm": True, "norm_layer": RmsNorm}, "rms", None, 0),
    "torch's rms norm": ("vit_tiny_patch16_224", {"qk_norm": True, "norm_layer": nn.RMSNorm}, "rms", None, 0),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 42}, None, None, 0),
    "deit with a distillation token": ("deit_tiny_distilled_patch16_224", {}, None, None, 0),
    "clip": ("vit_base_patch16_clip_224", {}, None, None, 0),
    "siglip": ("vit_base_patch16_siglip_224", {}, None, None, 0),
    "beit": ("beit_base_patch16_224", {}, None, None, 0),
    "relative position": ("vit_relpos_small_patch16_224", {}, None, None, 0),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 42}, None, "adjacent", 1),
    "eva02 with split q, k, v": ("eva02_base_patch14_224", {"img_size": 42}, None, "adjacent", 1),
    "eva02 with norms": ("eva02_tiny_patch14_224", {"img_size": 42, "qk_norm": True}, "layer", "adjacent", 1),
    "dinov3": ("vit_small_patch16_dinov3", {}, None, "halves", 1),
    "mixed rope": ("vit_small_patch16_rope_mixed_224", {}, None, "adjacent", 3),
    "parallel blocks": ("vit_pwee_patch16_reg1_gap_256", {}, None, None, 0),
    "parallel blocks with an odd mlp": (
        "vit_pwee_patch16_reg1_gap_256",
        {"mlp_ratio": 3.3, "qk_norm": True},
        "layer",
        None,
        0,
    ),
}


def make(timm_name: str, arguments: dict) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        timm_name, **{"img_size": SIZE, "depth": 2, "embed_dim": 48, "num_heads": 3, **arguments}
    ).eval()
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    """Weights of which none is 0 or 1: what starts there would hide its own absence."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num().clamp_min(0.1))
    return model


def some_images(model: nn.Module, seed: int = 1, count: int = 2) -> torch.Tensor:
    height, width = model.patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def capture_others(model: nn.Module, check, layers=None, heads=None) -> list[LayerFactors]:
    """Factors and inputs of images that the recipes were not made from."""
    capture = FactorCapture(model, layers, heads, input_calls=check.input_calls)
    return capture(some_images(model, seed=2, count=3))


def assert_recomputed(projections, layers, tolerance=1e-5) -> None:
    assert len(projections) == len(layers) > 0
    for projection, layer in zip(projections, layers, strict=True):
        for recomputed_BHTD, captured_BHTD in zip(
            projection(layer.input_BTC), (layer.q_BHTD, layer.k_BHTD), strict=True
        ):
            assert recomputed_BHTD.dtype == torch.float32
            assert recomputed_BHTD.shape == captured_BHTD.shape
            error = (recomputed_BHTD - captured_BHTD.float()).norm() / captured_BHTD.float().norm()
            assert float(error) < tolerance


def assert_prefix_is_not_rotated(rotation: HeadRotation, num_prefix_tokens: int) -> None:
    assert bool((rotation.cos_HTP[:, :num_prefix_tokens] == 1).all())
    assert bool((rotation.sin_HTP[:, :num_prefix_tokens] == 0).all())
    assert bool((rotation.cos_HTP[:, num_prefix_tokens:] < 1).any())


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_give_the_q_and_k_of_other_images(family):
    timm_name, arguments, norm, pairs, num_rotations = FAMILIES[family]
    model = make(timm_name, arguments)
    check = check_capture(model, some_images(model), with_inputs=True)
    layers = capture_others(model, check)
    assert_recomputed(check.projections, layers)
    for projection in check.projections:
        found = None if projection.q_norm is None else "rms" if projection.q_norm.bias_D is None else "layer"
        assert found == norm
        assert (projection.k_norm is None) == (norm is None)
        rotation = projection.rotation
        assert (0 if rotation is None else rotation.cos_HTP.shape[0]) == num_rotations
        assert (None if rotation is None else "adjacent" if rotation.is_adjacent else "halves") == pairs
        if rotation is not None:
            assert_prefix_is_not_rotated(rotation, check.geometry.tokens.num_prefix_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_some_layers_and_heads_are_those_of_all(family):
    model = make(*FAMILIES[family][:2])
    every = check_capture(model, some_images(model), with_inputs=True).projections
    check = check_capture(model, some_images(model), [1], [0, 2], with_inputs=True)
    (projection,) = check.projections
    (layer,) = capture_others(model, check, [1], [0, 2])
    assert (projection.num_heads, projection.num_kv_heads) == (2, 2)
    assert_recomputed([projection], [layer])
    for part, whole in zip(projection(layer.input_BTC), every[1](layer.input_BTC), strict=True):
        torch.testing.assert_close(part, whole[:, [0, 2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_comes_back_from_its_state_unchanged(family):
    model = make(*FAMILIES[family][:2])
    check = check_capture(model, some_images(model), heads=[1, 2], with_inputs=True)
    for projection, layer in zip(check.projections, capture_others(model, check, heads=[1, 2]), strict=True):
        state = {name: tensor.clone() for name, tensor in projection.to_state().items()}
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        again = HeadProjection.from_state(state, check.geometry)
        for here, there in zip(projection(layer.input_BTC), again(layer.input_BTC), strict=True):
            assert torch.equal(here, there)
        assert again.to_state().keys() == state.keys()
        moved = projection.to("meta")(layer.input_BTC.to("meta"))
        assert [tensor.shape for tensor in moved] == [layer.q_BHTD.shape, layer.k_BHTD.shape]


@pytest.mark.parametrize("family", ["vit", "layer norm of q and k", "beit", "eva02", "dinov3", "mixed rope"])
def test_under_autocast_recipes_are_right_within_its_rounding(family):
    model = make(*FAMILIES[family][:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check = check_capture(model, some_images(model), with_inputs=True)
        layers = capture_others(model, check)
        assert layers[0].q_BHTD.dtype == torch.bfloat16
        assert layers[0].input_BTC.dtype == torch.float32
        assert_recomputed(check.projections, layers, tolerance=2e-2)
    assert_recomputed(check.projections, layers, tolerance=2e-2)
    for projection in check.projections:
        if projection.rotation is not None:
            assert_prefix_is_not_rotated(projection.rotation, check.geometry.tokens.num_prefix_tokens)


# Attention that timm does not have


class Shaped(nn.Module):
    """An attention of four heads of q and two of k, whose parts a test chooses."""

    def __init__(self, after_linear=lambda q, k: (q, k), after_norm=lambda q, k: (q, k), scale=None):
        super().__init__()
        self.after_linear, self.after_norm, self.scale = after_linear, after_norm, scale
        self.qkv = nn.Linear(48, 96)
        self.q_norm = self.k_norm = nn.Identity()

    def forward(self, tokens, **_ignored):
        query, key, value = self.qkv(tokens).split([48, 24, 24], dim=-1)
        query, key = self.after_linear(query, key)
        query, key, value = (part.unflatten(-1, (-1, 12)).transpose(1, 2) for part in (query, key, value))
        query, key = self.after_norm(self.q_norm(query), self.k_norm(key))
        if key.shape[1] == 4:
            value = value.repeat_interleave(2, dim=1)
        output = functional.scaled_dot_product_attention(
            query, key, value, enable_gqa=key.shape[1] == 2, scale=self.scale
        )
        return output.transpose(1, 2).flatten(2)


def with_attention(make_attention) -> nn.Module:
    model = make("vit_tiny_patch16_224", {"num_heads": 4})
    for block in model.blocks:
        block.attn = randomised(make_attention())
    return model


def rotated(pairs_BHTP: torch.Tensor, is_per_head: bool) -> torch.Tensor:
    """Pairs as complex numbers, turned by an angle that token, pair and, if wanted, head of k give."""
    _, num_heads, num_tokens, num_pairs = pairs_BHTP.shape
    angles_HTP = torch.arange(num_tokens)[:, None] * 0.3 ** torch.arange(num_pairs)
    if is_per_head:
        angles_HTP = angles_HTP + torch.arange(2).repeat_interleave(num_heads // 2)[:, None, None]
    return pairs_BHTP * torch.polar(torch.ones_like(angles_HTP), angles_HTP)


def rotate_heads(is_per_head: bool, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(heads):
        pairs_BHTP = rotated(torch.complex(*heads.chunk(2, dim=-1)), is_per_head)
        return torch.cat([pairs_BHTP.real, pairs_BHTP.imag], dim=-1)

    return rotate(query), rotate(key)


def repeat_keys(query, key):
    query, key = rotate_heads(False, query, key)
    return query, key.repeat_interleave(2, dim=1)


def normed() -> Shaped:
    attention = Shaped(after_norm=lambda q, k: (q * 0.3, k))
    attention.q_norm, attention.k_norm = nn.LayerNorm(12, eps=1e-3), RmsNorm(12, affine=False)
    return attention


SHAPED = {
    "grouped": Shaped,
    "grouped, shared angles": lambda: Shaped(after_norm=functools.partial(rotate_heads, False)),
    "grouped, angles for each head": lambda: Shaped(after_norm=functools.partial(rotate_heads, True)),
    "keys repeated for the call": lambda: Shaped(after_norm=repeat_keys),
    "q scaled before the call": lambda: Shaped(after_norm=lambda q, k: (q * 12**-0.5, k), scale=1.0),
    "norms of two kinds, then q scaled": normed,
    "bias added in place": lambda: Shaped(after_linear=lambda q, k: (q.add_(0.5), k.add_(torch.arange(24) / 12))),
}


@pytest.mark.parametrize("heads", [None, [1, 2], [3]])
@pytest.mark.parametrize("kind", SHAPED)
def test_recipes_of_attention_that_nobody_listed(kind, heads):
    model = with_attention(SHAPED[kind])
    check = check_capture(model, some_images(model), heads=heads, with_inputs=True)
    assert_recomputed(check.projections, capture_others(model, check, heads=heads))
    for projection in check.projections:
        again = HeadProjection.from_state(projection.to_state(), check.geometry)
        assert again.num_kv_heads == check.geometry.num_kv_heads


def mix_tokens(query, key):
    return query + 0.1 * query.roll(1, dims=-2), key


def mix_heads(query, key):
    return query + 0.1 * query.roll(1, dims=1), key


def bend(query, key):
    return query, functional.gelu(key)


def shrink_class_token(query, key):
    return query, torch.cat([0.85 * key[:, :, :1], key[:, :, 1:]], dim=2)


def other_norm() -> Shaped:
    attention = Shaped()
    attention.q_norm, attention.k_norm = nn.GroupNorm(4, 4), nn.Identity()
    return attention


class OtherInput(Shaped):
    """k is made from another input than q."""

    def __init__(self):
        super().__init__(after_linear=lambda q, k: (q, self.keys(self.narrow.tanh())))
        self.narrowing, self.keys = nn.Linear(48, 20), nn.Linear(20, 24)

    def forward(self, tokens, **_ignored):
        self.narrow = self.narrowing(tokens)
        return super().forward(tokens)


def norm_over_all_heads() -> Shaped:
    return Shaped(after_linear=lambda q, k: (functional.layer_norm(q, (48,)), k))


NOT_PROJECTED = {
    "tokens mixed": lambda: Shaped(after_norm=mix_tokens),
    "heads mixed": lambda: Shaped(after_norm=mix_heads),
    "a nonlinearity": lambda: Shaped(after_norm=bend),
    "another factor in one token": lambda: Shaped(after_norm=shrink_class_token),
    "another input for k": OtherInput,
    "a norm of another kind": other_norm,
    "a norm over all heads": norm_over_all_heads,
}


@pytest.mark.parametrize("kind", NOT_PROJECTED)
def test_attention_without_a_recipe_has_none_and_is_captured_all_the_same(kind):
    model = with_attention(NOT_PROJECTED[kind])
    model.blocks[0].attn = randomised(Shaped())  # one such layer is enough
    check = check_capture(model, some_images(model), with_inputs=True)
    assert (check.projections, check.input_calls) == (None, None)
    assert check.geometry.layers == (0, 1)
    (projection,) = check_capture(model, some_images(model), [0], with_inputs=True).projections
    assert projection.num_heads == 4


def turn_by_batch(query, key):
    """One angle for everything, which the batch gives."""
    angle = query.std()

    def turn(heads):
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)

    return turn(query), turn(key)


def test_a_recipe_that_is_right_for_the_first_images_only_does_not_count():
    model = with_attention(lambda: Shaped(after_norm=turn_by_batch))
    assert check_capture(model, some_images(model), with_inputs=True).projections is None


def test_under_autocast_one_wrong_token_of_many_is_noticed():
    model = make("vit_tiny_patch16_224", {"num_heads": 4, "img_size": 160})
    model.blocks[1].attn = randomised(Shaped(after_norm=shrink_class_token))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert check_capture(model, some_images(model), [0], with_inputs=True).projections is not None
        assert check_capture(model, some_images(model), [1], with_inputs=True).projections is None


def test_maps_have_no_recipes():
    model = make("cait_xxs24_224", {"num_heads": 4})
    check = check_capture(model, some_images(model), with_inputs=True)
    assert (check.geometry.kind, check.projections, check.input_calls) == ("maps", None, None)


# Capture of inputs


def test_inputs_are_what_the_first_norm_gives_and_are_kept_only_on_request():
    model = make(*FAMILIES["vit"][:2])
    check = check_capture(model, some_images(model), with_inputs=True)
    normed_BTC = []
    handle = model.blocks[1].norm1.register_forward_hook(lambda _module, _args, output: normed_BTC.append(output))
    capture = FactorCapture(model, [1], input_calls=check.input_calls[1:])
    for _ in range(2):  # the first call runs its last block to the end, later ones stop at the attention
        (layer,) = capture(some_images(model))
        assert torch.equal(layer.input_BTC, normed_BTC.pop())
        assert not layer.input_BTC.requires_grad
    handle.remove()
    assert torch.equal(layer.select(slice(1, 2)).input_BTC, layer.input_BTC[1:2])
    assert layer.select_heads([2]).input_BTC is layer.input_BTC
    assert FactorCapture(model)(some_images(model))[0].input_BTC is None
    plain = check_capture(model, some_images(model))
    assert (plain.projections, plain.input_calls) == (None, None)


def test_input_calls_of_another_model_are_refused():
    model = make(*FAMILIES["vit"][:2])
    with pytest.raises(ConfigError, match="1 input calls for 2 layers"):
        FactorCapture(model, input_calls=[0])
    with pytest.raises(UnsupportedAttentionError, match=r"block 0 made 1 calls of linear before it attended.* call 3"):
        FactorCapture(model, input_calls=[3, 0])(some_images(model))


def test_an_input_of_other_tokens_is_refused():
    with pytest.raises(AttentionShapeError, match=r"the input has shape \(2, 5, 8\) and k has shape \(2, 3, 4, 6\)"):
        LayerFactors(
            q_BHTD=torch.ones(2, 3, 4, 6), k_BHTD=torch.ones(2, 3, 4, 6), scale=1.0, input_BTC=torch.ones(2, 5, 8)
        )


# States from anywhere

GEOMETRY = make_geometry(num_heads=4, num_kv_heads=2)  # of 8 components and 7 tokens


def made_state() -> dict[str, torch.Tensor]:
    """A right one with everything in it."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return HeadProjection(
        weight_NC=draw(48, 5),
        bias_N=draw(48),
        num_heads=4,
        num_kv_heads=2,
        q_norm=HeadNorm(weight_D=draw(8), bias_D=draw(8), eps=1e-6),
        k_norm=HeadNorm(weight_D=draw(8), bias_D=None, eps=1e-5),
        rotation=HeadRotation(cos_HTP=draw(2, 7, 4).cos(), sin_HTP=draw(2, 7, 4).sin(), is_adjacent=True),
    ).to_state()


def test_a_right_state_is_accepted():
    projection = HeadProjection.from_state(made_state(), GEOMETRY)
    q_BHTD, k_BHTD = projection(torch.ones(3, 7, 5))
    assert (q_BHTD.shape, k_BHTD.shape) == ((3, 4, 7, 8), (3, 2, 7, 8))


@pytest.mark.parametrize("name", sorted(set(made_state()) - {"q_norm.bias_D"}))
def test_a_state_that_lacks_a_tensor_is_refused(name):
    state = made_state()
    del state[name]
    with pytest.raises(CodecError, match=f"^projection: {name} is missing"):
        HeadProjection.from_state(state, GEOMETRY)


@pytest.mark.parametrize("name", sorted(made_state()))
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensor: tensor[None], r"is torch.float32 of shape .*, expected torch.float32 of"),
        (lambda tensor: tensor[:0], "of shape .*, expected"),
        (lambda tensor: tensor.sum(), r"of shape \(\), expected"),
        (lambda tensor: torch.cat([tensor, tensor]), "of shape .*, expected"),
        (lambda tensor: tensor.double(), "is torch.float64"),
        (lambda tensor: tensor.to(torch.int64), "is torch.int64"),
        (lambda tensor: tensor * float("nan"), "not finite"),
        (lambda tensor: tensor + float("inf"), "not finite"),
    ],
)
def test_a_damaged_tensor_is_refused_by_its_name(name, damage, message):
    state = made_state()
    state[name] = damage(state[name])
    with pytest.raises(CodecError, match=f"^projection: .*{message}"):
        HeadProjection.from_state(state, GEOMETRY)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q_norm.eps_1", torch.zeros(1), "above 0 and at most 1"),
        ("k_norm.eps_1", torch.tensor([2.0]), "above 0 and at most 1"),
        ("rotation.is_adjacent_1", torch.tensor([0.5]), "0 or 1"),
        ("rotation.cos_HTP", torch.full((2, 7, 4), 1.5), "from -1 to 1"),
        ("rotation.sin_HTP", torch.full((2, 7, 4), -1.5), "from -1 to 1"),
        ("rotation.sin_HTP", torch.zeros(1, 7, 4), r"expected torch.float32 of \(2, 7, 4\)"),
        ("rotation.cos_HTP", torch.zeros(1, 7, 4), r"expected torch.float32 of \(1, 7, 4\)"),
        ("weight_NC", torch.zeros(48, 0), r"expected torch.float32 of \(48, 1\)"),
        ("v_norm.weight_D", torch.zeros(8), "'v_norm.weight_D' is unknown to this version"),
    ],
)
def test_values_and_shapes_out_of_range_are_refused(name, value, message):
    with pytest.raises(CodecError, match=message):
        HeadProjection.from_state({**made_state(), name: value}, GEOMETRY)


def test_a_state_of_another_geometry_is_refused():
    with pytest.raises(CodecError, match="expected"):
        HeadProjection.from_state(made_state(), make_geometry(num_heads=4, num_kv_heads=4))
    with pytest.raises(CodecError, match="heads of 7 components have no pairs to rotate"):
        HeadProjection.from_state(made_state(), make_geometry(num_heads=4, num_kv_heads=2, head_dim=7))
    with pytest.raises(CodecError, match="weight_NC is missing"):
        HeadProjection.from_state({}, GEOMETRY)
