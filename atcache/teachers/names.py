"""Names of teachers and students: aliases and timm's names with arguments."""

from __future__ import annotations

import ast
import difflib
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atcache.errors import TeacherError
from atcache.files.location import expand_home
from atcache.teachers.foreign.names import refuse_as_student
from atcache.teachers.published import SOURCES, read_published

DEMO_MODEL = (
    "vit_tiny_patch16_224:img_size=8,patch_size=2,embed_dim=64,depth=4,num_heads=4,class_token=False,global_pool=avg,"
    "num_classes=0,mean=(0.5,0.5,0.5),std=(0.5,0.5,0.5),interpolation=bicubic,crop_pct=1.0"
)
"""The teacher that ships with the package, for 8 x 8 images of digits."""
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
_WEIGHTS_AT = "weights_at="  # always the last argument, and never quoted: folders may have commas
_BEGINS_ARGUMENTS = re.compile(r"\s*[A-Za-z_]\w*\s*=")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A timm model and the arguments it is made with; `str()` gives text that `parse_model_name` reads back."""

    timm_name: str
    """As timm writes it, with or without the tag of its weights: "vit_large_patch16_224.mae"."""
    arguments: dict[str, Any] = field(default_factory=dict[str, Any], hash=False)
    """Arguments of timm's `create_model`; `mean`, `std`, `interpolation`, `crop_pct` of the model's input; and
    `weights_grid`, the patches down and across of the weights if the model's own are others."""
    weights_at: str | None = None
    """Where its weights are published, if it is not timm that names them: "hf-hub:REPOSITORY@COMMIT" or
    "local-dir:FOLDER"."""

    @property
    def architecture(self) -> str:
        """The name without its tag."""
        return self.timm_name.partition(".")[0]

    def __str__(self) -> str:
        parts = [f"{name}={_argument_text(value)}" for name, value in self.arguments.items()]
        if self.weights_at is not None:
            parts.append(f"{_WEIGHTS_AT}{self.weights_at}")
        return f"{self.timm_name}:{','.join(parts)}" if parts else self.timm_name


def parse_model_name(text: str) -> ModelName:
    """The model that `text` names: an alias, a timm name, or what is published, with arguments after a colon.

    Arguments are Python literals; text may stay unquoted: "vit_tiny_patch16_224:img_size=32,global_pool=avg". What is
    published, "hf-hub:ORG/MODEL", "hf-hub:ORG/MODEL@REVISION" or "local-dir:FOLDER", becomes the timm name and the
    arguments that its config.json says, and the commit that the revision is now. It is looked up where it was
    downloaded before, then in the network.

    Raises:
        TeacherError: there is no such model (the message gives close names), or the arguments cannot be read.
    """
    refuse_as_student(text)
    base, colon, arguments_text = text.strip().partition(":")
    base = base.replace("hf_hub", "hf-hub")  # as timm wrote it before
    if base in SOURCES:
        return _published_name(base, arguments_text)
    arguments_text, at, weights_at = arguments_text.partition(_WEIGHTS_AT)
    if at:
        if not weights_at.startswith(tuple(f"{source}:" for source in SOURCES)):
            expected = "hf-hub:ORG/MODEL or local-dir:FOLDER"
            raise TeacherError(f"model {text!r}: expected {expected} as its last argument, {_WEIGHTS_AT}.")
        arguments = _parse_arguments(base, arguments_text.rstrip(", "))
        return ModelName(_known(base), arguments, weights_at)
    if colon and not arguments_text.strip():
        raise TeacherError(f"model {text!r}: nothing follows the colon; expected arguments such as img_size=224.")
    if base in ALIASES:
        meant = parse_model_name(ALIASES[base])
        return ModelName(meant.timm_name, {**meant.arguments, **_parse_arguments(base, arguments_text)})
    return ModelName(_known(base), _parse_arguments(base, arguments_text))


def _known(timm_name: str) -> str:
    from timm.models import is_model

    if not is_model(timm_name.partition(".")[0]):
        raise TeacherError(f"model {timm_name!r} is unknown.{_close_models(timm_name)}")
    pretrained_config(timm_name)
    return timm_name


def _published_name(source: str, rest: str) -> ModelName:
    """The plain name of what is published at `rest`, which may have arguments of the user's own behind a colon."""
    place, arguments_text = rest, ""
    # A repository has no colon. A folder may have some, so the last one must begin arguments.
    before, _, behind = rest.partition(":") if source == "hf-hub" else rest.rpartition(":")
    if before and (source == "hf-hub" or _BEGINS_ARGUMENTS.match(behind)):
        place, arguments_text = before, behind
    published = read_published(f"{source}:{place}")
    _refuse_arguments(f"{source}:{place}", published.arguments)
    arguments = published.arguments | _parse_arguments(f"{source}:{place}", arguments_text)
    return ModelName(published.architecture, arguments, published.weights_at)


def _argument_text(value: object) -> str:
    """An argument as a person would type it: words without quotes, which shells remove, and no spaces."""
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
    except (AssertionError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise TeacherError(
            f"model {model}: cannot read its arguments {text!r}. Write name=value, each once, separated by "
            "commas, such as img_size=224,patch_size=16."
        ) from error
    _refuse_arguments(model, arguments)
    return arguments


def _refuse_arguments(model: str, arguments: dict[str, Any]) -> None:
    refused = [name for name in arguments if name in _REFUSED_ARGUMENTS]
    if refused:
        raise TeacherError(f"model {model}: the argument {refused[0]} cannot be given in a model's name.")


def pretrained_config(timm_name: str) -> dict[str, Any]:
    """What timm records of a model's trained weights, as a dict; empty if there are none.

    Raises:
        TeacherError: timm has no weights with the tag in the name.
    """
    from timm.models import get_pretrained_cfg, list_pretrained

    try:
        config: Any = get_pretrained_cfg(timm_name)
    except RuntimeError as error:
        architecture = timm_name.partition(".")[0]
        tags = [name for name in list_pretrained(f"{architecture}.*")]
        raise TeacherError(
            f"model {timm_name!r}: timm has no weights with this tag. Known: {', '.join(tags) or 'none'}."
        ) from error
    return dict(config.to_dict()) if config is not None else {}


def _close_models(name: str) -> str:
    from timm.models import list_models

    is_folder = False
    with suppress(OSError):  # a name may be longer than that of any file
        is_folder = expand_home(Path(name)).is_dir()
    if is_folder:
        return f" If a folder is meant, give local-dir:{name}, or transformers:{name} if it is of that library."
    known = [*ALIASES, *list_models(), *list_models(pretrained=True)]
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else " timm.list_models() lists all names."
