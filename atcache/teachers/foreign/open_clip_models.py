"""Teachers of OpenCLIP: `open-clip:MODEL/TAG` with a tag of trained weights, or `open-clip:MODEL` with a file of them.

The image tower is the teacher. Torch files are read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch

from atcache.attention.survey import describe
from atcache.errors import TeacherError
from atcache.teachers.foreign.loaded import ForeignModel
from atcache.teachers.foreign.names import OPEN_CLIP, ForeignName
from atcache.teachers.foreign.reach import check_reach
from atcache.teachers.inputs import InputConfig, note_crop
from atcache.teachers.weights import weights_sha256

_CROP_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}
"""timm's words for OpenCLIP's, for what a transform does to images that are not square."""

_NUM_NEAR = 6
"""Names in a message; OpenCLIP knows well over 60."""


def load_open_clip(text: str, weights: Path | None, device: torch.device) -> ForeignModel:
    """The image tower of the model that a name beginning with "open-clip:" stands for.

    Args:
        text: the whole name.
        weights: a file, for a name without a tag.
        device: where it runs.

    Raises:
        TeacherError: OpenCLIP is not installed, knows no such model or tag, or cannot load the weights.
        UnsupportedAttentionError: its attention cannot be cached.
    """
    try:
        import open_clip
    except ImportError as error:
        raise TeacherError(
            f"model {text}: the library OpenCLIP is not installed. Install it with: pip install 'atcache[open-clip]'."
        ) from error
    architecture, _, tag = text.removeprefix(OPEN_CLIP).partition("/")
    _check_name(open_clip, text, architecture, tag, weights)
    chosen = tag if weights is None else str(weights)
    entry = cast("Mapping[str, Any]", open_clip.get_pretrained_cfg(architecture, tag))
    lacks_quick_gelu = bool(tag) and _lacks_quick_gelu(open_clip, text, architecture, entry)
    repository = str(entry.get("hf_hub", "")).strip("/")
    if repository:
        # Some entries have a file's name behind the repository's.
        check_reach(text, "/".join(repository.split("/")[:2]), "Give weights fetched elsewhere with --weights FILE.")
    # Initial weights are replaced; drawing them must not change the random numbers of a student made later.
    with torch.random.fork_rng(devices=[]), _quiet(), _told_plainly(text):
        model: Any = open_clip.create_model(
            architecture,
            pretrained=chosen,
            precision="fp32",
            require_pretrained=True,
            force_quick_gelu=lacks_quick_gelu,
        )
    visual = model.visual.to(device).eval().requires_grad_(False)
    grid = getattr(visual, "grid_size", None)
    if grid is None:
        grid = getattr(getattr(getattr(visual, "trunk", None), "patch_embed", None), "grid_size", None)
    if grid is None:
        raise TeacherError(f"model {text}: its image tower, {type(visual).__name__}, is not a ViT with a patch grid.")
    inputs = _input(visual.preprocess_cfg)
    note_crop(text, _CROP_MODES[visual.preprocess_cfg.get("resize_mode", "shortest")])
    sha256 = weights_sha256(visual)
    if lacks_quick_gelu:
        # Early versions ran these teachers with GELU. Another hash keeps their caches from being continued.
        sha256 = hashlib.sha256(f"{sha256} with QuickGELU".encode()).hexdigest()
    return ForeignModel(
        model=describe(visual, label=text, image_size=(inputs.height, inputs.width), grid=(int(grid[0]), int(grid[1]))),
        name=ForeignName(text),
        source=Path(weights).name if weights is not None else f"open-clip:{tag}",
        weights_sha256=sha256,
        input=inputs,
    )


def _check_name(open_clip: Any, text: str, architecture: str, tag: str, weights: Path | None) -> None:  # noqa: ANN401
    known: list[str] = open_clip.list_models()
    if architecture not in known:
        near = get_close_matches(architecture, known, n=_NUM_NEAR, cutoff=0.0)
        raise TeacherError(
            f"model {text}: OpenCLIP has no model {architecture!r}. Nearest are {', '.join(near)}; "
            "open_clip.list_models() in Python gives all."
        )
    tags: list[str] = open_clip.list_pretrained_tags_by_model(architecture)
    if weights is not None:
        if tag:
            raise TeacherError(f"model {text}: its weights are named twice, by {tag!r} and --weights. Leave out one.")
        if not weights.is_file():
            raise TeacherError(f"weights {weights}: no such file.")
    elif tag not in tags:
        raise TeacherError(
            f"model {text}: OpenCLIP has no weights {tag!r} for it. Known: {', '.join(tags) or 'none'}. Give one of "
            f"them as {OPEN_CLIP}{architecture}/TAG, or a file with --weights."
        )


def _lacks_quick_gelu(open_clip: Any, text: str, architecture: str, entry: Mapping[str, Any]) -> bool:  # noqa: ANN401
    """Whether a tag's weights were trained with QuickGELU and the model's own activation is GELU.

    OpenCLIP only warns of that, and runs the model with GELU, which gives other maps.
    """
    is_trained_with = bool(entry.get("quick_gelu"))
    is_built_with = bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    if is_built_with and not is_trained_with:
        raise TeacherError(
            f"model {text}: OpenCLIP's model has the activation QuickGELU, and its list of weights says that these "
            "were trained with GELU. If the model is right, fetch the weights and give "
            f"{OPEN_CLIP}{architecture} with --weights FILE."
        )
    return is_trained_with and not is_built_with


def _input(settings: dict[str, Any]) -> InputConfig:
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    red, green, blue = settings["mean"]
    std_red, std_green, std_blue = settings["std"]
    return InputConfig(
        height=int(height),
        width=int(width),
        mean=(float(red), float(green), float(blue)),
        std=(float(std_red), float(std_green), float(std_blue)),
        # "random" is what OpenCLIP writes for training with either of two.
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        crop_pct=1.0,
    )


@contextmanager
def _quiet() -> Generator[None]:
    """A context without OpenCLIP's messages, which go to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _told_plainly(text: str) -> Generator[None]:
    """A context that makes one sentence of what OpenCLIP raises."""
    try:
        yield
    except Exception as error:  # OpenCLIP and torch raise anything on files they were not written for
        words = " ".join(str(error).split())
        if "weights_only" in words or "Unpickling" in type(error).__name__:
            words = "the file holds pickled Python objects beside tensors, which could run code; it was not read"
        raise TeacherError(
            f"model {text}: OpenCLIP cannot load it ({type(error).__name__}: {words[:300]}). Without a connection, "
            "fetch the weights elsewhere and give --weights FILE."
        ) from error
