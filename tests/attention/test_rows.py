"""Rows of prefix tokens only: captured as the whole maps have them, refused where there are none, and learnt from."""

from __future__ import annotations

import pytest
import timm
import torch
from made_factors import make_factors, make_geometry
from torch.nn import functional

from atcache.attention.capture import FactorCapture, check_capture
from atcache.attention.distillation import attention_distillation_loss, logits_distillation_loss
from atcache.attention.factors import LayerFactors, LayerMaps
from atcache.attention.geometry import FactorGeometry
from atcache.attention.intercept import AttentionCall, MapCall
from atcache.codecs.fidelity import mean_row_kl
from atcache.errors import AttentionShapeError, ConfigError
from atcache.students.attend import attend_with_given

WITH_CLASS_TOKEN = {
    "vit": ("vit_tiny_patch16_224", {}, 1),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 42}, 5),
    "bias": ("beitv2_base_patch16_224", {}, 1),
    "rotary": ("vit_small_patch16_dinov3", {}, 5),
    "distillation token": ("deit_tiny_distilled_patch16_224", {}, 2),
}


def make(name: str, **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": 48, "depth": 2, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num().clamp_min(0.05))
    return model


def some_images(model: torch.nn.Module) -> torch.Tensor:
    height, width = model.patch_embed.img_size
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("queries", ["cls", "prefix"])
@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_captured_rows_are_the_first_of_the_whole_maps(family, queries):
    name, arguments, num_prefix_tokens = WITH_CLASS_TOKEN[family]
    model = make(name, **arguments)
    images = some_images(model)
    check = check_capture(model, images, heads=[0, 2], queries=queries)
    num_queries = check.geometry.num_queries
    assert num_queries == (1 if queries == "cls" else num_prefix_tokens)
    whole, rows = FactorCapture(model, heads=[0, 2]), FactorCapture(model, heads=[0, 2], queries=queries)
    for layer, rows_of_layer in zip(whole(images), rows(images), strict=True):
        torch.testing.assert_close(rows_of_layer.maps(), layer.maps()[:, :, :num_queries])
        assert rows_of_layer.q_BHTD.untyped_storage().nbytes() == 2 * 2 * num_queries * layer.q_BHTD.shape[3] * 4
    assert rows.geometry == check.geometry
    if check.bias_LHQK is not None:
        assert check.bias_LHQK.shape == (2, 2, num_queries, rows.geometry.tokens.num_tokens)


def test_a_class_token_is_the_first_token():
    model = make("vit_small_patch14_reg4_dinov2", img_size=42)
    images = some_images(model)
    before = FactorCapture(model, [0], queries="cls")(images)[0].q_BHTD
    with torch.no_grad():
        model.cls_token[..., ::2] += 1
    assert not torch.allclose(FactorCapture(model, [0], queries="cls")(images)[0].q_BHTD, before, atol=1e-2)


def test_the_geometry_says_which_rows_there_are_and_nothing_where_all_are():
    whole = make_geometry(prefix=3)
    assert "queries" not in whole.to_json()
    assert whole.num_queries == 9
    rows = FactorGeometry.from_json({**whole.to_json(), "queries": "prefix"})
    assert (rows.num_queries, rows.keeps_all_queries) == (3, False)
    assert rows.map_nbytes == 2 * 3 * 3 * 9 * 2
    assert FactorGeometry.from_json(rows.to_json()) == rows


@pytest.mark.parametrize("queries", ["cls", "prefix"])
def test_no_geometry_has_rows_of_prefix_tokens_that_do_not_exist(queries):
    with pytest.raises(ConfigError, match=f"queries={queries}: the teacher has no prefix tokens"):
        FactorGeometry.from_json({**make_geometry(prefix=0).to_json(), "queries": queries})


@pytest.mark.parametrize("queries", ["cls", "prefix"])
@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "cait_xxs24_224"])
def test_teachers_without_prefix_tokens_are_refused(name, queries):
    model = timm.create_model(name, img_size=32, depth=1)
    with pytest.raises(ConfigError, match=rf"queries={queries}: {name} attends with no prefix tokens "):
        FactorCapture(model, queries=queries)


def test_a_register_is_not_taken_for_a_class_token():
    model = make("vit_pwee_patch16_reg1_gap_256")
    with pytest.raises(ConfigError, match=r"has 1 prefix tokens, and none is a class token\. Give --queries prefix"):
        FactorCapture(model, queries="cls")
    assert FactorCapture(model, queries="prefix")(some_images(model))[0].shape_BHT[2] == 1


# Learning from rows


def factors_pair(num_queries=2):
    """Teacher and student of 9 tokens; the teacher's maps with few rows; the student's logits, with a bias."""
    teacher = make_factors(make_geometry(prefix=3), seed=1)[0]
    student = make_factors(make_geometry(prefix=3), seed=2)[0]
    bias = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    student = LayerFactors(
        q_BHTD=student.q_BHTD.double().requires_grad_(),
        k_BHTD=student.k_BHTD.double().requires_grad_(),
        scale=student.scale,
        bias=bias.double().requires_grad_(),
    )
    return LayerMaps(attn_BHQK=teacher.maps()[:, :, :num_queries]), student


def gradients(loss, student):
    return torch.autograd.grad(loss, [student.q_BHTD, student.k_BHTD, student.bias])


@pytest.mark.parametrize("live", [False, True])
def test_the_loss_of_rows_is_the_mean_over_these_rows(live):
    given, student = factors_pair()
    if live:
        whole = make_factors(make_geometry(prefix=3), seed=1)[0]
        given = whole.select_queries(2)
    expected = -(given.maps() * student.log_maps(torch.float64)[:, :, :2]).sum(-1).mean()
    loss = attention_distillation_loss(given, student)
    torch.testing.assert_close(loss, expected)
    for ours, plain in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(ours, plain)


def test_students_that_form_their_own_maps_learn_rows_too():
    given, student = factors_pair()
    logits_BHQK = student.log_maps(torch.float32).detach()
    expected = -(given.maps() * logits_BHQK[:, :, :2]).sum(-1).mean()
    torch.testing.assert_close(logits_distillation_loss(given, logits_BHQK), expected)


def test_fewer_tokens_are_not_taken_for_rows():
    _, student = factors_pair()
    other = LayerMaps(attn_BHQK=torch.full((2, 3, 2, 7), 1 / 7))
    with pytest.raises(AttentionShapeError, match=r"\(batch, head, token\) \(2, 3, 2\) and the student's has"):
        attention_distillation_loss(other, student)
    square = LayerMaps(attn_BHQK=torch.full((2, 3, 7, 7), 1 / 7))
    with pytest.raises(AttentionShapeError, match=r"\(2, 3, 7\)"):
        attention_distillation_loss(square, student)


@pytest.mark.parametrize("heads", [[0, 1, 2], [1]])
def test_tokens_without_given_rows_attend_as_usual(heads):
    given, student = factors_pair()
    value_BHTD = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    call = AttentionCall(
        block=0, query=student.q_BHTD, key=student.k_BHTD, value=value_BHTD, attn_mask=student.bias, dropout_p=0.0,
        is_causal=False, scale=student.scale, enable_gqa=False,
    )  # fmt: skip
    expected = student.maps().double()
    expected[:, heads, :2] = given.attn_BHQK[:, heads].double()
    attended_BHTD = attend_with_given(call, given.select_heads(heads), heads)
    torch.testing.assert_close(attended_BHTD, expected @ value_BHTD, rtol=1e-5, atol=1e-5)
    maps_BHQK = attend_with_given(
        MapCall(block=0, logits_BHQK=student.log_maps(torch.float64)), given.select_heads(heads), heads
    )
    torch.testing.assert_close(maps_BHQK, expected, rtol=1e-5, atol=1e-5)


def test_row_kl_is_that_of_the_rows():
    given, student = factors_pair()
    student = LayerFactors(q_BHTD=student.q_BHTD.detach(), k_BHTD=student.k_BHTD.detach(), scale=student.scale)
    rows = student.select_queries(2)
    expected = functional.kl_div(student.log_maps()[:, :, :2], given.maps(), reduction="none").sum(-1).mean()
    assert mean_row_kl(given, rows.select) == pytest.approx(float(expected), rel=1e-5)
