"""Copy and distillation against the plain formulas, in float64, with every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atcache.attention import kernels
from atcache.attention.distillation import attention_distillation_loss, distilled_attention, logits_distillation_loss
from atcache.attention.factors import LayerFactors, LayerMaps
from atcache.attention.kernels import copy_attention
from atcache.errors import AttentionShapeError

BIAS_SHAPES = [None, (1, 2, 7, 7), (3, 2, 7, 7), (3, 1, 7, 7), (1, 1, 1, 7)]
"""None, for all samples, for each, for all heads of each, and one of keys only."""


def make_factors(seed, batch=3, heads=2, tokens=7, head_dim=4, kv_heads=None, bias_shape=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    return LayerFactors(
        q_BHTD=draw(batch, heads, tokens, head_dim),
        k_BHTD=draw(batch, kv_heads or heads, tokens, head_dim),
        scale=0.3,
        bias=None if bias_shape is None else draw(*bias_shape),
    )


def plain_maps(factors):
    logits = factors.scale * factors.q_BHTD @ factors.repeated_k_BHTD().mT
    return torch.softmax(logits if factors.bias is None else logits + factors.bias, dim=-1)


def plain_loss(teacher, student):
    return -(plain_maps(teacher).detach() * plain_maps(student).log()).sum(-1).mean()


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


# Of factors as above, 7 rows of 56 bytes a sample: a row a slice; three rows, and the last one of a sample alone; a
# sample; two samples, and the last one alone; everything.
@pytest.fixture(params=[1, 170, 400, 800, kernels.CPU_SLICE_NBYTES])
def slice_nbytes(request, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_SLICE_NBYTES", request.param)


@pytest.mark.usefixtures("slice_nbytes")
@pytest.mark.parametrize("bias_shape", BIAS_SHAPES)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_copy_equals_the_plain_formula_and_only_v_has_a_gradient(bias_shape, kv_heads):
    teacher = make_factors(0, bias_shape=bias_shape, kv_heads=kv_heads)
    value = torch.randn(3, 2, 7, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 2, 7, 5, dtype=torch.float64)
    out = copy_attention(teacher, value)
    expected = plain_maps(teacher).detach() @ value
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    out.backward(upstream)
    grad = value.grad.clone()
    value.grad = None
    expected.backward(upstream)
    torch.testing.assert_close(grad, value.grad, rtol=0, atol=1e-14)
    assert teacher.q_BHTD.grad is None
    assert teacher.k_BHTD.grad is None


@pytest.mark.usefixtures("slice_nbytes")
@pytest.mark.parametrize("student_bias", BIAS_SHAPES)
@pytest.mark.parametrize("teacher_bias", [None, (1, 2, 7, 7)])
def test_distillation_equals_the_plain_formula_in_loss_and_gradients(student_bias, teacher_bias):
    teacher = make_factors(0, bias_shape=teacher_bias)
    student = make_factors(1, head_dim=6, bias_shape=student_bias)
    wanted = [t for t in (student.q_BHTD, student.k_BHTD, student.bias) if t is not None]
    loss, plain = attention_distillation_loss(teacher, student), plain_loss(teacher, student)
    torch.testing.assert_close(loss, plain, rtol=1e-14, atol=0)
    for got, expected in zip(gradients(3 * loss, wanted), gradients(3 * plain, wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)


@pytest.mark.usefixtures("slice_nbytes")
@pytest.mark.parametrize("bias_shape", BIAS_SHAPES)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_attention_and_its_loss_in_one_pass_equal_the_plain_formulas_with_every_gradient(bias_shape, kv_heads):
    teacher = make_factors(0)
    student = make_factors(1, head_dim=6, bias_shape=bias_shape, kv_heads=kv_heads)
    v_BHTD = torch.randn(3, kv_heads, 7, 5, dtype=torch.float64, requires_grad=True)
    student = replace(student, v_BHTD=v_BHTD)
    wanted = [t for t in (student.q_BHTD, student.k_BHTD, v_BHTD, student.bias) if t is not None]
    attended, loss = distilled_attention(teacher, student)
    expected, plain = plain_maps(student) @ student.repeated_v_BHTD(), plain_loss(teacher, student)
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(loss, plain, rtol=1e-14, atol=0)
    found = gradients(attended.sin().sum() + 3 * loss, wanted)
    for got, true in zip(found, gradients(expected.sin().sum() + 3 * plain, wanted), strict=True):
        torch.testing.assert_close(got, true, rtol=0, atol=1e-14)


@pytest.mark.parametrize("num_rows", [200, 8])
def test_one_pass_in_bf16_errs_hardly_more_than_materialised_maps_however_many_slices(num_rows, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_SLICE_NBYTES", 4 * 2 * 200 * num_rows)
    teacher, student = (make_factors(seed, tokens=200, head_dim=32, dtype=torch.bfloat16) for seed in (0, 1))
    student = replace(student, v_BHTD=make_factors(2, tokens=200, head_dim=32, dtype=torch.bfloat16).q_BHTD)
    inputs = (student.q_BHTD, student.k_BHTD, student.v_BHTD)

    def results(attended, loss):
        return attended.detach(), *gradients(attended.float().sin().sum() + 1e3 * loss, inputs)

    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    wide = LayerFactors(q_BHTD=exact[0], k_BHTD=exact[1], v_BHTD=exact[2], scale=student.scale)
    attended, loss = plain_maps(wide) @ exact[2], plain_loss(teacher, wide)
    truth = attended.detach(), *gradients(attended.sin().sum() + 1e3 * loss, exact)
    logits = (student.q_BHTD @ student.k_BHTD.mT).float() * student.scale
    loss = logits_distillation_loss(teacher, logits)
    usual = results(logits.softmax(-1).bfloat16() @ student.v_BHTD, loss)
    for got, other, true in zip(results(*distilled_attention(teacher, student)), usual, truth, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - true).norm() <= 1.2 * (other - true).norm() <= 0.05 * true.norm()


@pytest.mark.parametrize("num_rows", [200, 2])
def test_copying_in_bf16_rounds_v_s_gradient_once_however_many_slices(num_rows, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_SLICE_NBYTES", 4 * 2 * 200 * num_rows)
    teacher, own = (make_factors(seed, tokens=200, head_dim=32, dtype=torch.bfloat16) for seed in (0, 1))
    value, upstream = own.q_BHTD, own.k_BHTD.detach()
    (got,) = torch.autograd.grad(copy_attention(teacher, value), value, upstream)
    true = plain_maps(replace(teacher, q_BHTD=teacher.q_BHTD.double(), k_BHTD=teacher.k_BHTD.double())).mT
    true = true @ upstream.double()
    assert (got - true).norm() <= 0.01 * true.norm()


def test_autocast_around_distillation_changes_nothing():
    teacher, student = (make_factors(seed, dtype=torch.float32) for seed in (0, 1))
    student = replace(student, v_BHTD=make_factors(2, dtype=torch.float32).q_BHTD)
    inputs = (student.q_BHTD, student.k_BHTD, student.v_BHTD)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            attended, loss = distilled_attention(teacher, student)
            found.append((attended, loss, *gradients(attended.sum() + loss, inputs)))
    for plain, under_autocast in zip(*found, strict=True):
        assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("frozen", ["q_BHTD", "k_BHTD", "v_BHTD", "bias"])
@pytest.mark.parametrize("uses", ["output", "loss", "both"])
def test_one_pass_gives_what_is_wanted_of_what_is_used(uses, frozen):
    teacher, student = make_factors(0), make_factors(1, bias_shape=(1, 2, 7, 7))
    student = replace(student, v_BHTD=make_factors(2).q_BHTD)
    student = replace(student, **{frozen: getattr(student, frozen).detach()})
    names = [name for name in ("q_BHTD", "k_BHTD", "v_BHTD", "bias") if name != frozen]
    wanted = [getattr(student, name) for name in names]

    def grads_of(attended, loss):
        total = {"output": attended.sin().sum(), "loss": 3 * loss, "both": attended.sin().sum() + 3 * loss}[uses]
        return torch.autograd.grad(total, wanted, allow_unused=True)

    found = grads_of(*distilled_attention(teacher, student))
    expected = grads_of(plain_maps(student) @ student.v_BHTD, plain_loss(teacher, student))
    for name, got, true in zip(names, found, expected, strict=True):
        assert (got is None) == (true is None) == (uses == "loss" and name == "v_BHTD")
        if true is not None:
            torch.testing.assert_close(got, true, rtol=0, atol=1e-14)


def test_what_one_pass_gives_lies_as_the_projection_behind_it_reads_it():
    student = replace(make_factors(1), v_BHTD=make_factors(2).q_BHTD)
    attended, _ = distilled_attention(make_factors(0), student)
    assert attended.transpose(1, 2).is_contiguous()


def test_gradients_of_gradients_are_refused():
    student = make_factors(1)
    loss = attention_distillation_loss(make_factors(0), student).square()
    (grad,) = torch.autograd.grad(loss, student.q_BHTD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_constant_that_all_logits_share_costs_the_loss_no_digits():
    # Teacher and student alike: of keys far from the origin in one direction that all queries have too.
    factors = [make_factors(seed, tokens=200, head_dim=8, dtype=torch.float32) for seed in (0, 1)]
    for one in factors:
        with torch.no_grad():
            one.q_BHTD[..., 0], one.k_BHTD[..., 0] = 16.0, 16.0
    teacher, student = factors
    wide = [LayerFactors(q_BHTD=f.q_BHTD.double(), k_BHTD=f.k_BHTD.double(), scale=0.3) for f in factors]
    loss, exact = attention_distillation_loss(teacher, student), plain_loss(*wide)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("slice_nbytes")
def test_given_maps_do_what_the_factors_they_come_from_do():
    teacher, student = make_factors(0), make_factors(1, head_dim=6)
    maps = LayerMaps(attn_BHQK=plain_maps(teacher).detach())
    value = student.q_BHTD
    for got, expected in (
        (copy_attention(maps, value).sin().sum(), copy_attention(teacher, value).sin().sum()),
        (attention_distillation_loss(maps, student), attention_distillation_loss(teacher, student)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(*(gradients(loss, value)[0] for loss in (got, expected)), rtol=0, atol=1e-14)


def test_distillation_of_logits_is_that_of_the_factors_they_come_from():
    teacher, student = make_factors(0, dtype=torch.float32), make_factors(1, dtype=torch.float32)
    logits = student.scale * student.q_BHTD @ student.k_BHTD.mT
    got, expected = logits_distillation_loss(teacher, logits), attention_distillation_loss(teacher, student)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(gradients(loss, student.q_BHTD)[0] for loss in (got, expected)))
    with pytest.raises(AttentionShapeError, match=r"\(3, 2, 7\).*\(2, 2, 7\).*teacher's heads and tokens"):
        logits_distillation_loss(teacher, logits[:2])


def test_keys_masked_in_teacher_and_student_cost_nothing():
    bias = torch.full((1, 1, 7, 7), -torch.inf).triu(1)
    teacher, student = (replace(make_factors(seed, dtype=torch.float32), bias=bias) for seed in (0, 1))
    logits = student.scale * student.q_BHTD @ student.k_BHTD.mT + bias
    got, expected = logits_distillation_loss(teacher, logits), attention_distillation_loss(teacher, student)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(gradients(loss, student.q_BHTD)[0] for loss in (got, expected)))


def test_fp16_forms_logits_whose_products_it_could_not_hold():
    seeds = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 64, generator=seeds) * size for size in (60, 60, 1))
    assert (q @ k.mT).abs().max() > 65504
    half = [tensor.half().requires_grad_() for tensor in (q, k, v)]
    factors = LayerFactors(q_BHTD=half[0], k_BHTD=half[1], v_BHTD=half[2], scale=64**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(*(tensor.detach().float() for tensor in half))
    attended, loss = distilled_attention(factors, factors)
    for found in (attended, copy_attention(factors, half[2])):
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    assert all(bool(torch.isfinite(one).all()) for one in (loss, *gradients(attended.float().sum() + loss, half)))


def test_distillation_gradients_pass_gradcheck_with_grouped_keys():
    teacher = make_factors(0)
    student = make_factors(1, kv_heads=1)
    assert torch.autograd.gradcheck(
        lambda q, k: attention_distillation_loss(teacher, LayerFactors(q_BHTD=q, k_BHTD=k, scale=0.7)),
        (student.q_BHTD, student.k_BHTD),
    )


def test_distilling_a_student_equal_to_its_teacher_gives_the_entropy_and_no_gradient():
    teacher = make_factors(0)
    attn = plain_maps(teacher)
    loss = attention_distillation_loss(teacher, teacher)
    torch.testing.assert_close(loss, -(attn * attn.log()).sum(-1).mean())
    for grad in gradients(loss, [teacher.q_BHTD, teacher.k_BHTD]):
        assert float(grad.abs().max()) < 1e-16


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("value_dim", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_by_the_fused_call_and_in_slices_is_attention(dtype, value_dim, autocast):
    teacher = make_factors(3, dtype=dtype, bias_shape=(1, 2, 7, 7))
    value = torch.randn(3, 2, 7, value_dim, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = copy_attention(teacher, value)
    out.float().sin().sum().backward()
    exact = value.detach().double().requires_grad_()
    expected = teacher.maps().double() @ exact
    expected.sin().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert out.dtype == value.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(value.grad.double(), exact.grad, rtol=0, atol=2 * tolerance)


def test_keys_masked_on_both_sides_leave_loss_and_gradients_finite():
    mask = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    mask[..., -1] = -torch.inf
    teacher, free = make_factors(0), make_factors(1)
    teacher = LayerFactors(q_BHTD=teacher.q_BHTD, k_BHTD=teacher.k_BHTD, scale=0.3, bias=mask)
    student = LayerFactors(q_BHTD=free.q_BHTD, k_BHTD=free.k_BHTD, scale=0.3, bias=mask, v_BHTD=free.k_BHTD.detach())
    attended, loss = distilled_attention(teacher, student)
    torch.testing.assert_close(attention_distillation_loss(teacher, student), loss, rtol=0, atol=0)
    torch.testing.assert_close(attended, plain_maps(student) @ free.k_BHTD)
    assert torch.isfinite(loss)
    for total in (loss, loss + attended.sum()):
        kept = torch.autograd.grad(total, [student.q_BHTD, student.k_BHTD], retain_graph=True)
        assert all(torch.isfinite(grad).all() for grad in kept)


def test_maps_are_formed_in_their_own_type_also_under_autocast():
    factors = make_factors(6, tokens=50, dtype=torch.float32)
    expected = (factors.maps(), factors.log_maps(torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, log_maps = factors.maps(), factors.log_maps(torch.float64)
    assert torch.equal(maps, expected[0])
    assert torch.equal(log_maps, expected[1])


def test_students_of_other_token_counts_are_refused():
    with pytest.raises(AttentionShapeError, match=r"\(3, 2, 7\).*\(3, 2, 5\).*teacher's heads and tokens"):
        attention_distillation_loss(make_factors(0), make_factors(1, tokens=5))
    with pytest.raises(AttentionShapeError, match="only q and k"):
        distilled_attention(make_factors(0), make_factors(1))


class LargestTensor(TorchDispatchMode):
    """The most elements any tensor had that an operation returned, those of backward passes included."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_no_tensor_of_token_by_token_size_is_ever_made(monkeypatch):
    batch, heads, tokens = 2, 2, 300
    monkeypatch.setattr(kernels, "CPU_SLICE_NBYTES", 4 * heads * tokens * 16)  # 16 rows a slice
    teacher = make_factors(0, batch, heads, tokens, dtype=torch.float32)
    student = make_factors(1, batch, heads, tokens, dtype=torch.float32)
    with LargestTensor() as largest:
        attention_distillation_loss(teacher, student).backward()
        attended, loss = distilled_attention(teacher, replace(student, v_BHTD=student.k_BHTD))
        (attended.sum() + loss).backward()
        copy_attention(teacher, student.q_BHTD).sum().backward()
    assert 0 < largest.num_elements <= max(heads * tokens * 16, batch * heads * tokens * 4)
