"""Students given their own factors compute what they would have computed; those given others use the others."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from atcache.attention.factors import FactorGeometry, LayerFactors
from atcache.attention.intercept import AttentionIntercept
from atcache.attention.transfer import CopyStudent, DistilledStudent, LiveFactors, ValueOnlyAttention, check_student
from atcache.errors import TeacherError
from atcache.tokens import TokenLayout

SMALL = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
# One model for every attention class whose value path is known, and one whose attention is not a module.
VALUE_ONLY_MODELS = {
    "Attention": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "Attention qk-norm, scale-norm": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "qk_norm": True, "scale_attn_norm": True},
    ),
    "Attention no bias": ("vit_tiny_patch16_224", {"patch_size": 8, "qkv_bias": False}),
    "EvaAttention": ("eva02_tiny_patch14_224", {"patch_size": 8}),
    "EvaAttention DINOv3": ("vit_small_patch16_dinov3", {"patch_size": 8}),
    "BEiT Attention": ("beitv2_base_patch16_224", {"patch_size": 8}),
    "RelPosAttention": ("vit_relpos_small_patch16_224", {"patch_size": 8}),
    "AttentionRope": ("vit_base_patch16_rope_mixed_224", {"patch_size": 8}),
}


def make_model(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, **{**SMALL, **kwargs}).eval()
    for name_, parameter in model.named_parameters():
        # Zeros would hide a forgotten bias; weights as small as timm's would make every map nearly uniform.
        if any(part in name_ for part in ("bias", "table", "gamma", "attn")):
            nn.init.normal_(parameter, std=0.3)
    return model


def own_factors(model, images):
    """Each block's factors, taken at the attention call."""
    layers = {}

    def keep(call):
        layers[call.block] = LayerFactors(q_BHTD=call.query, k_BHTD=call.key, scale=call.scale, bias=call.bias())
        return call.run()

    with torch.no_grad(), AttentionIntercept(model.blocks, keep):
        logits = model(images)
    return LiveFactors(layers), layers, logits


def geometry_of(layers, heads=None):
    first = layers[0]
    num_heads = first.q_BHTD.shape[1]
    return FactorGeometry(
        layers=tuple(layers),
        heads=tuple(heads or range(num_heads)),
        num_model_heads=num_heads,
        num_kv_heads=first.k_BHTD.shape[1],
        head_dim=first.q_BHTD.shape[-1],
        tokens=TokenLayout(num_prefix_tokens=first.q_BHTD.shape[2] - 16, grid_height=4, grid_width=4),
        scale=first.scale,
    )


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", VALUE_ONLY_MODELS)
def test_copying_its_own_attention_changes_nothing_and_drops_q_and_k(kind, images):
    name, kwargs = VALUE_ONLY_MODELS[kind]
    model = make_model(name, **kwargs)
    teacher, layers, logits = own_factors(model, images)
    student = copy_student(model, layers, (0, 1))
    assert all(isinstance(block.attn, ValueOnlyAttention) for block in student.model.blocks)
    torch.testing.assert_close(student(images, teacher), logits, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in student.named_parameters() if "qkv" in name or "q_proj" in name or "k_proj" in name]


def copy_student(model, layers, chosen, heads=None):
    own = copy.deepcopy(model)
    return CopyStudent(own, own.blocks, geometry_of(layers, heads), chosen)


def test_every_remaining_parameter_of_a_copy_student_gets_a_gradient(images):
    model = make_model("vit_tiny_patch16_224", patch_size=8)
    teacher, layers, _ = own_factors(model, images)
    student = copy_student(model, layers, (0, 1))
    student(images, teacher).square().sum().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_copy_uses_the_given_maps_not_its_own(images):
    model, other = make_model("vit_tiny_patch16_224", patch_size=8), make_model("vit_tiny_patch16_224", 7, patch_size=8)
    teacher, layers, _ = own_factors(other, images * 3)
    student = copy_student(model, layers, (0, 1))
    # Second opinion: the stock model with its attention call replaced by maps @ v.
    with AttentionIntercept(model.blocks, lambda call: layers[call.block].maps() @ call.value):
        expected = model(images)
    torch.testing.assert_close(student(images, teacher), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model(images), atol=1e-3)


def test_layers_left_out_keep_their_own_attention(images):
    model, other = make_model("vit_tiny_patch16_224", patch_size=8), make_model("vit_tiny_patch16_224", 7, patch_size=8)
    teacher, layers, _ = own_factors(other, images)
    student = copy_student(model, layers, (0,))
    with AttentionIntercept(
        model.blocks, lambda call: layers[0].maps() @ call.value if call.block == 0 else call.run()
    ):
        expected = model(images)
    torch.testing.assert_close(student(images, teacher), expected, rtol=1e-4, atol=1e-5)
    assert "model.blocks.1.attn.qkv.weight" in dict(student.named_parameters())


def test_heads_left_out_keep_their_own_attention(images):
    model = make_model("vit_tiny_patch16_224", patch_size=8)
    _, layers, logits = own_factors(model, images)
    only_head_1 = {
        block: LayerFactors(q_BHTD=f.q_BHTD[:, 1:], k_BHTD=f.k_BHTD[:, 1:], scale=f.scale)
        for block, f in layers.items()
    }
    student = copy_student(model, layers, (0, 1), heads=(1,))
    torch.testing.assert_close(student(images, LiveFactors(only_head_1)), logits, rtol=1e-4, atol=1e-5)


def test_a_distilled_student_is_the_timm_model_with_a_loss_beside_it(images):
    model, other = make_model("vit_tiny_patch16_224", patch_size=8), make_model("vit_tiny_patch16_224", 7, patch_size=8)
    teacher, teacher_layers, _ = own_factors(other, images)
    _, own_layers, expected_logits = own_factors(model, images)
    student = DistilledStudent(model, model.blocks, geometry_of(teacher_layers), (0, 1))
    logits, loss = student(images, teacher)
    torch.testing.assert_close(logits, expected_logits)
    expected = torch.stack(
        [-(teacher_layers[i].maps() * own_layers[i].maps().log()).sum(-1).mean() for i in (0, 1)]
    ).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None


def test_attention_inside_the_block_is_intercepted(images):
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **SMALL,
        patch_size=8,
        block_fn=timm.models.vision_transformer.ParallelScalingBlock,
    ).eval()
    teacher, layers, logits = own_factors(model, images)
    student = copy_student(model, layers, (0, 1))
    torch.testing.assert_close(student(images, teacher), logits, rtol=1e-4, atol=1e-5)


def test_a_student_that_cannot_take_the_factors_is_refused_with_both_sides_named():
    layout = TokenLayout(num_prefix_tokens=1, grid_height=4, grid_width=4)
    teacher = FactorGeometry(
        layers=(0, 1, 2), heads=(0, 1), num_model_heads=2, num_kv_heads=2, head_dim=16, tokens=layout, scale=0.25
    )
    other = FactorGeometry(
        layers=(0, 1),
        heads=(0, 1, 2),
        num_model_heads=3,
        num_kv_heads=3,
        head_dim=16,
        tokens=TokenLayout(num_prefix_tokens=0, grid_height=4, grid_width=4),
        scale=0.25,
    )
    with pytest.raises(
        TeacherError,
        match=r"student small has 3 heads a layer, the teacher 2; 0 \+ 4x4 tokens, the teacher 1 \+ 4x4 tokens; "
        r"2 layers and so no layer 2.*leave --student out",
    ):
        check_student(teacher, other, (0, 1, 2), student_name="small")
    check_student(teacher, teacher, (0, 2), student_name="itself")
