"""Does a cache pay? Arithmetic on speeds and sizes, whether measured or assumed. Pure.

    build  = samples x views x slowest of (teacher + encoding, loading images, compressing, writing)
    cached = samples x slowest of (student's step, loading images, reading)      one epoch from the cache
    live   = samples x slowest of (student's step + teacher, loading images)     one epoch with the teacher running
    the cache has paid for itself after build / (live - cached) epochs

Stages overlap, so the slowest one decides. If the models run on the processors that also load and compress, these take
turns and are added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from atcache.files.sizes import size_text

Verdict = Literal["pays", "too late", "slower", "does not fit"]
"""`too late`: a cache pays only after more epochs than are planned. `slower`: it never pays, since it saves no time."""

DISK = "the disk"
UNLIMITED = float("inf")
"""A speed that is not measured yet."""
# A cache whose total time is within this factor of the best is as good; the smallest of these is taken.
_AS_GOOD = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """How often the teacher's attention would be used."""

    num_samples: int
    num_views: int
    """Views of each sample that are cached; an epoch uses one of them."""
    epochs: float
    """Epochs of one training run."""
    runs: int
    replays_images: bool = True
    """Training from the cache decodes and augments images again; False where the cache stores pixels."""

    @property
    def all_epochs(self) -> float:
        """Epochs of all runs together."""
        return self.epochs * self.runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Speeds that do not depend on the codec. None means not known, and is not counted as a limit."""

    teacher_img_per_s: float
    student_img_per_s: float
    """Training steps with the teacher's factors already in memory, and nothing to decode."""
    load_img_per_s: float | None
    """Images read, decoded and augmented, by all workers together."""
    write_nbytes_per_s: float
    free_nbytes: int | None
    """Space for the cache; None if there is no limit, as on an object store."""
    shares_processors: bool = False
    """Whether the models run on the processors that also load images and compress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecCost:
    """What one codec setting costs. None means not known; such a speed is not counted as a limit."""

    codec: str | None
    """None if only its size is known."""
    nbytes_per_view: int
    read_nbytes_per_s: float
    """Speed of the disk when each read is one view."""
    student_img_per_s: float
    """Training steps that decode the cache's codes."""
    encode_img_per_s: float | None = None
    """On the teacher's device."""
    compress_img_per_s: float | None = None
    """By all threads together."""
    unpack_img_per_s: float | None = None
    """Decompressed by all workers together, stored pixels included."""
    decode_operations: float | None = None
    """Multiply-adds that decoding a view takes, as a share of the teacher's forward pass; None if next to none."""
    decode_seconds: float | None = None
    """Time that decoding a view takes, as a share of the teacher's forward pass."""
    state_nbytes: int = 0
    """Bytes of the codec's fitted arrays, stored once for all views."""
    map_nbytes_per_view: int | None = None
    """Bytes that the same maps take as float16."""
    row_kl_nats: float | None = None
    """Mean KL(A || decoded A) of a row."""
    injected_error: float | None = None
    """Relative error of the teacher's features when it attends with decoded maps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assessment:
    """Size, times and verdict of a cache with one codec setting."""

    cost: CodecCost
    verdict: Verdict
    total_nbytes: int
    build_s: float
    build_limit: str
    """What building waits for."""
    epoch_s: float
    """One epoch from the cache."""
    epoch_limit: str
    """What training from the cache waits for."""
    needed_nbytes_per_s: float
    """What the student would read if nothing held it up."""
    payback_epochs: float | None
    """Epochs after which the build is repaid; None for never."""
    total_s: float
    """The build and all epochs of all runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Whether to build a cache, and with which codec."""

    cache: bool
    codec: str | None
    """The setting to take; None for no cache."""
    live_epoch_s: float
    live_limit: str
    """What training with a live teacher waits for."""
    live_total_s: float
    sentence: str
    """The answer in plain words, with its numbers."""


def live_epoch(workload: Workload, machine: Machine) -> tuple[float, str]:
    """Seconds of one epoch with the teacher running in every step, and what it waits for."""
    seconds, limit = _slowest(
        {
            "teacher and student": 1 / machine.teacher_img_per_s + 1 / machine.student_img_per_s,
            "loading images": _seconds(machine.load_img_per_s),
        },
        shares_processors=machine.shares_processors,
    )
    return workload.num_samples * seconds, limit


def assess(workload: Workload, machine: Machine, cost: CodecCost) -> Assessment:
    """Size, times and verdict of a cache with one codec setting."""
    num_views = workload.num_samples * workload.num_views
    view_s, build_limit = _slowest(
        {
            "teacher and encoding": 1 / machine.teacher_img_per_s + _seconds(cost.encode_img_per_s),
            "loading images": _seconds(machine.load_img_per_s),
            "compressing": _seconds(cost.compress_img_per_s),
            DISK: cost.nbytes_per_view / machine.write_nbytes_per_s,
        },
        shares_processors=machine.shares_processors,
    )
    replay_s = _seconds(machine.load_img_per_s) if workload.replays_images else 0.0
    sample_s, epoch_limit = _slowest(
        {
            "the student": 1 / cost.student_img_per_s,
            "loading images": replay_s + _seconds(cost.unpack_img_per_s),
            DISK: cost.nbytes_per_view / cost.read_nbytes_per_s,
        },
        shares_processors=machine.shares_processors,
    )
    total_nbytes, build_s = cost.state_nbytes + cost.nbytes_per_view * num_views, view_s * num_views
    epoch_s = sample_s * workload.num_samples
    saved_s = live_epoch(workload, machine)[0] - epoch_s
    payback_epochs = build_s / saved_s if saved_s > 0 else None
    verdict: Verdict = "pays"
    if machine.free_nbytes is not None and total_nbytes > machine.free_nbytes:
        verdict = "does not fit"
    elif payback_epochs is None:
        verdict = "slower"
    elif payback_epochs > workload.all_epochs:
        verdict = "too late"
    return Assessment(
        cost=cost,
        verdict=verdict,
        total_nbytes=total_nbytes,
        build_s=build_s,
        build_limit=build_limit,
        epoch_s=epoch_s,
        epoch_limit=epoch_limit,
        needed_nbytes_per_s=cost.nbytes_per_view * cost.student_img_per_s,
        payback_epochs=payback_epochs,
        total_s=build_s + workload.all_epochs * epoch_s,
    )


def decide(workload: Workload, machine: Machine, assessments: Sequence[Assessment]) -> Decision:
    """The answer for the best of some codec settings.

    Args:
        workload: as for `assess`.
        machine: as for `assess`.
        assessments: one for each setting, at least one.
    """
    live_epoch_s, live_limit = live_epoch(workload, machine)
    paying = [one for one in assessments if one.verdict == "pays"]
    if paying:
        best_s = min(one.total_s for one in paying)
        best = min((one for one in paying if one.total_s <= _AS_GOOD * best_s), key=lambda one: one.total_nbytes)
        sentence = _say_yes(best, workload, live_epoch_s)
    else:
        # The one that came closest explains the answer.
        nearest: tuple[Verdict, ...] = ("too late", "slower", "does not fit")
        best = min(assessments, key=lambda one: (nearest.index(one.verdict), one.total_s))
        sentence = f"Do not cache: run live. {_say_why_not(best, workload, machine, live_epoch_s)}"
    return Decision(
        cache=bool(paying),
        codec=best.cost.codec if paying else None,
        live_epoch_s=live_epoch_s,
        live_limit=live_limit,
        live_total_s=workload.all_epochs * live_epoch_s,
        sentence=sentence,
    )


def _seconds(per_s: float | None) -> float:
    return 0.0 if per_s is None else 1 / per_s


def _slowest(stages: Mapping[str, float], *, shares_processors: bool) -> tuple[float, str]:
    """Seconds per view, and the stage that decides them."""
    if not shares_processors:
        limit = max(stages, key=lambda name: stages[name])
        return stages[limit], limit
    computing = {name: seconds for name, seconds in stages.items() if name != DISK}
    computing_s, disk_s = sum(computing.values()), stages.get(DISK, 0.0)
    if disk_s > computing_s:
        return disk_s, DISK
    return computing_s, max(computing, key=lambda name: computing[name])


def _say_yes(best: Assessment, workload: Workload, live_epoch_s: float) -> str:
    assert best.payback_epochs is not None, "what pays has paid at some point"
    return (
        f"Cache, {_with(best.cost.codec)}: one epoch takes {duration(best.epoch_s)} from the cache and "
        f"{duration(live_epoch_s)} with a live teacher. The build takes {duration(best.build_s)} and "
        f"{size_text(best.total_nbytes)}; it has paid for itself after {_epochs(best.payback_epochs, workload)}. In "
        f"all, {duration(best.total_s)} instead of {duration(workload.all_epochs * live_epoch_s)}."
    )


def _say_why_not(best: Assessment, workload: Workload, machine: Machine, live_epoch_s: float) -> str:
    setting = _with(best.cost.codec)
    setting = setting[0].upper() + setting[1:]
    if best.verdict == "does not fit" and machine.free_nbytes is not None:
        needed, free = size_text(best.total_nbytes), size_text(machine.free_nbytes)
        return f"{setting} the cache takes {needed}, but only {free} are free."
    both = (
        f"{setting} one epoch takes {duration(best.epoch_s)} from the cache, where {best.epoch_limit} "
        f"{'are' if best.epoch_limit.endswith('s') else 'is'} the limit, and {duration(live_epoch_s)} with a live "
        "teacher"
    )
    if best.payback_epochs is None:
        return f"{both}: there is nothing to save."
    return (
        f"{both}; the build takes {duration(best.build_s)} and would have paid for itself only after "
        f"{_epochs(best.payback_epochs, workload)}, but only {number(workload.all_epochs)} are planned."
    )


def _with(codec: str | None) -> str:
    return "at the assumed size" if codec is None else f"with codec {codec}"


def _epochs(epochs: float, workload: Workload) -> str:
    text = f"{number(epochs)} epochs"
    if epochs > workload.epochs:
        text += f" ({number(epochs / workload.epochs)} runs of {number(workload.epochs)} epochs)"
    return text


def number(value: float) -> str:
    """A number with about three digits, never as a power of ten.

    >>> number(0.00001234), number(12.345), number(999.9), number(98765.4)
    ('0.0000123', '12.3', '1000', '98,765')
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return format(Decimal(f"{value:.3g}"), "f")


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use.

    >>> duration(0.0123), duration(90), duration(5400), duration(259_200)
    ('0.0123 s', '90 s', '90 min', '72 h')
    """
    for unit, factor, limit in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 864_000.0)):
        if seconds < limit:
            return f"{number(seconds / factor)} {unit}"
    return f"{number(seconds / 86_400)} days"
