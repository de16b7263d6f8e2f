"""Students given their own factors compute what they would have computed; those given others use the others."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from made_factors import equal_pairing
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

from atcache.attention.calls import AttentionCall
from atcache.attention.factors import LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.intercept import AttentionIntercept
from atcache.attention.tokens import TokenLayout
from atcache.errors import TeacherError
from atcache.students import distil as transfer
from atcache.students.attend import attend_with_one_factor
from atcache.students.copy import CopyStudent
from atcache.students.distil import DistilledStudent
from atcache.students.given import ValueOnlyAttention
from atcache.students.pairing import Pairing, check_student
from atcache.students.teacher_side import LiveFactors

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
        layers[call.block] = LayerFactors(
            q_BHTD=call.query, k_BHTD=call.key, scale=call.scale, bias=call.bias(), v_BHTD=call.value
        )
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


def copy_student(model, layers, chosen, heads=None, what="map"):
    own = copy.deepcopy(model)
    return CopyStudent(own, own.blocks, equal_pairing(geometry_of(layers, heads), chosen, what=what))


@pytest.mark.parametrize("kind", VALUE_ONLY_MODELS)
def test_copying_its_own_values_changes_nothing_and_drops_theirs_alone(kind, images):
    name, kwargs = VALUE_ONLY_MODELS[kind]
    model = make_model(name, **kwargs)
    teacher, layers, logits = own_factors(model, images)
    student = copy_student(model, layers, (0, 1), what="v")
    torch.testing.assert_close(student(images, teacher), logits, rtol=1e-5, atol=1e-6)
    own, theirs = (dict(m.blocks[0].attn.named_parameters()) for m in (student.model, model))
    num_dropped = 32 * 32 + 32 * any(name in theirs for name in ("qkv.bias", "v_bias", "v_proj.bias"))
    assert sum(p.numel() for p in theirs.values()) - sum(p.numel() for p in own.values()) == num_dropped
    student(images, teacher).square().sum().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", VALUE_ONLY_MODELS)
def test_copying_its_own_map_and_values_leaves_what_comes_behind_them(kind, images):
    name, kwargs = VALUE_ONLY_MODELS[kind]
    model = make_model(name, **kwargs)
    teacher, layers, logits = own_factors(model, images)
    student = copy_student(model, layers, (0, 1), what="qkv")
    torch.testing.assert_close(student(images, teacher), logits, rtol=1e-4, atol=1e-5)
    kept = {name.split(".")[0] for name, _ in student.model.blocks[0].attn.named_parameters()}
    assert "proj" in kept
    assert kept <= {"proj", "norm", "gate"}


@pytest.mark.parametrize("what", ["map", "v", "qkv"])
def test_every_remaining_parameter_of_a_copy_student_gets_a_gradient(what, images):
    model = make_model("vit_tiny_patch16_224", patch_size=8)
    teacher, layers, _ = own_factors(model, images)
    student = copy_student(model, layers, (0, 1), what=what)
    student(images, teacher).square().sum().backward()
    unused = [name for name, p in student.named_parameters() if p.grad is None]
    # With map and v of a layer given, its first norm has nothing to normalise for.
    assert unused == [f"model.blocks.{i}.norm1.{w}" for i in (0, 1) for w in ("weight", "bias")] * (what == "qkv")


class LinearOutputs(TorchFunctionMode):
    """Widths of what linear layers return."""

    def __init__(self):
        super().__init__()
        self.widths = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.widths.append(result.shape[-1])
        return result


@pytest.mark.parametrize(("what", "expected"), [("map", [32]), ("v", [64]), ("qkv", [])])
def test_a_copy_student_projects_only_what_it_is_not_given(what, expected, images):
    model = make_model("vit_tiny_patch16_224", patch_size=8)
    teacher, layers, _ = own_factors(model, images)
    student = copy_student(model, layers, (0, 1), what=what)
    with LinearOutputs() as copied:
        student(images, teacher)
    with LinearOutputs() as stock:
        model(images)
    assert stock.widths == [96, 32, 128, 32] * 2 + [5]
    assert copied.widths == [*expected, 32, 128, 32] * 2 + [5]


def kept_for_backward(run):
    """Shapes of all that autograd keeps, of calls of our own included."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return shapes


def test_neither_student_keeps_a_token_by_token_matrix(images):
    model = make_model("vit_tiny_patch16_224", patch_size=8)
    teacher, layers, _ = own_factors(model, images)
    distilled = DistilledStudent(model, model.blocks, equal_pairing(geometry_of(layers)))
    for student in (copy_student(model, layers, (0, 1)), distilled):
        shapes = kept_for_backward(lambda student=student: student(images, teacher))
        assert (3, 2, 17, 16) in shapes  # q, k or their gradients
        assert not [shape for shape in shapes if shape[-2:] == (17, 17)]
    # Materialised maps would be seen.
    for block in model.blocks:
        block.attn.fused_attn = False
    assert (6, 17, 17) in [(shape[0] * shape[1], *shape[2:]) if len(shape) == 4 else shape
                           for shape in kept_for_backward(lambda: model(images))]  # fmt: skip


@pytest.mark.parametrize("mode", ["copy", "copy v", "distill"])
def test_a_compiled_student_is_one_graph_for_all_batches_and_computes_the_same(mode, images):
    # Traced, with the backward pass, but not made machine code: that takes minutes on a busy machine.
    model, other = make_model("vit_tiny_patch16_224", patch_size=8), make_model("vit_tiny_patch16_224", 7, patch_size=8)
    _, layers, _ = own_factors(other, images)
    if mode != "distill":
        student = copy_student(model, layers, (0, 1), what="map" if mode == "copy" else "v")
    else:
        student = DistilledStudent(model, model.blocks, equal_pairing(geometry_of(layers)))
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(student, backend=counter)
    for batch in (images, images.flip(0), 2 * images):
        teacher, _, _ = own_factors(other, batch)
        found = []
        for run in (student, compiled):
            student.zero_grad()
            out = run(batch, teacher)
            loss = out[0].square().mean() + out[1] if mode == "distill" else out.square().mean()
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in student.parameters())])
        for one, other_one in zip(*found, strict=True):
            torch.testing.assert_close(other_one, one, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


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
    student = DistilledStudent(model, model.blocks, equal_pairing(geometry_of(teacher_layers)))
    logits, loss = student(images, teacher)
    torch.testing.assert_close(logits, expected_logits)
    expected = torch.stack(
        [-(teacher_layers[i].maps() * own_layers[i].maps().log()).sum(-1).mean() for i in (0, 1)]
    ).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None


def backward_calls(tensor):
    """Names of the functions in the graph behind a tensor."""
    seen, ahead = set(), [tensor.grad_fn]
    while ahead:
        function = ahead.pop()
        if function is not None and function not in seen:
            seen.add(function)
            ahead += [other for other, _ in function.next_functions]
    return {function.name() for function in seen}


@pytest.mark.parametrize("kind", ["Attention", "RelPosAttention"])
def test_distilling_in_one_pass_is_distilling_beside_the_stock_call(kind, images, monkeypatch):
    name, kwargs = VALUE_ONLY_MODELS[kind]
    model, other = make_model(name, **kwargs), make_model(name, 7, **kwargs)
    teacher, layers, _ = own_factors(other, images)
    student = DistilledStudent(model, model.blocks, equal_pairing(geometry_of(layers)))
    found = []
    for in_one_pass in (True, False):
        if not in_one_pass:  # what GPUs do
            monkeypatch.setattr(transfer, "_is_quicker_in_one_pass", lambda call: False)
        student.zero_grad()
        logits, loss = student(images, teacher)
        assert any("Distillation" in name for name in backward_calls(logits)) == in_one_pass
        (logits.square().mean() + loss).backward()
        found.append([logits, loss, *(p.grad for p in model.parameters())])
    for one, beside in zip(*found, strict=True):
        torch.testing.assert_close(one, beside, rtol=1e-4, atol=1e-6)


def test_distilling_keeps_the_students_dropout_of_attention(images):
    model = make_model("vit_tiny_patch16_224", patch_size=8, attn_drop_rate=0.5).train()
    teacher, layers, _ = own_factors(make_model("vit_tiny_patch16_224", 7, patch_size=8), images)
    student = DistilledStudent(model, model.blocks, equal_pairing(geometry_of(layers)))
    assert not torch.allclose(student(images, teacher)[0], student(images, teacher)[0])


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
        check_student(teacher, other, equal_pairing(teacher), student_name="small")
    check_student(teacher, teacher, equal_pairing(teacher, (0, 2)), student_name="itself")


VIT = "vit_tiny_patch16_224"


def softmax_attention(q_BHTD, k_BHTD, value_BHTD, scale):
    """Second opinion: attention by its formula."""
    return torch.softmax(scale * q_BHTD @ k_BHTD.mT, dim=-1) @ value_BHTD


@pytest.fixture
def teacher_and_student(images):
    model, other = make_model(VIT, patch_size=8), make_model(VIT, 7, patch_size=8)
    teacher, layers, _ = own_factors(other, images * 3)
    return teacher, layers, model


@pytest.mark.parametrize("what", ["q", "k"])
@pytest.mark.parametrize("heads", [(0, 1), (1,)])
def test_copying_one_factor_leaves_the_student_its_own_other_one(what, heads, teacher_and_student, images):
    _, layers, model = teacher_and_student

    def by_the_formula(call):
        q_BHTD, k_BHTD = call.query.clone(), call.key.clone()
        for head in heads:
            if what == "q":
                q_BHTD[:, head] = layers[call.block].q_BHTD[:, head]
            else:
                k_BHTD[:, head] = layers[call.block].k_BHTD[:, head]
        return softmax_attention(q_BHTD, k_BHTD, call.value, call.scale)

    with AttentionIntercept(model.blocks, by_the_formula):
        expected = model(images)
    pairing = equal_pairing(geometry_of(layers), heads=heads, what=what)
    student = CopyStudent(model, model.blocks, pairing)
    logits = student(images, LiveFactors(layers, heads=(0, 1)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    q_grad, k_grad, v_grad = model.blocks[0].attn.qkv.weight.grad.view(3, 2, 16, -1).abs().sum((2, 3))
    given, own = (q_grad, k_grad) if what == "q" else (k_grad, q_grad)
    assert [bool(grad > 0) for grad in given] == [head not in heads for head in (0, 1)]
    assert float(own.min()) > 0
    assert float(v_grad.min()) > 0


def test_copying_its_own_q_or_k_keeps_its_own_bias(images):
    # BEiT's bias stays the student's own.
    model = make_model("beitv2_base_patch16_224", patch_size=8)
    teacher, layers, logits = own_factors(model, images)
    for what in ("q", "k"):
        student = CopyStudent(model, model.blocks, equal_pairing(geometry_of(layers), what=what))
        torch.testing.assert_close(student(images, teacher), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["v", "qkv"])
@pytest.mark.parametrize("heads", [(0, 1), (1,)])
def test_copying_values_uses_the_given_ones_in_the_given_heads(what, heads, teacher_and_student, images):
    _, layers, model = teacher_and_student

    def by_the_formula(call):
        q_BHTD, k_BHTD, v_BHTD = call.query.clone(), call.key.clone(), call.value.clone()
        for own_BHTD, name in ((q_BHTD, "q"), (k_BHTD, "k"), (v_BHTD, "v")):
            if name in what:
                own_BHTD[:, list(heads)] = layers[call.block].repeated(name)[:, list(heads)]
        return softmax_attention(q_BHTD, k_BHTD, v_BHTD, call.scale)

    with AttentionIntercept(model.blocks, by_the_formula):
        expected = model(images)
    assert not torch.allclose(expected, model(images), atol=1e-3)
    student = copy_student(model, layers, (0, 1), heads, what)
    logits = student(images, LiveFactors(layers, heads=(0, 1)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["v", "qkv"])
def test_attention_inside_the_block_is_given_values_by_interception(what, images):
    parallel = timm.models.vision_transformer.ParallelScalingBlock
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, patch_size=8, block_fn=parallel).eval()
    teacher, layers, logits = own_factors(model, images)
    student = copy_student(model, layers, (0, 1), what=what)
    torch.testing.assert_close(student(images, teacher), logits, rtol=1e-4, atol=1e-5)
    negative = LiveFactors({block: replace(layer, v_BHTD=-layer.v_BHTD) for block, layer in layers.items()})
    assert not torch.allclose(student(images, negative), logits, atol=1e-3)


@pytest.mark.parametrize("what", ["q", "k", "qk", "v", "qkv"])
def test_factors_are_distilled_by_their_mean_squared_error(what, teacher_and_student, images):
    teacher, theirs, model = teacher_and_student
    _, own, expected_logits = own_factors(model, images)
    student = DistilledStudent(model, model.blocks, equal_pairing(geometry_of(theirs), what=what))
    logits, loss = student(images, teacher)
    torch.testing.assert_close(logits, expected_logits)
    errors = [
        ((getattr(theirs[layer], f"{one}_BHTD") - getattr(own[layer], f"{one}_BHTD")) ** 2).mean()
        for layer in (0, 1)
        for one in what
    ]
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    loss.backward()
    q_grad, k_grad, v_grad = model.blocks[1].attn.qkv.weight.grad.view(3, -1).abs().sum(1)
    assert [bool(grad > 0) for grad in (q_grad, k_grad, v_grad)] == [name in what for name in "qkv"]


def test_layers_and_heads_go_where_the_pairing_says(teacher_and_student, images):
    _, layers, model = teacher_and_student
    # The student's block 1 takes the teacher's block 0, with the heads the other way round.
    pairing = Pairing(layers=((1, 0),), heads=((0, 1), (1, 0)), num_student_heads=2)
    given = LayerFactors(q_BHTD=layers[0].q_BHTD.flip(1), k_BHTD=layers[0].k_BHTD.flip(1), scale=layers[0].scale).maps()
    with AttentionIntercept(model.blocks, lambda call: given @ call.value if call.block == 1 else call.run()):
        expected = model(images)
    _, own, _ = own_factors(model, images)
    loss = -(given * own[1].maps().log()).sum(-1).mean()
    _, distilled = DistilledStudent(model, model.blocks, pairing)(images, LiveFactors(layers, heads=(0, 1)))
    torch.testing.assert_close(distilled, loss)
    student = CopyStudent(model, model.blocks, pairing)
    torch.testing.assert_close(student(images, LiveFactors(layers, heads=(0, 1))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["q", "k"])
def test_one_given_factor_under_grouped_heads(what):
    # Four heads of q share two of k and v; a given k is one for each head.
    q_BHTD, own_k, own_v, given_q, given_k = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2, 4, 2))
    call = AttentionCall(
        block=0, query=q_BHTD, key=own_k, value=own_v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3,
        enable_gqa=True,
    )  # fmt: skip
    given = LayerFactors(q_BHTD=given_q, k_BHTD=given_k, scale=0.3)
    k_BHTD, v_BHTD = own_k.repeat_interleave(2, 1), own_v.repeat_interleave(2, 1)
    expected = {
        "q": softmax_attention(given_q, k_BHTD, v_BHTD, 0.3),
        "k": softmax_attention(q_BHTD, given_k.repeat_interleave(2, 1), v_BHTD, 0.3),
    }
    torch.testing.assert_close(attend_with_one_factor(call, given, range(4), what), expected[what])
    some = attend_with_one_factor(call, given.select_heads((1, 3)), (1, 3), what)
    torch.testing.assert_close(some[:, [1, 3]], expected[what][:, [1, 3]])
    torch.testing.assert_close(some[:, [0, 2]], call.run()[:, [0, 2]])
