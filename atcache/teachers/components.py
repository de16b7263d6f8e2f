"""What a model has beyond plain attention and MLP, to name the components of the teacher that a student lacks.

Attention transfer fails if the student lacks the teacher's own components and works again once it has them, with fresh
weights (arXiv 2605.07191). So each difference is reported in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_Check = Callable[[nn.Module, list[nn.Module]], bool]
_REGISTERS = "register tokens"


def component_differences(teacher_model: nn.Module, student_model: nn.Module) -> list[str]:
    """One sentence for each component in which the two timm models differ; empty if they match.

    >>> import timm
    >>> plain = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> scaled = timm.create_model("vit_tiny_patch16_224", depth=1, init_values=0.1)
    >>> component_differences(scaled, plain)
    ['LayerScale: the teacher has it, the student lacks it.']
    """
    teacher, student = components(teacher_model), components(student_model)
    differences: list[str] = []
    for name, wanted in teacher.items():
        found = student[name]
        if wanted == found:
            continue
        if isinstance(wanted, bool):
            has, lacks = ("teacher", "student") if wanted else ("student", "teacher")
            differences.append(f"{name}: the {has} has it, the {lacks} lacks it.")
        else:
            differences.append(f"{name}: {wanted} in the teacher, {found} in the student.")
    return differences


def special_components(model: nn.Module) -> list[str]:
    """Where the model's architecture differs from a plain ViT, such as "LayerScale" or "no class token".

    >>> import timm
    >>> arguments = {"depth": 1, "reg_tokens": 4, "class_token": False, "global_pool": "avg"}
    >>> special_components(timm.create_model("vit_tiny_patch16_224", **arguments))
    ['no class token', '4 register tokens']
    """
    return _in_words(components(model), _PLAIN)


def lacking_components(teacher_model: nn.Module, student_model: nn.Module) -> list[str]:
    """What the teacher has and the student lacks, such as "LayerScale" or "4 register tokens"."""
    words = _in_words(components(teacher_model), components(student_model))
    return [text for text in words if not text.startswith("no ")]


def _in_words(found: dict[str, bool | int | str], other: dict[str, bool | int | str]) -> list[str]:
    """In what the first differs from the other. How tokens are pooled is no matter of attention."""
    words: list[str] = []
    for name, value in found.items():
        if name == "pooling" or value == other[name]:
            continue
        number = f"{value} " if name == _REGISTERS and value else ""
        words.append(f"{number}{name}" if value else f"no {name}")
    return words


def components(model: nn.Module) -> dict[str, bool | int | str]:
    """The model's components by name: whether it has them, or how many or which.

    Found by the attributes and class names that timm's ViT families use; components of blocks only inside the blocks.
    """
    blocks = list(getattr(model, "blocks", None) or [])
    found: dict[str, bool | int | str] = {name: check(model, blocks) for name, check in _CHECKS.items()}
    found[_REGISTERS] = _num_registers(model)
    found["pooling"] = repr(getattr(model, "global_pool", ""))
    return found


def _num_registers(model: nn.Module) -> int:
    registers: Any = getattr(model, "reg_token", None)
    return 0 if registers is None else int(registers.shape[1])


def _holds(owner: object, *names: str) -> bool:
    """Whether one of these attributes is there and does something."""
    parts: list[Any] = [getattr(owner, name, None) for name in names]
    return any(part is not None and not isinstance(part, nn.Identity) for part in parts)


def _inside(modules: list[nn.Module], *names: str) -> bool:
    """Whether any module within `modules` holds one of these attributes."""
    return any(_holds(child, *names) for module in modules for child in module.modules())


def _of_class(modules: list[nn.Module], *parts_of_name: str) -> bool:
    """Whether any module within `modules` is of a class whose name contains one of these words."""
    return any(
        part in type(child).__name__ for module in modules for child in module.modules() for part in parts_of_name
    )


def _attentions(blocks: list[nn.Module]) -> list[nn.Module]:
    return _parts(blocks, "attn")


def _mlps(blocks: list[nn.Module]) -> list[nn.Module]:
    return _parts(blocks, "mlp")


def _parts(blocks: list[nn.Module], name: str) -> list[nn.Module]:
    return [part for block in blocks if isinstance(part := getattr(block, name, None), nn.Module)]


_CHECKS: dict[str, _Check] = {
    "LayerScale": lambda model, blocks: _of_class(blocks, "LayerScale") or _inside(blocks, "gamma_1", "gamma_2"),
    "q/k norm": lambda model, blocks: _inside(blocks, "q_norm", "k_norm"),
    "rotary position embedding": lambda model, blocks: _holds(model, "rope") or _of_class([model], "Rotary"),
    "relative position bias": lambda model, blocks: _inside(
        [model], "relative_position_bias_table", "rel_pos_bias", "shared_rel_pos", "rel_pos"
    ),
    "absolute position embedding": lambda model, blocks: _holds(model, "pos_embed"),
    "class token": lambda model, blocks: _holds(model, "cls_token"),
    "norm before the blocks": lambda model, blocks: _holds(model, "norm_pre"),
    "norm on the attention output": lambda model, blocks: any(
        _holds(attention, "norm") for attention in _attentions(blocks)
    ),
    "norm inside the MLP": lambda model, blocks: any(_holds(mlp, "norm") for mlp in _mlps(blocks)),
    "gate on the attention output": lambda model, blocks: any(
        _holds(attention, "gate") for attention in _attentions(blocks)
    ),
    "gated MLP": lambda model, blocks: _of_class(blocks, "SwiGLU", "GluMlp", "GeGLU"),
    "RMS norm": lambda model, blocks: _of_class(blocks, "RmsNorm", "RMSNorm"),
    "norm after attention and MLP": lambda model, blocks: _of_class(blocks, "PostNorm", "ResPost"),
    "attention and MLP side by side": lambda model, blocks: _of_class(blocks, "Parallel"),
    "bias of q, k, v": lambda model, blocks: any(
        name.endswith((".qkv.bias", ".q_bias", ".q_proj.bias", ".in_proj.bias")) for name, _ in model.named_parameters()
    ),
}

_PLAIN: dict[str, bool | int | str] = {
    **{name: name in ("absolute position embedding", "class token", "bias of q, k, v") for name in _CHECKS},
    _REGISTERS: 0,
}
"""The components of a plain ViT, such as DeiT's."""
