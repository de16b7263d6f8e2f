"""Families of teachers: the table says what timm makes, and a verdict says what a student lacks."""

from __future__ import annotations

import pytest
import timm
import torch

from atcache.teachers.components import lacking_components, special_components
from atcache.teachers.families import FAMILIES, family_of
from atcache.teachers.load import create_student
from atcache.teachers.names import ALIASES, parse_model_name
from atcache.teachers.trained import Trained
from atcache.teachers.verdict import TeacherVerdict, judge

PLAIN = parse_model_name("vit_tiny_patch16_224:depth=1")


def trained(mode: str) -> Trained:
    nothing = {"subset": None, "teacher": None, "teacher_weights_sha256": None, "initial_weights_sha256": None}
    return Trained(run="mine", mode=mode, num_classes=10, sources=(), **nothing)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_components_in_the_table_are_those_of_the_model(family):
    with torch.device("meta"):
        model = create_student(parse_model_name(family.example), 1)
    assert tuple(special_components(model)) == family.components
    assert family_of(str(parse_model_name(family.example))) is family


def test_only_what_has_a_source_is_known():
    for family in FAMILIES:
        assert (family.outcome != "not known") == bool(family.source) == bool(family.evidence)
        if family.source:
            assert family.paper in ("arXiv 2411.09702", "arXiv 2605.07191")


def test_a_family_that_needs_its_components_has_some():
    assert all(family.components for family in FAMILIES if family.outcome == "needs its components")


def test_all_short_names_belong_to_the_family_they_are_called_by():
    called = {
        **{"mae": "MAE", "dino": "DINO", "dinov2": "DINOv2", "dinov3": "DINOv3", "clip": "CLIP", "siglip": "SigLIP"},
        **{"siglip2": "SigLIP", "deit3": "DeiT III", "beitv2": "BEiT v2", "eva02": "EVA-02"},
    }
    for alias, name in ALIASES.items():
        if alias == "demo-mae":
            continue
        family = family_of(name)
        assert family is not None
        assert family.name.removesuffix(" with registers") == called[alias.partition("-")[0]]
        assert family.name.endswith(" with registers") == alias.endswith("-reg")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("transformers:facebook/dinov2-with-registers-small", "DINOv2 with registers"),
        ("transformers:facebook/dinov2-small", "DINOv2"),
        ("transformers:facebook/dino-vits16", "DINO"),
        ("transformers:facebook/vit-mae-base", "MAE"),
        ("transformers:openai/clip-vit-base-patch16", "CLIP"),
        ("open-clip:ViT-B-16-SigLIP/webli", "SigLIP"),
        ("open-clip:ViT-B-16/openai", "CLIP"),
        ("deit_tiny_patch16_224.fb_in1k:img_size=64", "DeiT"),
        ("deit_tiny_distilled_patch16_224", None),
        ("vit_base_patch16_224.augreg_in21k", None),
        ("vit_tiny_patch16_224:img_size=8", None),
        ("own:clip", None),
        ("open-clip:ViT-B-32/laion2b_s34b_b79k", "CLIP"),
        ("open-clip:coca_ViT-B-32/laion2b_s13b_b90k", None),
        ("open-clip:ViTamin-L/datacomp1b", None),
        ("open-clip:RN50/openai", None),
        ("hiera_base_224.mae", None),
        ("transformers:facebook/vit-mae-base-finetuned", None),
        ("vit_base_patch16_clip_224.openai_ft_in1k", None),
        ("eva_giant_patch14_clip_224.laion400m", None),
    ],
)
def test_a_family_is_found_by_name(name, family):
    found = family_of(name)
    assert (None if found is None else found.name) == family


def test_only_fine_tuned_weights_stay_in_their_family():
    name = "vit_small_patch14_dinov2.lvd142m"
    assert family_of(name, trained("finetune")).name == "DINOv2"
    assert [family_of(name, trained(mode)) for mode in ("scratch", "distill")] == [None, None]
    assert (
        "family DINOv2, fine-tuned by the run mine; components: LayerScale."
        in judge(name, None, trained("finetune")).line
    )


def test_the_teachers_own_architecture_lacks_nothing():
    verdict = judge("vit_small_patch14_dinov2.lvd142m:depth=1", None)
    assert (verdict.student_lacks, verdict.differences, verdict.warning, verdict.better_student) == ((), (), None, None)
    assert verdict.line.endswith("unless the student has the teacher's components (arXiv 2605.07191): it has them.")


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_dinov2",
        "vit_giant_patch14_reg4_dinov2",
        "vit_base_patch16_clip_quickgelu_224.openai",
        "vit_small_patch16_224:qk_norm=True,scale_attn_norm=True,scale_mlp_norm=True",
    ],
)
def test_the_student_that_is_named_instead_lacks_nothing(name):
    teacher = f"{name}{',' if ':' in name else ':'}depth=1"
    verdict = judge(teacher, PLAIN)
    assert verdict.student_lacks
    assert verdict.better_student is not None
    assert f"--student '{verdict.better_student}'" in verdict.warning
    assert judge(teacher, parse_model_name(verdict.better_student)).student_lacks == ()
    assert TeacherVerdict.from_json(verdict.to_json()) == verdict


def test_no_student_is_named_where_no_argument_gives_what_is_lacking():
    verdict = judge("beitv2_base_patch16_224:depth=1", PLAIN)
    assert verdict.student_lacks == ("LayerScale", "relative position bias")
    assert "it lacks LayerScale, relative position bias." in verdict.line
    assert verdict.better_student is None
    assert verdict.warning.endswith("leave --student out to use the teacher's own architecture.")


def test_a_teacher_of_another_library_is_known_by_name_and_not_compared():
    verdict = judge("transformers:facebook/dinov2-small", PLAIN)
    assert (verdict.family, verdict.components, verdict.student_lacks) == ("DINOv2", None, None)
    assert "is known to fail unless" in verdict.line
    assert verdict.warning.startswith("NOTE: the teacher transformers:facebook/dinov2-small is not of timm")


def test_what_only_the_student_has_is_not_lacking():
    scaled, plain = (timm.create_model("vit_tiny_patch16_224", depth=1, init_values=init) for init in (0.1, None))
    assert lacking_components(plain, scaled) == []
    assert lacking_components(scaled, plain) == ["LayerScale"]
