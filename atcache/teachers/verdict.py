"""What is known of a teacher before a student is trained: its family's verdict, and what the student lacks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from atcache.errors import TeacherError
from atcache.fields import JsonFields
from atcache.teachers.components import component_differences, lacking_components, special_components
from atcache.teachers.families import Outcome, family_of
from atcache.teachers.foreign.names import is_foreign
from atcache.teachers.load import create_student
from atcache.teachers.names import ModelName, parse_model_name
from atcache.teachers.trained import Trained

# Arguments of timm's ViTs that give a component. What cannot be had by an argument, such as a relative position bias,
# only another architecture has.
_ARGUMENTS: dict[str, dict[str, object]] = {
    "LayerScale": {"init_values": 1.0},
    "q/k norm": {"qk_norm": True},
    "norm before the blocks": {"pre_norm": True},
    "norm on the attention output": {"scale_attn_norm": True},
    "norm inside the MLP": {"scale_mlp_norm": True},
    "gated MLP": {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"},
    "class token": {"class_token": True},
    "absolute position embedding": {"pos_embed": "learn"},
    "bias of q, k, v": {"qkv_bias": True},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherVerdict(JsonFields):
    """What is known of the transfer of a teacher's attention to a student."""

    teacher: str
    """Its name, as caches record it."""
    family: str | None
    """None if its name says none."""
    outcome: Outcome
    paper: str
    """Where the outcome is from, such as "arXiv 2605.07191"; empty if it is not known."""
    fine_tuned_by: str | None
    """The run that fine-tuned it; None if none did."""
    components: tuple[str, ...] | None
    """Where its architecture differs from a plain ViT; None for a model that is not of timm."""
    student_lacks: tuple[str, ...] | None
    """Its components that the student lacks; None if they cannot be compared."""
    differences: tuple[str, ...]
    """All differences of the two architectures, a sentence each."""
    better_student: str | None
    """The student with arguments that give it all that it lacks; None if arguments cannot, or it lacks nothing."""

    @property
    def line(self) -> str:
        """Family, components, and what is known of its attention, in one line."""
        family = f"family {self.family}" if self.family else "no family that atcache knows"
        tuned = f", fine-tuned by the run {self.fine_tuned_by}" if self.fine_tuned_by else ""
        if self.components is None:
            has = "components not compared, as it is not of timm"
        else:
            has = f"components: {', '.join(self.components)}" if self.components else "a plain ViT"
        return f"Teacher: {family}{tuned}; {has}. {self._known}"

    @property
    def _known(self) -> str:
        if self.outcome == "transfers":
            return f"Attention transfer is known to work ({self.paper})."
        if self.outcome == "needs its components":
            known = (
                f"Attention transfer is known to fail unless the student has the teacher's components ({self.paper})"
            )
            if self.student_lacks is None:
                return f"{known}."
            if self.student_lacks:
                return f"{known}: it lacks {', '.join(self.student_lacks)}."
            return f"{known}: it has them."
        return "Whether attention transfer works is not known: `atcache probe` measures it."

    @property
    def warning(self) -> str | None:
        """A sentence if the student's architecture is not the teacher's, with what to do; None if it is."""
        if self.components is None:
            return (
                f"NOTE: the teacher {self.teacher} is not of timm, so its components are not compared with the "
                "student's. Attention transfer is known to fail if the student lacks one, such as LayerScale or "
                "registers."
            )
        if not self.differences:
            return None
        give = "" if self.better_student is None else f"; or give what is lacking: --student '{self.better_student}'"
        return (
            f"WARNING: the student's architecture differs from the teacher's: {' '.join(self.differences)} Attention "
            "transfer is known to fail between such models; leave --student out to use the teacher's own "
            f"architecture{give}."
        )


def judge(teacher: str, student: ModelName | None, trained: Trained | None = None) -> TeacherVerdict:
    """What is known of a teacher and a student. Makes the models without memory for their weights.

    Args:
        teacher: its name, as caches record it.
        student: the student; None if it has the teacher's own architecture.
        trained: the training with `atcache train` that made the teacher's weights, if it was one.

    Raises:
        TeacherError: one of the models cannot be made.
    """
    family = family_of(teacher, trained)
    known = TeacherVerdict(
        teacher=teacher,
        family=None if family is None else family.name,
        outcome="not known" if family is None else family.outcome,
        paper="" if family is None else family.paper,
        fine_tuned_by=trained.run if trained is not None and trained.mode == "finetune" else None,
        components=None,
        student_lacks=None,
        differences=(),
        better_student=None,
    )
    if is_foreign(teacher):
        return known
    name = parse_model_name(teacher)
    teacher_model = _made(name)
    student_model = teacher_model if student is None else _made(student)
    lacks = lacking_components(teacher_model, student_model)
    return replace(
        known,
        components=tuple(special_components(teacher_model)),
        student_lacks=tuple(lacks),
        differences=tuple(component_differences(teacher_model, student_model)),
        better_student=None if student is None or not lacks else _with_components(student, lacks, teacher_model),
    )


def _made(name: ModelName) -> nn.Module:
    with torch.device("meta"):
        return create_student(name, 1)


def _with_components(student: ModelName, lacks: list[str], teacher_model: nn.Module) -> str | None:
    """The student's name with arguments for what it lacks, if a model of that name has all of it."""
    arguments = dict(student.arguments)
    for component in lacks:
        number, _, rest = component.partition(" ")
        arguments |= {"reg_tokens": int(number)} if rest == "register tokens" else _ARGUMENTS.get(component, {})
    wanted = replace(student, arguments=arguments)
    try:
        found = lacking_components(teacher_model, _made(wanted))
    except TeacherError:  # its architecture does not take the argument
        return None
    return None if found else str(wanted)
