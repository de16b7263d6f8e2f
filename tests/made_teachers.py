"""Small teachers with random weights, for tests that need more than one."""

from __future__ import annotations

from pathlib import Path

TINY = "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=2,num_classes=10"


def tiny_teacher(folder: Path, *, seed: int = 0, **arguments: object) -> dict[str, object]:
    """`teacher` and `weights` of a build: `TINY` with other arguments, and weights that make its maps sharp."""
    import torch
    from safetensors.torch import save_file

    from atcache.teachers.load import create_student
    from atcache.teachers.names import parse_model_name

    name, _, usual = TINY.partition(":")
    settings = {**dict(each.split("=") for each in usual.split(",")), **{key: str(v) for key, v in arguments.items()}}
    teacher = f"{name}:{','.join(f'{key}={value}' for key, value in settings.items())}"
    torch.manual_seed(seed)
    model = create_student(parse_model_name(teacher), num_classes=10)
    weights = {key: tensor * 8 if "qkv.weight" in key else tensor for key, tensor in model.state_dict().items()}
    path = folder / f"{'-'.join(f'{key}{value}' for key, value in arguments.items())}-{seed}.safetensors"
    save_file(weights, path)
    return {"teacher": teacher, "weights": path}
