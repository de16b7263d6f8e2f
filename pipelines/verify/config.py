"""The options of a verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atcache.errors import ConfigError
from atcache.files.location import Location, Url
from atcache.teachers.foreign.own import OwnTeacher

from ..cluster.connect import check_scheduler, check_workers_option
from ..options import config, device_option, option, options_of, scheduler_option, weights_option

_OF_THE_TEACHER = ("weights", "teacher_sample", "threshold", "device")
"""Fields that are used only with a teacher."""


@config
class VerifyConfig:
    """What `atcache verify` checks, and how."""

    cache: Location = option("The cache; it may be incomplete.", is_argument=True)
    data: str | None = option("Where the cache's tars are now, if they were moved.", default=None, metavar="TARS")
    sample: int | None = option(
        "Number of views, spread evenly, whose pixels are compared with the hash that the build recorded; 0 compares "
        "none.  [default: 256]",
        default=None,
        at_least=0,
    )
    all: bool = option("Compare the pixels of all views, instead of --sample.", default=False)
    workers: int | None = option(
        "Threads that read and decompress.  [default: one per processor that the command may use]",
        default=None,
        at_least=1,
    )
    scheduler: str | None = scheduler_option()
    client: Any = None
    """A `distributed.Client` to use instead of `scheduler`; only from Python."""
    repair: bool = option(
        "Delete the commit records of damaged tasks, so that the next `atcache build` or `pull` redoes just these.",
        default=False,
    )
    teacher: str | OwnTeacher | None = option(
        "Recompute some views with this teacher, named as for build. It must be the one of the build.", default=None
    )
    weights: Path | None = weights_option()
    teacher_sample: int = option("Number of views, spread evenly, that the teacher recomputes.", default=32, at_least=1)
    threshold: float = option(
        "Row KL, the error of the features with decoded maps, and the errors of v and x may be this many times "
        "their recorded or target value.",
        default=1.5,
        at_least=1,
    )
    device: str = device_option()

    def __post_init__(self) -> None:
        if self.all and self.sample is not None:
            raise ConfigError("--sample and --all both say how many views are compared; give one of them.")
        check_scheduler(self.scheduler, self.client)
        check_workers_option(self.workers, self.scheduler, self.client)
        if self.repair and isinstance(self.cache, Url) and not self.cache.can_list:
            raise ConfigError(f"repair: {self.cache} is on a web server, which is only read. Repair a copy.")
        if self.teacher is None:
            for name, (field, _, _) in options_of(type(self)).items():
                value = getattr(self, name)
                if name in _OF_THE_TEACHER and value != field.default:
                    raise ConfigError(
                        f"{name}={value} is only for a comparison with the teacher. Give --teacher too, or leave "
                        f"--{name.replace('_', '-')} out."
                    )

    @property
    def num_compared_views(self) -> int | None:
        """Views whose pixels are compared; None for all."""
        return None if self.all else 256 if self.sample is None else self.sample
