"""Write the report of a finished run: one page with all that it needs inside."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from atcache.cache.record import CacheRecord
from atcache.errors import AtcacheError, CacheMismatchError
from atcache.feed.caches import open_caches, open_joined_views
from atcache.fields import JsonFields
from atcache.files.durable import make_folder, write_file
from atcache.images.class_names import ClassNames
from atcache.store.reader import CacheReader
from atcache.students.student import Student, check_views_fit
from atcache.students.teacher_side import CacheTeacher
from atcache.teachers.devices import resolve_device, resolve_precision

from ..running.run_record import load_run
from ..train.validation import ValidationSet, open_validation
from .config import ReportConfig
from .finished import FinishedRun, ValidationPlaces, places_to_look_at, read_finished_run
from .looking import Maps, Predictions, Viewed, check_teacher, look_at_maps, predict
from .repeat import commands_to_repeat, environment
from .sections import Seen, write_page


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSummary(JsonFields):
    """What was written."""

    out: str
    nbytes: int
    num_predicted: int
    """Validation samples that were predicted for the page."""
    num_compared: int
    """Validation views whose maps were compared with the teacher's."""
    notes: tuple[str, ...]
    """What is not on the page, and why."""
    seconds: float


def report(config: ReportConfig) -> ReportSummary:
    """Write the report of a finished run.

    Validation data that were asked for must fit the run. Those of the run itself may be gone: then the page says so.

    Raises:
        AtcacheError: there is no finished run, or the data do not fit it.
    """
    start_s = time.monotonic()
    run = read_finished_run(config.run)
    places = places_to_look_at(config, run)
    device = resolve_device(config.device)
    notes: list[str] = []
    seen = Seen(predictions=None, maps=None, classes=ClassNames(run.record.classes or ()))
    try:
        seen = _look(config, run, places, device, notes)
    except AtcacheError as error:
        if config.val_cache is not None or config.val_data is not None:
            raise
        notes.append(f"The validation data of this run could not be looked at: {error}")
    page = write_page(
        run,
        seen,
        notes=notes,
        commands=commands_to_repeat(run, places),
        environment=environment(device, run),
    )
    data = page.encode()
    make_folder(config.file.absolute().parent)
    write_file(config.file, data)
    return ReportSummary(
        out=str(config.file),
        nbytes=len(data),
        num_predicted=0 if seen.predictions is None else len(seen.predictions.label_N),
        num_compared=0 if seen.maps is None or seen.maps.agreement is None else seen.maps.agreement.num_views,
        notes=tuple(notes),
        seconds=time.monotonic() - start_s,
    )


def _look(
    config: ReportConfig, run: FinishedRun, places: ValidationPlaces, device: torch.device, notes: list[str]
) -> Seen:
    """What the student does on validation samples; says in `notes` what could not be seen."""
    classes = ClassNames(run.record.classes or (), f"the run {run.folder}")
    if not places:
        notes.append(
            "This run has no validation data, so there are no predictions and maps. Give some: atcache report RUN "
            "--val-cache CACHE."
        )
        return Seen(predictions=None, maps=None, classes=classes)
    readers = open_caches(places.caches)
    dtype = resolve_precision(config.precision, device)
    # What a new model draws from torch's global generator must not disturb the caller's.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        student, record = load_run(run.folder, device)
    student.module.eval()
    for reader in readers:
        check_views_fit(student, reader)
    data: ValidationSet | None = None
    if student.num_classes and (readers or record.mode != "copy"):
        data = open_validation(
            readers=readers,
            data=places.data,
            students=[student],
            teacher=record.teacher if record.mode == "copy" else None,
            live_teacher=None,
            batch_size=1,
            workers=0,
            device=device,
            label_key=None if readers else places.label_key,
            known=(classes,),
        )
        classes = data.classes
    elif student.num_classes:
        notes.append(
            "A student that copies needs the teacher's maps to predict: give a validation cache, --val-cache, to see "
            "predictions."
        )
    predictions: Predictions | None = None
    if data is not None and config.samples:
        predictions = predict(student, data, device, dtype, config.samples)
    maps: Maps | None = None
    # The run may have been validated on another teacher's cache. One that is asked for now must fit.
    may_differ = notes if config.val_cache is None else None
    if config.map_samples and (viewed := _viewed(student, run, readers, places, data, device, may_differ)) is not None:
        maps = look_at_maps(student, viewed, device, dtype, config.map_samples)
        if maps is None and record.mode != "copy":
            notes.append("The maps of this student cannot be seen: its attention is not one softmax over all tokens.")
    return Seen(predictions=predictions, maps=maps, classes=classes)


def _viewed(
    student: Student,
    run: FinishedRun,
    readers: tuple[CacheReader, ...],
    places: ValidationPlaces,
    data: ValidationSet | None,
    device: torch.device,
    notes: list[str] | None,
) -> Viewed | None:
    """The views whose maps are looked at, with the teacher's maps where there are any; None if there are no views.

    Caches of other maps than the student's are said in `notes`; without notes, they are refused.
    """
    if not readers:
        if data is None:
            return None
        return Viewed(
            views=data.views, label_S=data.label_S, sample_S=data.sample_S, indexes=data.indexes, teacher=None
        )
    teacher = None
    if student.pairing is not None and run.record.teacher is not None:
        try:
            for reader in readers:
                cached = CacheRecord.of(reader).teacher_record
                check_teacher(run.record.teacher, cached, student.pairing, reader.path)
            teacher = CacheTeacher(readers, [student.pairing], device)
        except CacheMismatchError as error:
            if run.record.mode == "copy" or notes is None:
                raise
            notes.append(f"The maps were not compared with the teacher's: {error}")
    views, label_S, sample_S = open_joined_views(
        readers,
        places.data,
        code_layers=None if teacher is None else teacher.code_layers,
        keep_nbytes=0,
        labels="optional",
    )
    return Viewed(
        views=views,
        label_S=label_S,
        sample_S=sample_S,
        indexes=[reader.samples for reader in readers],
        teacher=teacher,
        tokens=None if teacher is None or run.record.teacher is None else run.record.teacher.geometry.tokens,
    )
