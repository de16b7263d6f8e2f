"""From a name to a model with its weights and licence; `foreign/` makes those that timm does not."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from atcache.attention.blocks import find_blocks, token_layout
from atcache.attention.tokens import TokenLayout
from atcache.errors import TeacherError
from atcache.teachers.foreign.names import OPEN_CLIP, OWN, ForeignName, is_foreign
from atcache.teachers.foreign.own import OwnTeacher, load_own
from atcache.teachers.inputs import InputConfig, crop_mode, input_config, note_crop
from atcache.teachers.names import ModelName, parse_model_name, pretrained_config
from atcache.teachers.patch_grids import Grid, model_grid
from atcache.teachers.published import INPUT_ARGUMENTS, published_weights, read_published
from atcache.teachers.trained import Trained
from atcache.teachers.weight_files import Weights, read_weights
from atcache.teachers.weight_sets import AFTER_BLOCKS
from atcache.teachers.weights import load_weights, weights_sha256

DEMO_WEIGHTS = Path(__file__).parent.parent / "data" / "demo-mae.safetensors"
"""The weights of "demo-mae", which ship with the package."""
_MLPS = ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked", "GatedMlp", "GlobalResponseNormMlp")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Teacher:
    """A model whose attention is cached, ready to run: eval mode, no gradients."""

    model: nn.Module
    """The timm model, or a `DescribedModel`."""
    name: ModelName | ForeignName
    """What it was made from; aliases are resolved."""
    source: str
    """Where the weights came from: a file's name, or "hub:" and a repository, with the commit if it is not timm's."""
    weights_sha256: str
    """sha256 of all that the maps depend on: for timm the state dict without norm, pooling and head at the end."""
    licence: str | None
    """Licence of the weights, as timm records it; None if unknown, as for your own file."""
    input: InputConfig
    """The input it expects."""
    tokens: TokenLayout
    """Its tokens."""
    depth: int
    """How many blocks it has."""
    trained: Trained | None = None
    """The training that made its weights, if that was `atcache train`."""


def load_teacher(name: str | OwnTeacher, *, weights: Path | None = None, device: str | torch.device = "cpu") -> Teacher:
    """The teacher `name` with its trained weights, in eval mode and without gradients.

    Args:
        name: an alias ("mae-vit-l"), a timm name with arguments, or what is published on the hub or in a folder, see
            `parse_model_name`; or the name or module of a foreign model.
        weights: a safetensors or torch file, an index of shards, or a folder with one of these; None takes the weights
            that timm names or that are published under the name, from the hub or its local cache.
        device: where to put the model.

    Raises:
        TeacherError: the name or the weights cannot be used, or the hub cannot be reached; then the message names the
            file to download.
        UnsupportedAttentionError: the model's attention is known not to be one softmax over all tokens.
    """
    if is_foreign(name):
        return _load_foreign(name, weights, torch.device(device))
    model_name = parse_model_name(str(name))
    licence: str | None = pretrained_config(model_name.timm_name).get("license")
    if weights is not None:
        model_name = replace(model_name, weights_at=None)
    if weights is None and model_name == parse_model_name("demo-mae"):
        weights, licence = DEMO_WEIGHTS, "apache-2.0"
    elif weights is not None and "." not in model_name.timm_name:
        licence = None  # timm's licence is for the weights it would choose, not for this file
    # Drawing initial weights, which are replaced anyway, must not change the random numbers of a student made later.
    with torch.random.fork_rng(devices=[]):
        model = _create(model_name, {})
    blocks = find_blocks(model)
    tokens = token_layout(model)
    mode = crop_mode(model)
    if weights is not None:
        source = Path(weights).name
        load_weights(model, _read(model_name, weights))
    elif model_name.weights_at is not None:
        published = read_published(model_name.weights_at)
        licence, mode = published.licence, published.crop_mode
        place, source = published_weights(model_name.weights_at)
        load_weights(model, _with_grid(_read(model_name, place), model, published.arguments.get("img_size")))
    else:
        model_name, source = _load_from_hub(model, model_name)
    note_crop(model_name, mode)
    return Teacher(
        model=model.to(device).eval().requires_grad_(False),
        name=model_name,
        source=source,
        weights_sha256=weights_sha256(model, without=AFTER_BLOCKS),
        licence=licence,
        input=input_config(model),
        tokens=tokens,
        depth=len(blocks),
    )


def _load_foreign(name: str | OwnTeacher, weights: Path | None, device: torch.device) -> Teacher:
    """A teacher that timm does not make. The libraries that make them are imported here, and only the one needed."""
    if weights is not None and not str(name).startswith(OPEN_CLIP):
        raise TeacherError(f"model {name}: it comes with its weights. Leave out --weights {weights}.")
    if isinstance(name, OwnTeacher):
        loaded = load_own(name, device)
    elif name.startswith(OWN):
        raise TeacherError(
            f"model {name}: a module of one's own has no name to load it by. Hand it over from Python: "
            "teacher=atcache.own_teacher(module, ...)."
        )
    elif name.startswith(OPEN_CLIP):
        from atcache.teachers.foreign.open_clip_models import load_open_clip

        loaded = load_open_clip(name, weights, device)
    else:
        from atcache.teachers.foreign.hugging_face import load_transformers

        loaded = load_transformers(name, device)
    return Teacher(
        model=loaded.model,
        name=loaded.name,
        source=loaded.source,
        weights_sha256=loaded.weights_sha256,
        licence=None,
        input=loaded.input,
        tokens=loaded.model.tokens,
        depth=len(loaded.model.blocks_in_order),
    )


def create_student(
    name: ModelName,
    num_classes: int,
    *,
    weights: Path | Mapping[str, Tensor] | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """A model to train: the architecture of `name` with fresh weights, drawn from torch's global generator.

    Args:
        name: the architecture and its arguments; a `num_classes` among them is ignored, and a student of a teacher
            without pooling (`global_pool=''`) takes its class token, or the mean if it has none.
        num_classes: outputs of the head.
        weights: for fine-tuning: a file, or a state dict such as a teacher's (`weights_of` knows its grid), for all but
            the head.
        drop_path: probability of skipping the last block (stochastic depth); earlier ones are skipped less, linearly.

    Raises:
        TeacherError: the arguments or the weights do not fit the model.
    """
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if drop_path > 0:
        arguments["drop_path_rate"] = drop_path
    if num_classes > 0 and name.arguments.get("global_pool") == "":
        # Published teachers often give all tokens, unpooled. A classifier needs one vector.
        with torch.device("meta"):
            has_prefix = getattr(_create(name, arguments), "num_prefix_tokens", 0) > 0
        arguments["global_pool"] = "token" if has_prefix else "avg"
    model = _create(name, arguments)
    if weights is not None:
        tensors = weights if isinstance(weights, Mapping) else _read(name, weights)
        if not isinstance(tensors, Weights) or tensors.grid is None:
            tensors = Weights(tensors, grid=_weights_grid(name))
        load_weights(model, tensors, keep_head=False)
    return model


def _read(name: ModelName, path: Path) -> Weights:
    """The weights in a file, with the grid that the user says they are of."""
    weights = read_weights(path)
    grid = _weights_grid(name)
    return weights if grid is None else Weights(weights, grid=grid)


def _with_grid(weights: Weights, model: nn.Module, image_size: Any) -> Weights:  # noqa: ANN401 - from a config
    """Weights made for images of a size, with their grid. It matters to models of another than a square grid."""
    ours = model_grid(model)
    patches = [tensor.shape[2:] for name, tensor in weights.items() if name.endswith("patch_embed.proj.weight")]
    if weights.grid or not image_size or not patches or len(patches[0]) != 2 or ours is None or ours[0] == ours[1]:
        return weights
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return Weights(weights, grid=(height // patches[0][0], width // patches[0][1]))


def _weights_grid(name: ModelName) -> Grid | None:
    given: Any = name.arguments.get("weights_grid")
    if given is None:
        return None
    if not isinstance(given, tuple) or [type(side) for side in cast("tuple[Any, ...]", given)] != [int, int]:
        raise TeacherError(f"model {name}: weights_grid={given!r}, expected patches down and across, such as (14,14).")
    if min(cast("Grid", given)) < 1:
        raise TeacherError(f"model {name}: weights_grid={given!r}, expected at least one patch down and across.")
    return cast("Grid", given)


def _create(name: ModelName, overrides: Mapping[str, Any]) -> nn.Module:
    """A new timm model; timm's own errors about arguments become TeacherError."""
    from timm import create_model

    arguments = {**name.arguments, **overrides}
    if arguments.get("in_chans", 3) != 3:
        raise TeacherError(f"model {name}: images have three colours (in_chans=3). Leave in_chans out.")
    _weights_grid(name)  # refuses what is none; it says nothing about the model
    arguments.pop("weights_grid", None)
    if isinstance(mlp := arguments.get("mlp_layer"), str):
        arguments["mlp_layer"] = _mlp_class(name, mlp)
    overlay = {key: arguments.pop(key) for key in INPUT_ARGUMENTS if key in arguments}
    try:
        model = create_model(name.timm_name, pretrained_cfg_overlay=overlay, **arguments)
    except TypeError as error:
        unknown = str(error).partition("unexpected keyword argument ")[2].strip("'")
        if not unknown:
            raise TeacherError(f"model {name}: {error}.") from error
        raise TeacherError(f"model {name.timm_name} has no argument {unknown!r}.{_close_arguments(unknown)}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        reason = f"it knows no {error}" if isinstance(error, KeyError) else error
        raise TeacherError(f"model {name}: timm cannot make it with these arguments ({reason}).") from error
    _check_patches_fit(name, model)
    return model


def _mlp_class(name: ModelName, mlp: str) -> Any:  # noqa: ANN401 - timm's layers are untyped
    """A kind of MLP by its name in timm, which takes names only for activations and norms."""
    from timm import layers

    if mlp not in _MLPS:
        raise TeacherError(f"model {name}: mlp_layer={mlp}: expected one of {', '.join(_MLPS)}.")
    return getattr(layers, mlp)


def _check_patches_fit(name: ModelName, model: nn.Module) -> None:
    """Refuse sizes given by the user if patches do not cover the whole image; some published models are made so."""
    if not {"img_size", "patch_size"} & name.arguments.keys():
        return
    patch_embed: Any = getattr(model, "patch_embed", None)
    sides: tuple[int, int] | None = getattr(patch_embed, "img_size", None)
    patch: tuple[int, int] | None = getattr(patch_embed, "patch_size", None)
    if sides is None or patch is None or getattr(patch_embed, "dynamic_img_pad", False):
        return
    if any(side % part for side, part in zip(sides, patch, strict=True)):
        raise TeacherError(
            f"model {name}: images of {sides[0]} x {sides[1]} pixels cannot be cut into patches of {patch[0]} x "
            f"{patch[1]}. Give an img_size that is a multiple of patch_size."
        )


def _close_arguments(unknown: str) -> str:
    from timm.models.vision_transformer import VisionTransformer

    known = [*inspect.signature(VisionTransformer).parameters, *INPUT_ARGUMENTS]
    close = difflib.get_close_matches(unknown, known, n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _load_from_hub(model: nn.Module, name: ModelName) -> tuple[ModelName, str]:
    """Load the weights; return the model's name with their tag, and their source.

    The tag is kept because another version of timm may choose another one.
    """
    from atcache.teachers.hub import fetch_weights

    config = pretrained_config(name.timm_name)
    if "." not in name.timm_name and name.arguments:
        raise TeacherError(
            f"model {name}: no weights are known for it. Give a file with --weights, or a name with a tag, such as "
            f"{name.timm_name}.{config.get('tag') or 'TAG'}."
        )
    path, source = fetch_weights(name.timm_name, config)
    load_weights(model, _with_grid(_read(name, path), model, config.get("input_size", ())[-2:]))
    tagged = name.timm_name if "." in name.timm_name else f"{name.timm_name}.{config['tag']}"
    return replace(name, timm_name=tagged), source
