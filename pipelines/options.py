"""The options of a command, each written once: as a field of the command's config.

    @config
    class BuildConfig:
        views: int = option("Views of each sample.", default=1, at_least=1)

The command line makes its options from these fields (`cli/fields.py`), and functions such as `atcache.build` their
arguments (`pipelines/api.py`). The config itself checks types, ranges and choices, so they hold however it is made.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, dataclass_transform, get_args, get_origin, get_type_hints

from atcache.choices import MAX_SEED, Decoding, Labels, Pixels, PolicyName, Precision, Queries
from atcache.errors import ConfigError
from atcache.fields import Misfit, Range, fit
from atcache.files.location import Url, expand_home, looks_like_url, parse_location

_Value = TypeVar("_Value")
_Config = TypeVar("_Config")
_NO_DEFAULT: Any = dataclasses.MISSING
_KEY = "option"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Option(Range):
    """What a config's field states about its option: help, range and form on the command line."""

    help: str
    """The help text: what the option does, its unit, and what happens without it."""
    metavar: str | None = None
    """The placeholder for the value in the help, such as TARS."""
    is_argument: bool = False
    """Whether the command line takes it by position, without the option's name."""
    is_written: bool = False
    """Whether the command writes to the path."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptionType:
    """What values an option takes, read from the type annotation of its field."""

    base: type
    """bool, int, float, str or Path."""
    choices: tuple[str, ...] = ()
    """The texts it takes; empty if it takes any."""
    takes_urls: bool = False
    """Whether a path may be a URL."""
    takes_none: bool = False
    takes_several: bool = False
    """Whether several values are allowed, as a tuple."""
    takes_one: bool = True
    """Whether one value may stand alone, without a tuple."""


def option(
    help: str,
    *,
    default: Any = _NO_DEFAULT,  # noqa: ANN401 - any type
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    is_argument: bool = False,
    is_written: bool = False,
) -> Any:  # noqa: ANN401 - a field stands for its value
    """A field of a config that is also an option of the command; see `Option` for the arguments."""
    about = Option(
        help=help,
        at_least=at_least,
        at_most=at_most,
        above=above,
        below=below,
        metavar=metavar,
        is_argument=is_argument,
        is_written=is_written,
    )
    return dataclasses.field(default=default, metadata={_KEY: about})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option, dataclasses.field))
def config(cls: type[_Config]) -> type[_Config]:
    """Make a frozen, keyword-only dataclass whose options are converted and checked before its own `__post_init__`.

    Raises:
        ConfigError: when an instance is made with a value of the wrong type, out of range or not among the choices.
    """
    own: Callable[[Any], None] | None = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:  # noqa: ANN401 - an instance of cls
        _settle(self)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)


def options_of(config_class: type) -> dict[str, tuple[dataclasses.Field[Any], Option, OptionType]]:
    """The options of a config by field name, in the order of its fields."""
    types = _types_of(config_class)
    return {
        field.name: (field, cast(Option, field.metadata[_KEY]), types[field.name])
        for field in dataclasses.fields(config_class)
        if _KEY in field.metadata
    }


@lru_cache
def _types_of(config_class: type) -> Mapping[str, OptionType]:
    hints = get_type_hints(config_class)
    return {
        field.name: _read_type(hints[field.name])
        for field in dataclasses.fields(config_class)
        if _KEY in field.metadata
    }


def _read_type(annotation: Any) -> OptionType:  # noqa: ANN401 - any annotation
    union = get_origin(annotation) in (Union, UnionType)
    members: list[Any] = [*get_args(annotation)] if union else [annotation]
    several = [member for member in members if get_origin(member) is tuple]
    alone = [member for member in members if member is not NoneType and member not in several]
    inner = [get_args(member)[0] for member in several]
    # For a tuple alone, the types of its values: Path and Url for `tuple[Path | Url, ...]`. A Literal stays whole.
    kinds = (
        alone or [part for one in inner for part in (get_args(one) if get_origin(one) is not Literal else ())] or inner
    )
    literal = next((kind for kind in kinds if get_origin(kind) is Literal), None)
    return OptionType(
        base=str if literal is not None else Path if Path in kinds else kinds[0],
        choices=() if literal is None else get_args(literal),
        takes_urls=Url in kinds,
        takes_none=NoneType in members,
        takes_several=bool(several),
        takes_one=bool(alone),
    )


def _settle(settings: Any) -> None:  # noqa: ANN401 - a config
    """Convert texts to paths and lists to tuples, and check each value."""
    hints = get_type_hints(cast("type[object]", type(settings)))
    for name, (field, about, kind) in options_of(cast("type[object]", type(settings))).items():
        value = getattr(settings, name)
        is_list = isinstance(value, list | tuple)
        if kind.base is Path:
            value = [_as_path(one, kind) for one in cast("list[Any]", value)] if is_list else _as_path(value, kind)
        if not kind.takes_one and not is_list and (value is not None or not kind.takes_none):
            value = [value]
        try:
            object.__setattr__(settings, name, fit(value, hints[name], name, about))
        except Misfit as misfit:
            if value is None and field.default is dataclasses.MISSING:
                where = name if about.is_argument else f"--{name.replace('_', '-')}"
                raise ConfigError(f"{name} is missing: give {where}, or {name}= in Python. {about.help}") from misfit
            # The text of a model passed by mistake fills pages.
            found = textwrap.shorten(repr(misfit.found), 200) if len(repr(misfit.found)) > 200 else repr(misfit.found)
            raise ConfigError(f"{misfit.place}={found}: expected {misfit.expected}.") from misfit


def _as_path(value: object, kind: OptionType) -> object:
    """The path or URL that a text names; paths may begin with `~`, whoever gives them."""
    if not isinstance(value, (str, Path)):
        return value
    if kind.takes_urls:
        return parse_location(value)
    if isinstance(value, str) and looks_like_url(value):
        raise ConfigError(f"{value!r} is a URL, but a path of this machine was expected.")
    return expand_home(Path(value))


# Options that several commands have. Each is written once, here.


def device_option() -> str:
    """The device that models run on."""
    return option("Where the models run: auto (a GPU if there is one), cpu, cuda or cuda:N.", default="auto")


def scheduler_option() -> str | None:
    """A dask cluster."""
    return option(
        "Work on a dask cluster: the address of its scheduler (tcp://HOST:8786), its scheduler file, or local for "
        "worker processes on this machine: one a GPU, or one for every eight processors if no GPU is used.",
        default=None,
        metavar="ADDRESS",
    )


def precision_option() -> Precision:
    """The precision of matrix products."""
    return option("Precision of matrix products; auto takes bf16 if the device is fast at it.", default="auto")


def seed_option(what: str = "all randomness") -> int:
    """A seed of `what`."""
    return option(f"Seed of {what}.", default=0, at_least=0, at_most=MAX_SEED)


def policy_option(help: str) -> PolicyName:
    """How views are drawn."""
    return option(help, default="crop-flip")


def decoding_option() -> Decoding:
    """How large images are decoded."""
    return option(
        "full decodes whole images. reduced decodes a JPEG at 1/2, 1/4 or 1/8 of its size where that is still enough "
        "for the view: faster for photos much larger than the teacher's input, with slightly other pixels.",
        default="full",
    )


def mixup_option() -> float:
    """How strongly views are blended."""
    return option(
        "Mixup: blend each view with a view of another sample, by a share drawn from Beta(MIXUP, MIXUP). 0.8 is usual; "
        "0 turns it off.",
        default=0.0,
        at_least=0,
    )


def cutmix_option() -> float:
    """How large the boxes are that are pasted from other views."""
    return option(
        "CutMix: paste a box from a view of another sample; its area is drawn from Beta(CUTMIX, CUTMIX). 1.0 is usual; "
        "0 turns it off. With mixup too, each view gets one of the two.",
        default=0.0,
        at_least=0,
    )


def mix_prob_option() -> float:
    """How many views are mixed."""
    return option("Share of the views that are mixed, if mixup or cutmix is on.", default=1.0, above=0, at_most=1)


def kept_layers_option(whose: str = "the teacher") -> str | None:
    """Layers that a cache keeps."""
    return option(f"Layers of {whose} to keep (its blocks), such as 0-17.  [default: all]", default=None)


def kept_heads_option() -> str | None:
    """Heads that a cache keeps."""
    return option("Heads of each layer to keep, such as 0,3.  [default: all]", default=None)


def store_option() -> Literal["v", "x"] | None:
    """What a cache keeps beside q and k."""
    return option(
        "v also stores the teacher's values (v), for students that are given them (`train --what v`). x also stores "
        "what attention and MLP of each layer get, after the norms before them. Only the codecs int8, the default "
        "then, and exact can store either.",
        default=None,
    )


def queries_option() -> Queries:
    """The rows of the maps that a cache keeps."""
    return option(
        "Tokens whose rows of the maps are kept, with all keys: all; cls for the class token; prefix for the class "
        "token and registers. Rows take a few kB a view, to look at or to distill; students that copy need all.",
        default="all",
    )


def pixels_option() -> Pixels:
    """Whether a cache stores images."""
    return option(
        "replay makes the augmented images again from the data when training. store keeps them in the cache: the same "
        "on any machine, and training decodes no JPEGs.",
        default="replay",
    )


def recipe_option() -> str | None:
    """The recipe that fills in options that are not given, before the config is made (`cli/options.py`, `api.py`).

    The config keeps the name, because training notes where a cache's views differ from the recipe's.
    """
    return option(
        "Recipe to take settings from: copy-vit-l, distill-vit-l, finetune-vit-l or scratch-vit-l, as in the paper, or "
        "a file of your own. Options that you give win over it.",
        default=None,
        metavar="NAME",
    )


def weights_option(whose: str = "The teacher's") -> Path | None:
    """Where weights are."""
    return option(f"{whose} weights, a file or a folder.  [default: those of the name, from the hub]", default=None)


def calibration_samples_option(what: str) -> int:
    """The number of calibration samples."""
    return option(f"Samples that {what}, spread over the dataset.", default=256, at_least=1)


def decoding_workers_option() -> int | None:
    """Processes that decode images."""
    return option(
        "Worker processes that decode and augment images; 0 uses the main process.  [default: processors that "
        "it may use, minus 1]",
        default=None,
        at_least=0,
    )


def labels_option() -> Labels:
    """Whether samples need labels."""
    return option(
        "required refuses a sample without a label. optional takes it without. none reads no labels: for images that "
        "have none.",
        default="required",
    )


def label_key_option() -> str | None:
    """Where labels are, if not in `.cls` files."""
    return option(
        "Where the label is in each sample's .json file, such as class_id or meta.class_id.  [default: the label is "
        "the number in the .cls file]",
        default=None,
        metavar="KEY",
    )


def max_samples_option() -> int | None:
    """How many samples to take."""
    return option(
        "Take only this many samples, drawn evenly over the classes: always the same ones, whatever the seed.",
        default=None,
        at_least=1,
    )


def keys_option() -> Path | None:
    """Which samples to take."""
    return option(
        "Take only the samples that this text file lists, one a line: KEY, or TAR/KEY.", default=None, metavar="FILE"
    )
