"""Teachers by name, and finished training runs as teachers: `--teacher RUN`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from atcache.attention.blocks import find_blocks, token_layout
from atcache.attention.indices import format_indices
from atcache.choices import Mode
from atcache.errors import ConfigError
from atcache.files.location import expand_home
from atcache.teachers.devices import resolve_device, resolve_precision
from atcache.teachers.foreign.names import is_foreign
from atcache.teachers.foreign.own import OwnTeacher
from atcache.teachers.load import Teacher, load_teacher
from atcache.teachers.names import ALIASES, ModelName, parse_model_name, pretrained_config
from atcache.teachers.run import TeacherRun
from atcache.teachers.weight_sets import AFTER_BLOCKS
from atcache.teachers.weights import weights_sha256

from .run_files import RUN_FILE, WEIGHTS_FILE
from .run_record import RunFile, load_run, read_run


def run_folder_of(teacher: str | OwnTeacher) -> Path | None:
    """The folder that a teacher's name means, if it is that of a run; None for all other names.

    A name of timm or an alias is never a folder: `./NAME` means the folder.
    """
    if not isinstance(teacher, str) or is_foreign(teacher):
        return None
    folder = expand_home(Path(teacher))
    if not (folder / RUN_FILE).is_file():
        return None
    from timm.models import is_model

    return None if teacher in ALIASES or is_model(teacher.partition(".")[0]) else folder


def recorded_name(teacher: str | OwnTeacher) -> str:
    """The name under which a cache records a teacher: for a run's folder, the timm name of its student.

    Raises:
        ConfigError: the folder is not one of a run of `atcache train`.
    """
    folder = run_folder_of(teacher)
    return str(teacher) if folder is None else str(_student_name(read_run(folder)))


def load_named_teacher(teacher: str | OwnTeacher, weights: Path | None, device: torch.device) -> Teacher:
    """What `load_teacher` gives, or the student of a run whose folder is named.

    Raises:
        ConfigError: the run is not finished or damaged, copies attention, or `weights` are given too.
        AtcacheError: what `load_teacher` raises.
    """
    folder = run_folder_of(teacher)
    if folder is None:
        run = run_of_weights(weights)
        loaded = load_teacher(teacher, weights=weights, device=device)
        if run is None or weights is None:
            return loaded
        return replace(loaded, source=f"{weights.absolute().name}/{WEIGHTS_FILE}", trained=run.trained(weights))
    if weights is not None:
        raise ConfigError(f"teacher {folder}: a run comes with its weights. Leave out --weights {weights}.")
    return load_student(folder, device)


def run_teacher(teacher: str | OwnTeacher, weights: Path | None, *, device: str, precision: str) -> TeacherRun:
    """What a command's options name, ready to run.

    Raises:
        ConfigError: as `load_named_teacher`; or there is no such device or precision.
        AtcacheError: what `load_teacher` raises.
    """
    if run_folder_of(teacher) is None and run_of_weights(weights) is None:
        return TeacherRun.load(teacher, weights, device=device, precision=precision)
    place = resolve_device(device)
    loaded = load_named_teacher(teacher, weights, place)
    return TeacherRun(teacher=loaded, device=place, dtype=resolve_precision(precision, place))


def run_of_weights(weights: Path | None) -> RunFile | None:
    """The run whose folder is given as weights; None for files and all other folders.

    Raises:
        ConfigError: its student copies attention, so it has no weights for it.
    """
    if weights is None or not (weights / RUN_FILE).is_file():
        return None
    run = read_run(weights)
    check_has_own_attention(weights, run)
    return run


def load_student(folder: Path, device: torch.device) -> Teacher:
    """The student of a finished run as a teacher: in eval mode, with the weights that the run has saved.

    If the run kept a moving average of its weights, these are the average.

    Raises:
        ConfigError: the run is not finished or damaged, or it copies attention.
    """
    run = read_run(folder)
    check_has_own_attention(folder, run)
    name = _student_name(run)
    # Drawing initial weights, which are replaced, must not change the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        student, record = load_run(folder, device)
    return Teacher(
        model=student.model.requires_grad_(False),
        name=name,
        source=f"{folder.absolute().name}/{WEIGHTS_FILE}",
        weights_sha256=weights_sha256(student.model, without=AFTER_BLOCKS),
        licence=_licence(name, record.mode),
        input=student.input,
        tokens=token_layout(student.model),
        depth=len(find_blocks(student.model)),
        trained=run.trained(folder),
    )


def check_has_own_attention(folder: Path, run: RunFile) -> None:
    """Refuse a student that copies attention.

    Raises:
        ConfigError: it does; the message says where what it attends to can be seen.
    """
    if run.record.mode != "copy":
        return
    pairing = run.record.pairing
    blocks = "" if pairing is None else f" in its blocks {format_indices(pairing.student_layers)}"
    raise ConfigError(
        f"{folder} copies attention: what it attends to{blocks} is its teacher's, which the cache that it was trained "
        "from holds, and without that it cannot run. Look at that cache, or at a student of mode distill, finetune or "
        "scratch, which has attention of its own."
    )


def _licence(name: ModelName, mode: Mode) -> str | None:
    """The licence of a student's weights; None if it is not known.

    Only fine-tuned weights are made from the teacher's. Of others, their owner knows what they may be used for.
    """
    return pretrained_config(name.timm_name).get("license") if mode == "finetune" and "." in name.timm_name else None


def _student_name(run: RunFile) -> ModelName:
    # The student has the architecture of what is published there, but not the weights.
    return replace(parse_model_name(run.record.student), weights_at=None)
