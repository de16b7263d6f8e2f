"""Teachers and students: names to timm models with their weights, licence and input."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from atcache.attention.blocks import find_blocks, token_layout
from atcache.components import component_differences
from atcache.errors import TeacherError
from atcache.mixing import MixPolicy
from atcache.tokens import TokenLayout
from atcache.views import PolicyName, ViewPolicy
from atcache.weights import AFTER_BLOCKS, LoadReport, load_weights, read_weights, weights_sha256

__all__ = [
    "ALIASES",
    "DEMO_MODEL",
    "DEMO_WEIGHTS",
    "InputConfig",
    "LoadReport",
    "ModelName",
    "Teacher",
    "component_differences",
    "create_student",
    "input_config",
    "load_teacher",
    "load_weights",
    "parse_model_name",
    "read_weights",
    "weights_sha256",
]

DEMO_MODEL = (
    "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=64,depth=4,num_heads=4,class_token=False,global_pool=avg,"
    "num_classes=0,mean=(0.5,0.5,0.5),std=(0.5,0.5,0.5),interpolation=bicubic,crop_pct=1.0"
)
"""The teacher that ships with the package, for 8 x 8 images of digits."""
DEMO_WEIGHTS = Path(__file__).parent / "data" / "demo-mae.safetensors"
"""Its weights."""

ALIASES: dict[str, str] = {
    "demo-mae": DEMO_MODEL,
    "mae-vit-b": "vit_base_patch16_224.mae",
    "mae-vit-l": "vit_large_patch16_224.mae",
    "mae-vit-h": "vit_huge_patch14_224.mae",
    "dino-vit-s": "vit_small_patch16_224.dino",
    "dino-vit-b": "vit_base_patch16_224.dino",
    "dino-vit-s-8": "vit_small_patch8_224.dino",
    "dino-vit-b-8": "vit_base_patch8_224.dino",
    "dinov2-vit-s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-vit-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-vit-l": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-vit-g": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2-vit-s-reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-vit-b-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-vit-l-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2-vit-g-reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3-vit-s": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3-vit-b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-vit-l": "vit_large_patch16_dinov3.lvd1689m",
    "dinov3-vit-h": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "clip-vit-b": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip-vit-l": "vit_large_patch14_clip_quickgelu_224.openai",
    "siglip-vit-b": "vit_base_patch16_siglip_224.webli",
    "siglip-vit-l": "vit_large_patch16_siglip_256.webli",
    "siglip2-vit-b": "vit_base_patch16_siglip_224.v2_webli",
    "siglip2-vit-l": "vit_large_patch16_siglip_256.v2_webli",
    "deit3-vit-s": "deit3_small_patch16_224.fb_in1k",
    "deit3-vit-b": "deit3_base_patch16_224.fb_in1k",
    "deit3-vit-l": "deit3_large_patch16_224.fb_in1k",
    "beitv2-vit-b": "beitv2_base_patch16_224.in1k_ft_in22k",
    "beitv2-vit-l": "beitv2_large_patch16_224.in1k_ft_in22k",
    "eva02-vit-s": "eva02_small_patch14_224.mim_in22k",
    "eva02-vit-b": "eva02_base_patch14_224.mim_in22k",
    "eva02-vit-l": "eva02_large_patch14_224.mim_m38m",
}
"""Short names of teachers; each stands for one timm model and one set of weights."""

_INPUT_ARGUMENTS = ("mean", "std", "interpolation", "crop_pct")
# These reach files or the network, or change what create_model returns.
_REFUSED_ARGUMENTS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "scriptable",
    "exportable",
)


@dataclass(frozen=True, slots=True)
class ModelName:
    """A timm model and the arguments it is made with; `str()` gives text that `parse_model_name` reads back."""

    timm_name: str
    """As timm writes it, with or without the tag of its weights: "vit_large_patch16_224.mae"."""
    arguments: dict[str, Any] = field(default_factory=dict[str, Any], hash=False)
    """What timm's `create_model` is given, and `mean`, `std`, `interpolation`, `crop_pct` of the model's input."""

    @property
    def architecture(self) -> str:
        """The name without its tag."""
        return self.timm_name.partition(".")[0]

    def __str__(self) -> str:
        arguments = ",".join(f"{name}={_argument_text(value)}" for name, value in self.arguments.items())
        return f"{self.timm_name}:{arguments}" if arguments else self.timm_name


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """How an image becomes a model's input; what timm calls its data config."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    mean: tuple[float, ...]
    """Subtracted from red, green, blue in [0, 1]."""
    std: tuple[float, ...]
    """Divided by, after that."""
    interpolation: str
    """Filter of the resize: "bicubic", "bilinear" ..."""
    crop_pct: float
    """Side of the centre crop over the side of the resized image, in evaluation."""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def view_policy(self, name: PolicyName, seed: int, mixing: MixPolicy | None = None) -> ViewPolicy:
        """The policy that draws views of this size, filter and crop.

        Raises:
            ConfigError: the name or the seed cannot be used, or "eval" is to be mixed.
        """
        return ViewPolicy(
            name=name,
            seed=seed,
            image_height=self.height,
            image_width=self.width,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            mixing=mixing,
        )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> InputConfig:
        """The config `to_json` came from."""
        changed: dict[str, Any] = {"mean": tuple(fields["mean"]), "std": tuple(fields["std"])}
        return cls(**{**fields, **changed})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Teacher:
    """A model whose attention is cached, ready to run: eval mode, no gradients."""

    model: nn.Module
    """The timm model."""
    name: ModelName
    """What it was made from; aliases are resolved."""
    source: str
    """Where the weights came from: a file's name, or "hub:" and a repository."""
    weights_sha256: str
    """Of all that the maps depend on: the state dict without norm, pooling and head after the blocks."""
    licence: str | None
    """Of the weights, as timm records it; None where unknown, as for a file of your own."""
    input: InputConfig
    """The input it expects."""
    tokens: TokenLayout
    """Its tokens."""
    depth: int
    """How many blocks it has."""


def parse_model_name(text: str) -> ModelName:
    """The model that `text` names: an alias, or a timm name, with arguments after a colon.

    Arguments are Python literals; text may stay unquoted: "vit_tiny_patch16_224:img_size=32,global_pool=avg".

    Raises:
        TeacherError: no such model (close names are given), or the arguments cannot be read.
    """
    from timm.models import is_model

    base, colon, arguments_text = text.strip().partition(":")
    if base in ("hf-hub", "hf_hub", "local-dir"):
        raise TeacherError(
            f"model {text!r}: {base}: names are not supported. Give timm's own name, and a file of weights."
        )
    if colon and not arguments_text.strip():
        raise TeacherError(f"model {text!r}: nothing follows the colon; expected arguments such as img_size=224.")
    if base in ALIASES:
        meant = parse_model_name(ALIASES[base])
        return ModelName(meant.timm_name, {**meant.arguments, **_parse_arguments(base, arguments_text)})
    if not is_model(base.partition(".")[0]):
        raise TeacherError(f"model {base!r} is unknown.{_close_models(base)}")
    _pretrained_config(base)
    return ModelName(base, _parse_arguments(base, arguments_text))


def input_config(model: nn.Module) -> InputConfig:
    """The input `model` was made for: its own image size, and what timm records of the rest.

    Raises:
        TeacherError: the recorded normalisation is not of three colours.
    """
    from timm.data import config as timm_data

    config = cast("dict[str, Any]", timm_data.resolve_model_data_config(model))
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    if config["input_size"][0] != 3 or len(mean) != 3 or len(std) != 3:
        raise TeacherError(f"mean {mean} and std {std}: expected three values each, for red, green and blue.")
    return InputConfig(
        height=int(height),
        width=int(width),
        mean=mean,
        std=std,
        interpolation=str(config["interpolation"]),
        crop_pct=float(config["crop_pct"]),
    )


def load_teacher(name: str, *, weights: Path | None = None, device: str | torch.device = "cpu") -> Teacher:
    """The teacher `name` with its trained weights, in eval mode and without gradients.

    Args:
        name: an alias ("mae-vit-l") or a timm name with arguments, see `parse_model_name`.
        weights: a safetensors or torch file; None takes the weights timm names, from the hub or its local cache.
        device: where the model shall be.

    Raises:
        TeacherError: the name or the weights do not do, or the hub cannot be reached; then the message names the
            file to fetch.
        UnsupportedAttentionError: the model's attention is known not to be one softmax over all tokens.
    """
    model_name = parse_model_name(name)
    licence: str | None = _pretrained_config(model_name.timm_name).get("license")
    if weights is None and model_name == parse_model_name("demo-mae"):
        weights, licence = DEMO_WEIGHTS, "apache-2.0"
    elif weights is not None and "." not in model_name.timm_name:
        licence = None  # timm's licence is of the weights a tag names, not of this file
    # Its initial weights are replaced: a caller's student must not change because a teacher was made before it.
    with torch.random.fork_rng(devices=[]):
        model = _create(model_name, {})
    blocks = find_blocks(model)
    tokens = token_layout(model)
    if weights is not None:
        source = Path(weights).name
        load_weights(model, read_weights(weights))
    else:
        model_name, source = _load_from_hub(model, model_name)
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


def create_student(
    name: ModelName,
    num_classes: int,
    *,
    weights: Path | Mapping[str, Tensor] | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """A model to train: the architecture of `name` with fresh weights, drawn from torch's global generator.

    Args:
        name: the architecture and its arguments; `num_classes` among them is overruled.
        num_classes: outputs of the head.
        weights: for fine-tuning: a file, or a state dict such as a teacher's, for all but the head.
        drop_path: probability of skipping the last block (stochastic depth); earlier ones are skipped less, linearly.

    Raises:
        TeacherError: the arguments or the weights do not fit the model.
    """
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if drop_path > 0:
        arguments["drop_path_rate"] = drop_path
    model = _create(name, arguments)
    if weights is not None:
        tensors = weights if isinstance(weights, Mapping) else read_weights(weights)
        load_weights(model, tensors, keep_head=False)
    return model


def _argument_text(value: object) -> str:
    """An argument as a person would type it: words without quotes, which shells eat, and no spaces."""
    if isinstance(value, str) and value.isidentifier() and value not in ("True", "False", "None"):
        return value
    return repr(value).replace(" ", "")


def _parse_arguments(model: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("each needs a name")
        if len({keyword.arg for keyword in call.keywords}) < len(call.keywords):
            raise ValueError("one is given twice")
        arguments: dict[str, Any] = {
            str(k.arg): k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value)
            for k in call.keywords
        }
    except (SyntaxError, ValueError, AssertionError) as error:
        raise TeacherError(
            f"model {model}: cannot read its arguments {text!r}. Write name=value, each once, separated by "
            "commas, such as img_size=224,patch_size=16."
        ) from error
    refused = [name for name in arguments if name in _REFUSED_ARGUMENTS]
    if refused:
        raise TeacherError(f"model {model}: the argument {refused[0]} cannot be given in a model's name.")
    return arguments


def _pretrained_config(timm_name: str) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg, list_pretrained

    try:
        config: Any = get_pretrained_cfg(timm_name)
    except RuntimeError as error:
        architecture = timm_name.partition(".")[0]
        tags = [name for name in list_pretrained(f"{architecture}.*")]
        raise TeacherError(
            f"model {timm_name!r}: timm has no weights of this tag. Known: {', '.join(tags) or 'none'}."
        ) from error
    return dict(config.to_dict()) if config is not None else {}


def _close_models(name: str) -> str:
    from timm.models import list_models

    known = [*ALIASES, *list_models(), *list_models(pretrained=True)]
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else " timm.list_models() lists what there is."


def _create(name: ModelName, overrides: Mapping[str, Any]) -> nn.Module:
    """The timm model, fresh; timm's own complaints about arguments become TeacherError."""
    from timm import create_model

    arguments = {**name.arguments, **overrides}
    if arguments.get("in_chans", 3) != 3:
        raise TeacherError(f"model {name}: images have three colours here, which is in_chans=3. Leave in_chans out.")
    overlay = {key: arguments.pop(key) for key in _INPUT_ARGUMENTS if key in arguments}
    try:
        model = create_model(name.timm_name, pretrained_cfg_overlay=overlay, **arguments)
    except TypeError as error:
        unknown = str(error).partition("unexpected keyword argument ")[2].strip("'")
        if not unknown:
            raise TeacherError(f"model {name}: {error}.") from error
        raise TeacherError(f"model {name.timm_name} has no argument {unknown!r}.{_close_arguments(unknown)}") from error
    except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise TeacherError(f"model {name}: timm cannot make it with these arguments ({error}).") from error
    _check_patches_fit(name, model)
    return model


def _check_patches_fit(name: ModelName, model: nn.Module) -> None:
    """Refuse a size of the user's own that leaves a rim out; some published models do."""
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

    known = [*inspect.signature(VisionTransformer).parameters, *_INPUT_ARGUMENTS]
    close = difflib.get_close_matches(unknown, known, n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _load_from_hub(model: nn.Module, name: ModelName) -> tuple[ModelName, str]:
    """Loads the weights; returns the name with their tag, which timm may choose differently in another version."""
    from atcache.hub import fetch_weights

    config = _pretrained_config(name.timm_name)
    if "." not in name.timm_name and name.arguments:
        raise TeacherError(
            f"model {name}: no weights are known for it. Give a file with --weights, or a name with a tag, such as "
            f"{name.timm_name}.{config.get('tag') or 'TAG'}."
        )
    path, source = fetch_weights(name.timm_name, config)
    load_weights(model, read_weights(path))
    tagged = name.timm_name if "." in name.timm_name else f"{name.timm_name}.{config['tag']}"
    return ModelName(tagged, name.arguments), source
