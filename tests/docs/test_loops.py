"""The loops of docs/guide/loops.md train a student, as they stand but for names and sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import atcache

PAGE = (Path(__file__).parent.parent.parent / "docs" / "guide" / "loops.md").read_text(encoding="utf-8")
LOOPS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
OTHER_SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 0}


def run_loop(title: str, **changes: str) -> dict[str, object]:
    """Run the loop of a section, with some of its text changed; each text must be there just once."""
    text = LOOPS[title]
    for old, new in {"batch_size=256": "batch_size=24", "1e-3": "1e-2", **changes}.items():
        assert text.count(old) == 1, f"{title} has {text.count(old)} times {old}"
        text = text.replace(old, new)
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    exec(text, scope)  # the guide's own text
    return scope


def attention_loss_of(student, cache="in1k.zarr") -> float:
    batch = next(iter(atcache.batches(cache, batch_size=48, device="cpu")))
    with torch.no_grad():
        return float(student(batch.images, batch.attention)[1])


def assert_has_learned(student, cache="in1k.zarr") -> None:
    """A trained student's maps are nearer to the teacher's than a fresh one's."""
    torch.manual_seed(0)
    fresh = atcache.make_student(cache, mode="distill")
    assert attention_loss_of(student.to("cpu"), cache) < 0.95 * attention_loss_of(fresh, cache)


@pytest.fixture
def here(tiny_cache, tmp_path, monkeypatch):
    """A folder to run in, which holds in1k.zarr."""
    monkeypatch.chdir(tmp_path)
    Path("in1k.zarr").symlink_to(tiny_cache())
    return tmp_path


def test_every_loop_of_the_page_is_run_here():
    assert list(LOOPS) == [
        "Accelerate",
        "PyTorch Lightning",
        "Hugging Face Trainer",
        "A student that is no ViT",
        "Several teachers in one loop",
    ]
    assert PAGE.count("```python") == len(LOOPS)


def test_accelerate(here):
    scope = run_loop("Accelerate", **{"epochs=30": "epochs=20"})
    assert_has_learned(scope["student"])
    assert [path.name for path in (here / "student").iterdir()] == ["model.safetensors"]


@pytest.mark.filterwarnings("ignore")  # its own
def test_lightning(here):
    scope = run_loop("PyTorch Lightning", **{"max_epochs=30": "max_epochs=20, accelerator='cpu'"})
    assert scope["trainer"].global_step == 40
    assert_has_learned(scope["transfer"].student)


@pytest.mark.filterwarnings("ignore")  # its own
def test_hugging_face_trainer(here):
    scope = run_loop("Hugging Face Trainer", **{"num_train_epochs=30": "num_train_epochs=20, use_cpu=True"})
    assert scope["trainer"].state.global_step == 40
    assert_has_learned(scope["student"])


def test_a_student_that_is_no_vit(tiny_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ",".join(f"{name}={value}" for name, value in OTHER_SIZES.items())
    teacher = f"vit_tiny_patch16_224:depth=2,{arguments}"
    Path("in1k.zarr").symlink_to(tiny_cache(teacher=teacher, weights=weights_of(teacher, tmp_path)))
    scope = run_loop(
        "A student that is no ViT",
        **{
            '"resnet50", ': '"resnet10t", output_stride=8, ',
            "epochs=30": "epochs=10",
            "layers=[11]": "layers=[1]",
            "layer(11)": "layer(1)",
            "    loss.backward()": "    losses.append(float(attention_loss.detach()))\n    loss.backward()",
            "for batch in batches:": "losses = []\nfor batch in batches:",
        },
    )
    assert scope["target_BHGG"].shape == (24, 2, 4, 4)
    losses = scope["losses"]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_several_teachers(here, tiny_cache):
    teacher = "vit_tiny_patch16_224:img_size=8,patch_size=4,embed_dim=48,depth=3,num_heads=3,num_classes=0"
    Path("in1k-clip.zarr").symlink_to(tiny_cache(teacher=teacher, weights=weights_of(teacher, here)))
    scope = run_loop("Several teachers in one loop", **{"epochs=30": "epochs=20"})
    assert_has_learned(scope["first"])
    assert_has_learned(scope["second"], "in1k-clip.zarr")


def weights_of(teacher: str, folder: Path) -> Path:
    """A file of random weights, large enough that the teacher's maps are far from uniform."""
    from safetensors.torch import save_file

    from atcache.teachers.load import create_student
    from atcache.teachers.names import parse_model_name

    torch.manual_seed(1)
    model = create_student(parse_model_name(teacher), num_classes=0)
    weights = {name: tensor * 8 if "qkv.weight" in name else tensor for name, tensor in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "teacher.safetensors")
    return folder / "teacher.safetensors"
