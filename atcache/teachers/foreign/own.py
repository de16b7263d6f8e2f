"""A teacher of one's own: any module that attends with torch's own attention, or with a softmax of q k^T."""

from __future__ import annotations

import builtins
import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from atcache.errors import ConfigError
from atcache.teachers.foreign.names import OWN

if TYPE_CHECKING:
    import torch
    from torch import nn

    from atcache.attention.described import QueryKey
    from atcache.teachers.foreign.loaded import ForeignModel
    from atcache.teachers.inputs import InputConfig

_LARGEST_COLOUR = 2.0
"""Above this, a mean or a std can only be one of colours from 0 to 255."""
_LIBRARY = "torch"
"""The library whose classes are named by its version, which caches record, and not by their source."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class OwnTeacher:
    """A module with what a teacher must tell; `own_teacher` makes and checks it."""

    module: nn.Module
    """The user's own; copies of it are run."""
    input: InputConfig
    """Size and normalisation of its images."""
    grid: tuple[int, int]
    """Rows and columns of its patches."""
    num_prefix_tokens: int | None
    """Tokens before the patches; None to count them."""
    attention: type[nn.Module] | None
    """The class of its attention modules, if that is given."""
    query_key: QueryKey | None
    """What gives their q and k."""
    name: str
    """ "own:", the module's class, and the beginning of the sha256 of its code and of what its state dict lacks."""

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{self.name}>"


def own_teacher(
    module: nn.Module,
    *,
    image_size: int | tuple[int, int],
    patch_size: int | tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    num_prefix_tokens: int | None = None,
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
    attention: type[nn.Module] | None = None,
    query_key: QueryKey | None = None,
    version: str | None = None,
) -> OwnTeacher:
    """A module of your own as a teacher, for `teacher=` of `atcache.build`, `plan` and `verify`.

    Its layers are found by watching it run: each time it attends over all its tokens is a layer. It may call
    `scaled_dot_product_attention`, or `nn.MultiheadAttention`, or take the softmax of a product of q and k, shape
    (batch, head, query, key). Before anything is cached, the maps found are compared with those of the module.

    The cache records a hash of its state dict, and one of the source of its classes (not of functions that they call
    in other files) and of what no state dict has: attributes that are plain values, such as a number of heads, or
    tensors and arrays, also in lists and dicts, and buffers that are not persistent. A build is continued only with
    the same ones. Other attributes, such as functions and objects of settings, are not hashed.

    Args:
        module: called with normalised images (batch, 3, height, width). A copy of it in float32 and eval mode is run.
        image_size: pixels: one side of a square, or height and width.
        patch_size: pixels, in the same way.
        mean: subtracted from red, green and blue in [0, 1].
        std: the differences are divided by these.
        num_prefix_tokens: tokens before the patches (class token, registers); None takes all that are no patches. All
            tokens that are no patches must stand before them.
        interpolation: filter of the resize of images.
        crop_pct: side of the centre crop divided by the side of the resized image, for policy eval.
        attention: with `query_key`: the class of its attention modules, one for each layer.
        query_key: `q, k = query_key(attention_module, *inputs)`, each (batch, head, token, head dim), whose
            softmax(q k^T) is the module's map. For modules whose logits are not a scaled product, such as with a
            learnt temperature.
        version: identifies the code instead of its source, attributes and buffers. The source cannot be read in some
            interactive sessions, and an attribute may count something, or keep what the last forward pass made.

    Raises:
        ConfigError: the values do not fit one another, or the source of a class or the values of a tensor cannot be
            read.

    Example:
        teacher = atcache.own_teacher(my_vit, image_size=224, patch_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
        atcache.build(teacher=teacher, data="train-{0000..0099}.tar", out="mine.zarr")
    """
    from atcache.teachers.inputs import InputConfig

    _check_module(module)
    colours = {"mean": _colours(mean, "mean"), "std": _colours(std, "std")}
    height, width = _sides(image_size, "image_size")
    patch_height, patch_width = _sides(patch_size, "patch_size")
    if height % patch_height or width % patch_width:
        raise ConfigError(
            f"image_size={image_size} cannot be cut into patches of patch_size={patch_size}: give a multiple of it."
        )
    if (attention is None) != (query_key is None):
        raise ConfigError("attention and query_key go together: a class of modules, and what gives their q and k.")
    if num_prefix_tokens is not None and num_prefix_tokens < 0:
        raise ConfigError(f"num_prefix_tokens={num_prefix_tokens}: expected 0 or more.")
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper, whose graph cannot be seen into
    code = version if version is not None else "\n".join([_source(module, query_key), *_settings(module)])
    return OwnTeacher(
        module=module,
        input=InputConfig.from_json(
            {
                "height": height,
                "width": width,
                **colours,
                "interpolation": interpolation,
                "crop_pct": crop_pct,
            },
            "own_teacher",
        ),
        grid=(height // patch_height, width // patch_width),
        num_prefix_tokens=num_prefix_tokens,
        attention=attention,
        query_key=query_key,
        name=f"{OWN}{type(module).__name__}@{hashlib.sha256(code.encode()).hexdigest()[:12]}",
    )


def load_own(teacher: OwnTeacher, device: torch.device) -> ForeignModel:
    """The teacher on its device, in eval mode and float32; the user's module stays as it is.

    Raises:
        UnsupportedAttentionError: its attention cannot be cached.
    """
    from atcache.attention.survey import describe
    from atcache.teachers.foreign.loaded import ForeignModel
    from atcache.teachers.foreign.names import ForeignName
    from atcache.teachers.weights import weights_sha256

    module = copy.deepcopy(teacher.module).float().to(device).eval().requires_grad_(False)
    return ForeignModel(
        model=describe(
            module,
            label=teacher.name,
            image_size=(teacher.input.height, teacher.input.width),
            grid=teacher.grid,
            num_prefix_tokens=teacher.num_prefix_tokens,
            attention=teacher.attention,
            query_key=teacher.query_key,
        ),
        name=ForeignName(teacher.name),
        source=type(teacher.module).__name__,
        weights_sha256=weights_sha256(module),
        input=teacher.input,
    )


def _check_module(module: object) -> None:
    from torch import nn

    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"own_teacher takes a torch.nn.Module, and got {module!r} ({type(module).__name__}). Models that have a "
            "name are given by it: teacher='NAME'. A function can be called in a module's forward."
        )


def _colours(values: object, name: str) -> list[float]:
    """A value for red, green and blue, given as any sequence, array or tensor."""
    try:
        numbers = [float(value) for value in cast("Iterable[float]", values)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3:
        raise ConfigError(f"{name}={values!r}: expected three numbers, for red, green and blue, such as (0.5,) * 3.")
    if max(map(abs, numbers)) > _LARGEST_COLOUR:
        raise ConfigError(
            f"{name}={values!r}: expected values for colours from 0 to 1. If they are for 0 to 255, divide mean and "
            "std by 255."
        )
    return numbers


def _sides(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ConfigError(f"{name}={size!r}: expected a number of pixels, or height and width.")
    return sides


def _source(module: nn.Module, query_key: Callable[..., Any] | None) -> str:
    """The source of all classes that the module is made of, apart from torch's, and of `query_key`."""
    classes = {base for child in module.modules() for base in type(child).__mro__ if not _is_of_library(base)}
    parts = [f"{_name(one)}\n{_source_of(one)}" for one in sorted(classes, key=_name)]
    return "\n".join([*parts, "" if query_key is None else _source_of(query_key)])


def _settings(module: nn.Module) -> list[str]:
    """What the state dict lacks, of all submodules: modules of one class and state dict may differ in it.

    These are plain values and tensors among their attributes, and buffers that are not persistent.
    """
    from torch import nn

    of_every_module = vars(nn.Module()).keys()
    settings: list[str] = []
    for path, child in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        for name, value in sorted(vars(child).items()):
            if name in of_every_module:
                continue
            if _is_plain(value):
                settings.append(f"{path}.{name}={value!r}")
            else:
                settings += _tensors_in(f"{path}.{name}", value)
    saved = module.state_dict()
    for name, buffer in module.named_buffers():
        if name not in saved:
            settings += _tensors_in(name, buffer)
    return settings


def _tensors_in(place: str, value: object) -> list[str]:
    """The hash of a tensor or array, or of all in a list, tuple or dict; empty if there are none."""
    import numpy as np
    from torch import Tensor

    from atcache.teachers.weights import tensors_sha256

    if isinstance(value, Tensor):
        try:
            return [f"{place}={tensors_sha256({'': value})}"]
        except RuntimeError as error:
            raise ConfigError(
                f"the values of {place}, a tensor of layout {value.layout} on device {value.device}, cannot be read, "
                "so a change of them would go unnoticed. Make it a plain tensor, or give version='1' and another text "
                "whenever it changes."
            ) from error
    if isinstance(value, np.ndarray):
        array = cast("np.ndarray[Any, np.dtype[Any]]", value)
        if array.dtype.hasobject:  # its bytes are addresses, which differ each time
            return _tensors_in(place, array.tolist())
        return [f"{place}={array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"]
    if isinstance(value, Mapping):
        items: Iterable[tuple[object, object]] = cast("Mapping[object, object]", value).items()
    elif isinstance(value, tuple | list):
        items = enumerate(cast("Sequence[object]", value))
    else:
        return []
    # The text of a key that is an object may hold its address.
    named = ((key if _is_plain(key) else number, one) for number, (key, one) in enumerate(items))
    return [text for key, one in named for text in _tensors_in(f"{place}[{key!r}]", one)]


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, cast("Sequence[object]", value)))
    return value is None or isinstance(value, bool | int | float | str)


def _source_of(code: Any) -> str:  # noqa: ANN401 - a class or a function
    try:
        return inspect.getsource(code)
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"the source of {_name(code)} cannot be read, so a change of it would go unnoticed. Put it in a file, or "
            "give version='1' and another text whenever the code changes."
        ) from error


def _name(code: Any) -> str:  # noqa: ANN401 - a class or a function
    return f"{getattr(code, '__module__', None)}.{getattr(code, '__qualname__', type(code).__name__)}"


def _is_of_library(cls: type) -> bool:
    return (
        cls.__module__.partition(".")[0] in (_LIBRARY, "typing", "abc") or getattr(builtins, cls.__name__, None) is cls
    )
