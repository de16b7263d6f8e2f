"""The `info` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import atcache
from atcache.attention.indices import format_indices
from atcache.files.location import Location
from atcache.files.sizes import size_text

from ..pipelines.pages.plain import plain
from . import options
from .paths import LOCATION

if TYPE_CHECKING:
    from atcache.store.reader import CacheReader

_MAX_TASKS_LOOKED_AT = 100
"""Of a cache with more tasks, or on a server, no task's statuses are read: each is a file of its own."""
_OTHERS = "other reasons"


@click.command()
@click.argument("cache", type=LOCATION)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one line of JSON, not as text.")
def info(cache: Location, as_json: bool) -> None:
    """Show what a cache holds, and what is missing.

    Reads only metadata and small tables, so it is fast for a cache of any size. A cache that is still being built can
    be shown too.

    Example:

    \b
        atcache info in1k.zarr
        atcache info https://data.example.org/in1k.zarr --json
    """
    opened = atcache.open(cache)
    about: dict[str, Any] = {**opened.describe(), "calibration": opened.record.calibration.to_json()}
    bad = _count_bad(opened.reader, about["num_bad"]) if about["num_bad"] else {}
    if as_json:
        options.print_json({**about, "bad": bad})
        return
    for name, value in _lines(about, bad):
        click.echo(f"{name:<10} {plain(value)}")
    for line in _card(about):
        click.echo(line)


def _count_bad(reader: CacheReader, num_bad: int) -> dict[str, int]:
    """Views that are not stored, by reason; in a large cache by what the sample table says, and the rest together."""
    import numpy as np

    from atcache.store.layout import Status, describe_status
    from atcache.store.tables import read_array

    def by_reason(counts_N: np.ndarray) -> dict[str, int]:
        reasons = [status for status in np.flatnonzero(counts_N).tolist() if Status.STORED < status < Status.NO_SAMPLE]
        return {describe_status(status): int(counts_N[status]) for status in reasons}

    layout = reader.layout
    if not reader.is_remote and layout.num_tasks <= _MAX_TASKS_LOOKED_AT:
        return by_reason(np.bincount(reader.status_VS.ravel()))
    problem_S = read_array(reader.path, f"{layout.samples_group}/problem")
    if problem_S.shape != (layout.num_samples,) or problem_S.dtype != np.uint8:
        return {_OTHERS: num_bad}  # `atcache verify` says what is wrong with the table
    # How many views of each block are done: all of them, unless the build was stopped.
    num_done_B = np.full(layout.num_blocks, layout.num_views)
    for task in reader.missing_tasks():
        num_done_B[task.block] -= 1
    num_done_S = num_done_B[np.arange(layout.num_samples) // layout.samples_per_shard]
    bad = by_reason(np.bincount(problem_S, weights=num_done_S))
    num_others = num_bad - sum(bad.values())
    if num_others < 0:
        return {_OTHERS: num_bad}
    return {**bad, **({_OTHERS: num_others} if num_others else {})}


def _lines(about: dict[str, Any], bad: dict[str, int]) -> list[tuple[str, str]]:
    teacher, views, codec = _part(about, "teacher"), _part(about, "views"), _part(about, "codec")
    policy = _part(views, "policy")
    settings = ", ".join(f"{name} {value}" for name, value in codec.items() if name != "name" and value is not None)
    pixels = "stored" if views.get("pixels") == "store" else "replayed from the tars"
    size = f"{policy.get('image_height')} x {policy.get('image_width')} pixels"
    layers, heads = about["layers"], about["heads"]
    lines = [
        ("cache", f"{about['path']} (format {about['format']})"),
        ("teacher", f"{teacher.get('name')}, weights {str(teacher.get('weights_sha256'))[:12]}"),
        *([("trained", _trained(trained))] if (trained := _part(teacher, "trained")) else []),
        ("licence", str(teacher.get("licence") or "not known: see where the teacher's weights come from")),
        ("samples", f"{about['num_samples']} x {_count(about['num_views'], 'view')}"),
        ("views", f"{policy.get('name')}{_mixing(policy)}, seed {policy.get('seed')}, {size}, {pixels}"),
        (
            "attention",
            f"{_count(len(layers), 'layer')} ({format_indices(layers)}) x "
            f"{_count(len(heads), 'head')} ({format_indices(heads)}) "
            f"x {options.name_tokens(about['num_tokens'], about['num_queries'])}"
            f"{', with v' if about['stores_v'] else ''}{', with x' if about['stores_x'] else ''}",
        ),
        ("codec", str(codec.get("name")) + (f" ({settings})" if settings else "")),
    ]
    if about["num_stored"]:
        ratio = about["times_smaller_than_float16_maps"]
        codes = "" if ratio is None else f"; codes are {options.compare_sizes(ratio)} than float16 maps"
        lines.append(("size", f"{size_text(about['nbytes'])}, {about['nbytes_per_view']} bytes a view{codes}"))
    calibration = _part(about, "calibration")
    if "row_kl_nats" in calibration and "injected_error" in calibration:
        lines.append(("held back", _held_back(calibration, codec)))
    if decode_operations := calibration.get("decode_operations"):
        lines.append(("decoding", f"q and k of a view take {decode_operations:.0%} of the teacher's operations"))
    row_kl = about["quality"].get("row_kl_nats")
    if row_kl:
        lines.append(("row KL", f"{row_kl['mean']:.2g} nats on average, {row_kl['max']:.2g} at most"))
    for name in ("v", "x"):
        if error := about["quality"].get(f"{name}_error"):
            lines.append((name, f"off by {error['mean']:.2g} on average, {error['max']:.2g} at most"))
    lines.append(("state", _state(about)))
    if growth := about["growth"]:
        lines.append(("growing", _growing(growth)))
    return lines + ([("bad", _bad(bad))] if bad else [])


def _part(about: dict[str, Any], name: str) -> dict[str, Any]:
    """An object that `atcache build` writes; empty in a cache from elsewhere that has none."""
    return about.get(name) or {}


def _trained(trained: dict[str, Any]) -> str:
    """Which training made the teacher's weights, of a cache of a run's student."""
    num_classes, teacher = trained["num_classes"], trained["teacher"]
    labels = f"on labels of {num_classes} classes" if num_classes else "without labels"
    given = "" if teacher is None else f" by {teacher}, weights {str(trained['teacher_weights_sha256'])[:12]},"
    initial = trained["initial_weights_sha256"]
    begun = "" if initial is None else f" from weights {initial[:12]}"
    return f"{trained['mode']}{given}{begun} {labels}, by the run {trained['run']}"


def _held_back(calibration: dict[str, Any], codec: dict[str, Any]) -> str:
    """Fidelity as measured before the build, and its target."""
    target_kl = None if codec.get("target_nbytes") else codec.get("target_kl")
    target = f" (target {target_kl:.4g})" if target_kl else ""
    errors = {name: calibration.get(f"{name}_error") for name in ("v", "x")}
    off = "".join(f", {name} off by {error:.2g}" for name, error in errors.items() if error is not None)
    views = _count(calibration["num_held_back"], "view") if "num_held_back" in calibration else "a few views"
    return (
        f"row KL {calibration['row_kl_nats']:.2g} nats{target}, features off by {calibration['injected_error']:.2g} "
        f"with decoded maps{off}; on {views} before the build"
    )


def _card(about: dict[str, Any]) -> list[str]:
    """A table of what the codec does to each layer; empty where the build did not record it."""
    cards: list[dict[str, Any]] = _part(about, "calibration").get("layers") or []
    if not cards:
        return []
    rows = [
        f"{card['layer']:>5}  {card['nbytes']:>12.0f}  {card['row_kl_nats']:>12.2g}  {card['injected_error']:>16.2g}"
        for card in cards
    ]
    return ["", f"{'layer':>5}  {'bytes a view':>12}  {'row KL, nats':>12}  {'features off by':>16}", *rows]


def _mixing(policy: dict[str, Any]) -> str:
    """How views are decoded, corrupted and mixed; empty if as usual and not at all."""
    mixing = _part(policy, "mixing")
    names = {"mixup_alpha": "mixup", "cutmix_alpha": "CutMix"}
    alphas = [f"{name} {mixing[field]}" for field, name in names.items() if mixing.get(field)]
    prob = mixing.get("prob", 1.0)
    reduced = " decoded reduced" if policy.get("decoding") == "reduced" else ""
    corrupt = f" corrupted by {policy['corrupt']}" if policy.get("corrupt") else ""
    return (
        reduced
        + corrupt
        + (f" with {' and '.join(alphas)}" if alphas else "")
        + ("" if prob == 1 else f" in {prob:.4g} of the views")
    )


def _state(about: dict[str, Any]) -> str:
    if about["is_complete"]:
        return f"complete, {_count(about['num_stored'], 'view')} stored"
    missing = about["num_tasks"] - about["num_tasks_done"]
    return (
        f"incomplete: {missing} of {_count(about['num_tasks'], 'task')} missing, "
        f"{_count(about['num_stored'], 'view')} stored. Type the same `atcache build` or `atcache pull` command "
        "again to continue."
    )


def _growing(growth: dict[str, int]) -> str:
    missing = growth["num_tasks"] - growth["num_tasks_done"]
    what = f"{_count(missing, 'task')} missing" if missing else "all tasks done, the last step missing"
    return (
        f"to {growth['num_samples']} x {_count(growth['num_views'], 'view')}: {what}. Type "
        "the same `atcache build --grow` command again to continue."
    )


def _bad(bad: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
    return f"{_count(sum(bad.values()), 'view')} left out: {reasons}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
