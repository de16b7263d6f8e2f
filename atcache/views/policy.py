"""How the views of a cache are drawn: the policy, and what the numbers of a stored view are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args

from atcache.choices import Decoding, PolicyName
from atcache.errors import ConfigError
from atcache.fields import JsonFields, Omitted, Range
from atcache.views.corrupt import SEED_NAME, Corruption
from atcache.views.mixing import MIXING_NAMES, MixPolicy
from atcache.views.randaugment import FILL, RESAMPLE

SPEC, MIXING_SPEC, REDUCED_SPEC, CORRUPT_SPEC = 1, 2, 3, 4
"""Version of the meaning of policies and parameters; raised when equal parameters would give other pixels.

Policies that corrupt have the fourth, others that decode reduced the third, others that mix the second, all others the
first: a reader must refuse only what it cannot do."""
PARAMETER_NAMES = (
    "crop_top",
    "crop_left",
    "crop_height",
    "crop_width",
    "resize_height",
    "resize_width",
    "window_top",
    "window_left",
    "flip",
    "operation_1",
    "argument_1",
    "operation_2",
    "argument_2",
    "erase_top",
    "erase_left",
    "erase_height",
    "erase_width",
    "erase_seed",
)
"""Names of the first numbers of `parameters_P`, for every policy; all of them unless views are mixed. An unused
operation is -1, everything else unused is 0. All but the arguments are whole numbers below 2**24, exact in float32."""
_OPERATIONS = {"resample": RESAMPLE, "fill": list(FILL)}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPolicy(JsonFields):
    """How the views of a cache are drawn."""

    is_strict: ClassVar[bool] = True
    name: PolicyName
    """`eval`: timm's evaluation transform, always with a centre crop. `crop-flip`: random resized crop and flip.
    `randaug`: the same crop and flip, then RandAugment and random erasing."""
    seed: Annotated[int, Range(at_least=0, at_most=math.inf)] = 0
    """Any whole number from 0; with sample_key and view it decides everything that is random."""
    image_height: int
    """Height of the views, in pixels, as the teacher takes them."""
    image_width: int
    """Width of the views, in pixels."""
    interpolation: str = "bicubic"
    """How boxes are resized: one of `INTERPOLATIONS`, always antialiased (Pillow)."""
    crop_pct: float = 0.875
    """`eval` only: the shortest side is resized to size / crop_pct before the centre is cut; timm's default."""
    mixing: Annotated[MixPolicy | None, Omitted] = None
    """How views are mixed with those of other samples; None if they are not mixed."""

    decoding: Annotated[Decoding, Omitted] = "full"
    """`reduced`: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where a view's box stays at least as large as what it
    is resized to. That is faster if photos are much larger than views, and gives slightly other pixels."""
    corrupt: Annotated[str | None, Omitted] = None
    """`eval` only: a common corruption of the finished view and its severity, such as "fog:3"; None for none."""

    def __post_init__(self) -> None:
        if self.decoding not in get_args(Decoding):
            raise ConfigError(f"decoding {self.decoding!r}: expected one of {', '.join(get_args(Decoding))}.")
        if self.name not in get_args(PolicyName):
            raise ConfigError(f"view policy {self.name!r}: expected one of {', '.join(get_args(PolicyName))}.")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation {self.interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}.")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}: expected a whole number from 0.")
        if not (1 <= self.image_height <= 8192 and 1 <= self.image_width <= 8192):
            raise ConfigError(f"views of {self.image_height} x {self.image_width}: expected 1 to 8192 pixels a side.")
        if not 0.0 < self.crop_pct <= 1.0:
            raise ConfigError(f"crop_pct {self.crop_pct}: expected more than 0, at most 1.")
        if self.name == "eval" and self.mixing is not None:
            raise ConfigError("views of policy eval are never mixed: leave mixup and cutmix out, or use crop-flip.")
        if self.corrupt is not None:
            # One spelling only, because equal views must have equal records.
            object.__setattr__(self, "corrupt", str(Corruption.parse(self.corrupt)))
            if self.name != "eval":
                raise ConfigError(
                    f"corrupt={self.corrupt} with policy {self.name}: only views of policy eval are corrupted. Give "
                    "--policy eval, or leave --corrupt out."
                )

    @property
    def corruption(self) -> Corruption | None:
        """What is done to finished views; None if they stay as they are."""
        return None if self.corrupt is None else Corruption.parse(self.corrupt)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the numbers of a stored view, in order."""
        if self.corrupt is not None:
            return (*PARAMETER_NAMES, SEED_NAME)
        return PARAMETER_NAMES if self.mixing is None else PARAMETER_NAMES + MIXING_NAMES

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, with the spec version and its fixed choices; without `mixing`, `decoding` and `corrupt`
        where these have their defaults."""
        spec = _spec_of(
            mixes=self.mixing is not None, reduces=self.decoding != "full", corrupts=self.corrupt is not None
        )
        return {"spec": spec, **JsonFields.to_json(self), "operations": dict(_OPERATIONS)}

    @classmethod
    def known_members(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields, of what `to_json` gave.

        Raises:
            ConfigError: it was written for another spec.
        """
        fields = {name: value for name, value in values.items() if name not in ("spec", "operations")}
        spec, operations = values.get("spec"), values.get("operations")
        expected_spec = _spec_of(
            mixes=fields.get("mixing") is not None,
            reduces=fields.get("decoding", "full") != "full",
            corrupts=fields.get("corrupt") is not None,
        )
        if spec != expected_spec or isinstance(spec, bool | float) or operations != _OPERATIONS:
            raise ConfigError(
                f"views of spec {spec} with operations {operations}, this atcache knows spec {expected_spec} with "
                f"{RESAMPLE} and fill {list(FILL)}. Use the version that wrote the cache."
            )
        return fields


def _spec_of(*, mixes: bool, reduces: bool, corrupts: bool) -> int:
    if corrupts:
        return CORRUPT_SPEC
    return REDUCED_SPEC if reduces else MIXING_SPEC if mixes else SPEC
