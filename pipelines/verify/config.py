"""What a verification was asked for."""

from __future__ import annotations

from pathlib import Path

from atcache.errors import ConfigError
from atcache.files.location import Location, Url

from ..options import config, device_option, option, options_of, weights_option

_OF_THE_TEACHER = ("weights", "teacher_sample", "threshold", "device")
"""Fields that nothing reads without a teacher."""


@config
class VerifyConfig:
    """What `atcache verify` was asked for."""

    cache: Location = option("The cache, complete or not.", is_argument=True)
    data: str | None = option("Where the cache's tars are now, if they were moved.", default=None, metavar="TARS")
    sample: int | None = option(
        "Views whose pixels are compared with their hash, spread evenly; 0 compares none.  [default: 256]",
        default=None,
        at_least=0,
    )
    all: bool = option("Compare the pixels of all views instead.", default=False)
    workers: int | None = option(
        "Threads that read and decompress.  [default: one a processor]", default=None, at_least=1
    )
    repair: bool = option("Make the next build redo just the damaged tasks.", default=False)
    teacher: str | None = option(
        "Recompute views with this teacher, an alias or timm name: the one of the build.", default=None
    )
    weights: Path | None = weights_option()
    teacher_sample: int = option("Views that the teacher recomputes, spread evenly.", default=32, at_least=1)
    threshold: float = option(
        "Times the recorded or target value that row KL and injected error may have.", default=1.5, at_least=1
    )
    device: str = device_option()

    def __post_init__(self) -> None:
        if self.all and self.sample is not None:
            raise ConfigError("--sample and --all both say how many views are compared; give one of them.")
        if self.repair and isinstance(self.cache, Url):
            raise ConfigError(f"repair: {self.cache} is on a server, and only local caches are written. Repair a copy.")
        if self.teacher is None:
            for name, (field, _, _) in options_of(type(self)).items():
                value = getattr(self, name)
                if name in _OF_THE_TEACHER and value != field.default:
                    raise ConfigError(
                        f"{name}={value}: only for a comparison with the teacher. Give --teacher too, or leave "
                        f"--{name.replace('_', '-')} out."
                    )

    @property
    def num_compared_views(self) -> int | None:
        """Views whose pixels are compared; None for all."""
        return None if self.all else 256 if self.sample is None else self.sample
