"""The GPU's kernels, run by Triton's interpreter: values and gradients against plain formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from atcache.attention import distillation, kernels
from atcache.attention.distillation import attention_distillation_loss, distilled_attention
from atcache.attention.factors import LayerFactors
from atcache.attention.flash import availability, backward, comparing, copying
from atcache.attention.flash.launch import Tiling
from atcache.attention.kernels import copy_attention

# The interpreter computes with numpy, which warns of infinities in parts of a tile that no token fills.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@dataclass(frozen=True)
class Case:
    """Sizes of a student and its teacher; by default small ones that no tile divides."""

    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    given_key_heads: int = 2
    tokens: int = 37
    head_dim: int = 16
    value_dim: int = 16
    given_dim: int = 16
    bias: tuple[int, ...] | None = None
    given_bias: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    def student(self, device="cpu"):
        q, k = self._draw(1, self.heads, self.head_dim), self._draw(2, self.key_heads, self.head_dim)
        v = self._draw(3, self.key_heads, self.value_dim)
        return self._factors(q, k, v, self.bias, 1.3 * self.head_dim**-0.5, device)

    def teacher(self, device="cpu"):
        q, k = self._draw(4, self.heads, self.given_dim), self._draw(5, self.given_key_heads, self.given_dim)
        return self._factors(q, k, None, self.given_bias, 0.8 * self.given_dim**-0.5, device)

    def _draw(self, seed, heads, width):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch, heads, self.tokens, width, generator=generator)

    def _factors(self, q, k, v, bias_shape, scale, device):
        bias = None if bias_shape is None else torch.randn(bias_shape, generator=torch.Generator().manual_seed(6))
        q, k, v, bias = (None if t is None else t.to(device, self.dtype).requires_grad_() for t in (q, k, v, bias))
        return LayerFactors(q_BHTD=q, k_BHTD=k, v_BHTD=v, bias=bias, scale=scale)


CASES = {
    "plain": Case(),
    "one token": Case(tokens=1),
    "as many tokens as a tile": Case(tokens=64),
    "ViT-S at 224 pixels": Case(batch=1, heads=1, key_heads=1, given_key_heads=1, tokens=197, head_dim=64),
    "257 tokens": Case(batch=1, heads=1, key_heads=1, given_key_heads=1, tokens=257, head_dim=64, value_dim=64),
    "every width its own": Case(head_dim=24, value_dim=40, given_dim=80),
    "the widest": Case(head_dim=128, value_dim=128, given_dim=128),
    "half as wide as its teacher": Case(head_dim=16, value_dim=16, given_dim=32),
    "grouped heads": Case(heads=4, key_heads=2, given_key_heads=1),
    "one key head for all": Case(heads=3, key_heads=1, given_key_heads=3),
    "a bias by head": Case(bias=(1, 2, 37, 37), given_bias=(1, 2, 37, 37)),
    "a bias by sample": Case(bias=(2, 1, 37, 37), given_bias=(2, 2, 37, 37)),
    "a bias of keys": Case(bias=(2, 1, 1, 37), given_bias=(1, 1, 1, 37)),
    "a bias of queries": Case(bias=(1, 2, 37, 1)),
    "a bias of the teacher alone": Case(given_bias=(1, 1, 37, 37)),
    "grouped heads and a bias": Case(heads=4, key_heads=2, given_key_heads=4, bias=(1, 4, 37, 37)),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "bfloat16, in two tiles of keys": Case(batch=1, tokens=257, head_dim=32, dtype=torch.bfloat16),
    "bfloat16, in two tiles with a bias": Case(
        tokens=37, dtype=torch.bfloat16, bias=(1, 2, 37, 37), given_bias=(1, 2, 37, 37), value_dim=32
    ),
    "bfloat16, more tokens than one program takes": Case(batch=1, tokens=300, dtype=torch.bfloat16),
    "bfloat16 with a bias": Case(dtype=torch.bfloat16, bias=(1, 2, 37, 37), given_bias=(1, 2, 37, 37)),
    "bfloat16, grouped": Case(heads=4, key_heads=2, given_key_heads=1, dtype=torch.bfloat16),
}
# Of the whole tensor's norm. Probabilities and gradients of logits are rounded to the factors' type within a product.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

LONG = {tokens: Case(batch=1, heads=1, key_heads=1, given_key_heads=1, tokens=tokens) for tokens in (577, 1370, 4096)}
"""For the interpreter, tiles must be larger than a GPU's: it takes a millisecond for each operation on each tile."""

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def widened(factors):
    """The same factors in float64, as new leaves."""

    def wide(tensor):
        return None if tensor is None else tensor.detach().cpu().double().requires_grad_()

    parts = {name: wide(getattr(factors, name)) for name in ("q_BHTD", "k_BHTD", "v_BHTD", "bias")}
    return LayerFactors(**parts, scale=factors.scale)


def plain_logits(factors):
    logits = factors.scale * factors.q_BHTD @ factors.repeated_k_BHTD().mT
    return logits if factors.bias is None else logits + factors.bias


def plain_loss(teacher, student):
    given, log_attn = plain_logits(teacher).softmax(-1).detach(), plain_logits(student).log_softmax(-1)
    return -(given * log_attn.masked_fill(given == 0, 0)).sum(-1).mean()


def of_kernels(teacher, student, *, has_values=True):
    return comparing.compare(
        student.q_BHTD, student.k_BHTD, student.v_BHTD if has_values else None, student.bias, student.scale,
        teacher.q_BHTD, teacher.k_BHTD, teacher.bias, teacher.scale,
    )  # fmt: skip


def copied(teacher, value_BHTD):
    return copying.copy(
        teacher.q_BHTD.detach(), teacher.k_BHTD.detach(), value_BHTD,
        None if teacher.bias is None else teacher.bias.detach(), teacher.scale,
    )  # fmt: skip


def leaves(factors, *names):
    return {name: tensor for name in names if (tensor := getattr(factors, name)) is not None}


def assert_close(found, expected, dtype, *, noise=5e-6):
    """Equal but for rounding, which is all there is of gradients that are 0, such as that of a bias of queries."""
    expected = expected.detach()
    error = (found.detach().cpu().double() - expected).norm()
    assert found.dtype == dtype
    assert error <= TOLERANCES[dtype] * expected.norm() + noise, f"{error / expected.norm():.1e} of the norm"


def check_distillation(case, device="cpu"):
    teacher, student = case.teacher(device), case.student(device)
    wide_teacher, wide_student = widened(teacher), widened(student)
    attended, loss = of_kernels(teacher, student)
    expected = plain_logits(wide_student).softmax(-1) @ wide_student.repeated_v_BHTD()
    plain = plain_loss(wide_teacher, wide_student)
    assert_close(attended, expected, case.dtype)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5, abs=1e-6)
    # The weight lets the loss have as much of the gradient as the output has.
    weight = float(expected.detach().norm())
    names = leaves(student, "q_BHTD", "k_BHTD", "v_BHTD", "bias")
    found = torch.autograd.grad(attended.float().sin().sum() + weight * loss, list(names.values()))
    true = torch.autograd.grad(
        expected.sin().sum() + weight * plain, list(leaves(wide_student, *names).values()), retain_graph=True
    )
    for got, exact in zip(found, true, strict=True):
        assert_close(got, exact, case.dtype)


def check_loss_alone(case, device="cpu"):
    teacher, student = case.teacher(device), case.student(device)
    wide_teacher, wide_student = widened(teacher), widened(student)
    nothing, loss = of_kernels(teacher, student, has_values=False)
    plain = plain_loss(wide_teacher, wide_student)
    assert nothing is None
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5, abs=1e-6)
    names = leaves(student, "q_BHTD", "k_BHTD", "bias")
    # Small gradients would vanish in float16.
    found = torch.autograd.grad(1e3 * loss, list(names.values()))
    for got, exact in zip(
        found, torch.autograd.grad(1e3 * plain, list(leaves(wide_student, *names).values())), strict=True
    ):
        assert_close(got, exact, case.dtype, noise=1e-4)  # a thousandth of which is the loss's own


def check_copying(case, device="cpu"):
    teacher, value_BHTD = case.teacher(device), case.student(device).v_BHTD
    exact_v = value_BHTD.detach().cpu().double().requires_grad_()
    attended = copied(teacher, value_BHTD)
    repeats = case.heads // value_BHTD.shape[1]
    expected = plain_logits(widened(teacher)).softmax(-1).detach() @ exact_v.repeat_interleave(repeats, 1)
    assert_close(attended, expected, case.dtype)
    (found,) = torch.autograd.grad(attended.float().sin().sum(), value_BHTD)
    (true,) = torch.autograd.grad(expected.sin().sum(), exact_v)
    assert_close(found, true, case.dtype)


@every_case
def test_distillation_is_right_in_output_loss_and_every_gradient(case):
    check_distillation(case)


@pytest.mark.parametrize("name", ["plain", "one token", "every width its own", "a bias by head", "bfloat16, grouped"])
def test_the_loss_alone_is_right_with_every_gradient(name):
    check_loss_alone(CASES[name])


@every_case
def test_copying_is_right_in_output_and_v_s_gradient(case):
    check_copying(case)


@pytest.mark.gpu
@every_case
@pytest.mark.parametrize("check", [check_distillation, check_loss_alone, check_copying])
def test_the_kernels_are_right_on_the_device(check, case):
    check(case, "cuda")


@pytest.mark.parametrize(
    ("tokens", "check"),
    [(577, check_distillation), (1370, check_distillation), (1370, check_copying), (4096, check_copying)],
)
def test_long_sequences_are_served(tokens, check, monkeypatch):
    for module, names in (
        (copying, ("ATTEND", "VALUE_GRADIENT")),
        (comparing, ("COMPARE", "KEY_GRADIENTS", "QUERY_GRADIENT", "ROW_DOTS")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, (Tiling(256, 512, 4, 1),))
    check(LONG[tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_distillation, check_loss_alone, check_copying])
@pytest.mark.parametrize("case", LONG.values(), ids=LONG.keys())
def test_long_sequences_are_served_on_the_device(case, check):
    check(case, "cuda")


@pytest.mark.gpu  # the interpreter would take minutes
@pytest.mark.parametrize("check", [check_distillation, check_copying])
def test_more_heads_than_a_grid_s_second_axis_takes_are_served(check):
    case = Case(batch=257, heads=256, key_heads=256, given_key_heads=256, tokens=5, bias=(1, 256, 5, 5))
    assert case.batch * case.heads > 65_535
    check(case, "cuda")


def test_factors_are_read_where_timm_s_projection_put_them():
    case = Case(heads=3, key_heads=3, given_key_heads=3, tokens=20)
    packed = torch.randn(2, 20, 3, 3, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    student = LayerFactors(q_BHTD=q, k_BHTD=k, v_BHTD=v, scale=0.25)
    plain = replace(student, q_BHTD=q.contiguous(), k_BHTD=k.contiguous(), v_BHTD=v.contiguous())
    for found, expected in zip(of_kernels(case.teacher(), student), of_kernels(case.teacher(), plain), strict=True):
        assert torch.equal(found, expected)
    across = q.transpose(2, 3).contiguous().transpose(2, 3)  # components of a vector do not lie side by side
    assert torch.equal(
        of_kernels(case.teacher(), replace(student, q_BHTD=across))[0], of_kernels(case.teacher(), plain)[0]
    )


def test_keys_masked_on_both_sides_leave_loss_and_gradients_finite():
    case = Case(tokens=70)
    mask = torch.zeros(1, 1, 70, 70)
    mask[..., 5:40] = -torch.inf  # a whole tile of some kernels
    mask[..., 0:5] = -torch.inf
    teacher, student = replace(case.teacher(), bias=mask), replace(case.student(), bias=mask)
    attended, loss = of_kernels(teacher, student)
    wide = widened(student)
    assert float(loss.detach()) == pytest.approx(float(plain_loss(widened(teacher), wide).detach()), rel=1e-5)
    assert_close(attended, plain_logits(wide).softmax(-1) @ wide.v_BHTD, torch.float32)
    for grad in torch.autograd.grad(attended.sum() + loss, [student.q_BHTD, student.k_BHTD, student.v_BHTD]):
        assert torch.isfinite(grad).all()


def test_a_key_that_only_the_student_masks_costs_infinitely_much():
    mask = torch.zeros(1, 1, 37, 37)
    mask[..., 0] = -torch.inf
    _, loss = of_kernels(Case().teacher(), replace(Case().student(), bias=mask))
    assert loss == torch.inf


def test_a_constant_that_all_logits_share_costs_the_loss_no_digits():
    teacher, student = Case(tokens=200).teacher(), Case(tokens=200).student()
    with torch.no_grad():
        for one in (teacher, student):
            one.q_BHTD[..., 0], one.k_BHTD[..., 0] = 16.0, 16.0
    _, loss = of_kernels(teacher, student)
    assert float(loss.detach()) == pytest.approx(
        float(plain_loss(widened(teacher), widened(student)).detach()), rel=2e-6
    )


@pytest.mark.parametrize("uses", ["output", "loss"])
def test_what_is_not_used_adds_nothing_to_gradients(uses):
    teacher, student = Case().teacher(), Case().student()
    wide_teacher, wide = widened(teacher), widened(student)
    attended, loss = of_kernels(teacher, student)
    total = attended.sin().sum() if uses == "output" else loss
    expected = (
        (plain_logits(wide).softmax(-1) @ wide.v_BHTD).sin().sum()
        if uses == "output"
        else plain_loss(wide_teacher, wide)
    )
    names = ("q_BHTD", "k_BHTD", "v_BHTD")
    found = torch.autograd.grad(total, [getattr(student, name) for name in names], allow_unused=True)
    true = torch.autograd.grad(expected, [getattr(wide, name) for name in names], allow_unused=True)
    for name, got, exact in zip(names, found, true, strict=True):
        assert (got is None) == (exact is None) == (uses == "loss" and name == "v_BHTD")
        if exact is not None:
            assert_close(got, exact, torch.float32)


def test_gradients_of_gradients_are_refused():
    teacher, student = Case().teacher(), Case().student()
    loss = of_kernels(teacher, student, has_values=False)[1].square()
    (grad,) = torch.autograd.grad(loss, student.q_BHTD, create_graph=True)
    with pytest.raises(RuntimeError, match="compare_gradients"):
        grad.sum().backward()


def test_a_gpu_with_too_little_shared_memory_gets_smaller_tiles(monkeypatch):
    from triton.runtime.errors import OutOfResources

    class Small:
        """A real kernel on a device that holds no tile of more than 16 keys."""

        def __init__(self, kernel):
            self.kernel, self.fn, self.arg_names, self.tried = kernel, kernel.fn, kernel.arg_names, []

        def __getitem__(self, grid):
            def run(*arguments, **constants):
                self.tried.append(constants["N"])
                if constants["N"] > 16:
                    raise OutOfResources(100_000, 50_000, "shared memory")
                self.kernel[grid](*arguments, **constants)

            return run

    all_gradients, key_gradients = Small(backward.all_gradients_kernel), Small(backward.key_gradients_kernel)
    monkeypatch.setattr(backward, "all_gradients_kernel", all_gradients)
    monkeypatch.setattr(backward, "key_gradients_kernel", key_gradients)
    case = Case(batch=1, heads=1, key_heads=1, given_key_heads=1, tokens=70, dtype=torch.bfloat16)
    check_distillation(case)
    assert all_gradients.tried == [64]
    assert key_gradients.tried == [64, 64, 32, 16]
    check_distillation(case)
    assert key_gradients.tried[4:] == [16], "what fitted once is tried first"


def test_keys_are_held_in_the_smallest_two_tiles():
    tiles = {tokens: comparing.two_tiles(tokens) for tokens in (1, 16, 17, 32, 50, 65, 145, 197, 256, 257, 261, 288)}
    assert tiles == {
        1: (16, 0), 16: (16, 0), 17: (32, 0), 32: (32, 0), 50: (64, 0), 65: (64, 16), 145: (128, 32), 197: (256, 0),
        256: (256, 0), 257: (256, 16), 261: (256, 16), 288: (256, 32),
    }  # fmt: skip


@pytest.fixture
def served(monkeypatch):
    """The product's own choice of way, on a machine whose GPU is this interpreter."""
    calls = []

    def serves(*vectors):
        calls.append(vectors)
        return all(vector.dtype != torch.float64 for vector in vectors)

    monkeypatch.setattr(availability, "serves", serves)
    yield
    assert calls, "the kernels were chosen"


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("case", [Case(), CASES["grouped heads and a bias"]])
def test_callers_get_the_same_from_kernels_and_slices(case, monkeypatch):
    teacher, student = case.teacher(), case.student()
    value_BHTD = student.repeated_v_BHTD()

    def results():
        attended, loss = distilled_attention(teacher, student)
        of_loss = attention_distillation_loss(teacher, student)
        output = copy_attention(teacher, value_BHTD)
        total = attended.sin().sum() + 3 * loss + 5 * of_loss + output.cos().sum()
        wanted = leaves(student, "q_BHTD", "k_BHTD", "v_BHTD", "bias").values()
        return attended, loss, of_loss, output, *torch.autograd.grad(total, list(wanted), retain_graph=True)

    found = results()
    with monkeypatch.context() as slices:
        for module in (kernels, distillation):
            slices.setattr(module.availability, "serves", lambda *_: False)
        expected = results()
    for got, true in zip(found, expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("served")
def test_a_compiled_student_keeps_one_graph():
    teacher, student = Case().teacher(), Case().student()
    weights = {
        name: leaf.detach().clone().requires_grad_()
        for name, leaf in leaves(student, "q_BHTD", "k_BHTD", "v_BHTD").items()
    }

    def step(q_BHTD, k_BHTD, v_BHTD):
        own = LayerFactors(q_BHTD=q_BHTD, k_BHTD=k_BHTD, v_BHTD=v_BHTD, scale=student.scale)
        attended, loss = distilled_attention(teacher, own)
        return copy_attention(teacher, attended).sin().sum() + loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, total = step(**weights), compiled(**weights)
    torch.testing.assert_close(total, plain)
    for got, expected in zip(
        torch.autograd.grad(total, list(weights.values())),
        torch.autograd.grad(plain, list(weights.values())),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's check looks at one
@pytest.mark.parametrize("name", ["attend", "value_gradient", "compare", "compare_gradients"])
def test_operations_keep_what_they_tell_torch(name):
    """torch's own check: schema, fake tensors, derivative, and tracing."""
    case = Case(batch=1, tokens=5)
    teacher, student = case.teacher(), case.student()
    q, k, v = student.q_BHTD.detach(), student.k_BHTD.detach(), student.v_BHTD.detach()
    given = (teacher.q_BHTD.detach(), teacher.k_BHTD.detach(), None, teacher.scale)
    pair = (q, k, v, None, student.scale, *given)
    out, lse, given_lse, loss = torch.ops.atcache.compare(*pair)
    arguments = {
        "attend": (q, k, v.clone().requires_grad_(), None, 0.3),
        "value_gradient": (out.clone(), q, k, None, lse, 0.3, case.heads),
        "compare": (q.clone().requires_grad_(), *pair[1:]),
        "compare_gradients": (out.clone(), loss, *pair, out, lse, given_lse, False),
    }
    torch.library.opcheck(getattr(torch.ops.atcache, name).default, arguments[name])
