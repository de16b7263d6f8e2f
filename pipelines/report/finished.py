"""What the folder of a finished run says, and where the data are that it was validated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from atcache.errors import ConfigError
from atcache.files.location import Location, listed, parse_location
from atcache.images.tars import as_typed_in

from ..options import options_of
from ..running.metrics import read_metrics
from ..running.run_files import RUN_FILE
from ..running.run_folder import read_record
from ..running.run_record import RunRecord, read_run
from ..train.config import TrainConfig
from ..train.summary import TrainSummary, read_finished
from .config import ReportConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationPlaces:
    """Where validation data are; empty if there are none."""

    caches: tuple[Location, ...] = ()
    data: str | tuple[str, ...] | None = None
    label_key: str | None = None

    def __bool__(self) -> bool:
        return bool(self.caches or self.data)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """What the folder of a finished run says."""

    folder: Path
    record: RunRecord
    summary: TrainSummary
    settings: Mapping[str, Any]
    """Its options, but for places."""
    caches: tuple[Location, ...]
    """Where it was trained from."""
    places: Mapping[str, Any]
    """What was typed for places, and the "folder" it was typed in; empty in runs from before that was recorded."""
    training: tuple[dict[str, Any], ...]
    """Its metrics, every few steps."""
    validations: tuple[dict[str, Any], ...]
    """Its scores, at some steps."""

    def config(self) -> TrainConfig | None:
        """The config that makes it again; None if the folder does not say enough."""
        known = options_of(TrainConfig)
        typed = {name: value for name, value in self.places.items() if name in known}
        places = typed or {"out": str(self.folder), "cache": list(map(str, self.caches))}
        settings = {name: value for name, value in self.settings.items() if name in known}
        try:
            return TrainConfig(**{**settings, **places})
        except (ConfigError, TypeError):
            return None

    def validation(self) -> ValidationPlaces:
        """Where the data are that it was validated on."""
        folder = Path(self.places.get("folder", ""))
        if folder == Path.cwd():
            folder = Path()
        caches = [parse_location(text) for text in _texts(self.places.get("val_cache"))]
        return ValidationPlaces(
            caches=tuple(folder / cache if isinstance(cache, Path) else cache for cache in caches),
            data=tuple(as_typed_in(folder, tars) for tars in _texts(self.places.get("val_data"))) or None,
            label_key=self.places.get("label_key"),
        )


def _texts(value: object) -> list[str]:
    if value is None:
        return []
    return [str(text) for text in cast("list[object]", value)] if isinstance(value, list) else [str(value)]


def read_finished_run(folder: Path) -> FinishedRun:
    """What the folder of a finished run says.

    Raises:
        ConfigError: there is no run, or it is not finished.
        CorruptCacheError: a file of it cannot be read.
    """
    run = read_run(folder)
    summary = read_finished(folder)
    if summary is None:
        raise ConfigError(f"{folder} is not finished, so there is no result. Run its `atcache train` command again.")
    return FinishedRun(
        folder=folder,
        record=run.record,
        summary=summary,
        settings=(read_record(folder / RUN_FILE) or {}).get("settings", {}),
        caches=tuple(map(parse_location, run.caches)),
        places=run.places or {},
        training=tuple(read_metrics(folder, "train")),
        validations=tuple(read_metrics(folder, "validation")),
    )


def places_to_look_at(config: ReportConfig, run: FinishedRun) -> ValidationPlaces:
    """The validation data that were asked for, or those of the run."""
    own = run.validation()
    if config.val_cache is not None:
        return ValidationPlaces(caches=listed(config.val_cache), data=config.val_data, label_key=config.label_key)
    if config.val_data is None:
        return own
    if config.label_key is not None:  # the labels of these tars are wanted, not those of a cache
        return ValidationPlaces(data=config.val_data, label_key=config.label_key)
    # The tars have moved; the run's caches still have the teacher's maps.
    caches = tuple(cache for cache in own.caches if not isinstance(cache, Path) or cache.exists())
    return ValidationPlaces(caches=caches, data=config.val_data, label_key=None if caches else own.label_key)
