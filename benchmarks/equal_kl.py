"""Codecs beside their rivals at the same KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from storage_ways import Measured

MAPS = "smallest compressor of maps"
"""The name under which all compressors of maps are one rival. One that stores factors is a rival by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualKl:
    """A codec, and a rival at the codec's KL."""

    codec: str
    row_kl_nats: float
    nbytes_per_view: float
    rival: str
    """`MAPS`, or the family of a rival that stores factors."""
    family: str | None
    """The rival's family that needs the fewest bytes; None if no family reaches so small a KL."""
    family_nbytes_per_view: float | None
    """Interpolated between the family's settings, so that the choice of measured settings does not matter."""
    setting: str | None
    """The rival's measured setting with the fewest bytes among those with at most the codec's KL."""
    setting_nbytes_per_view: float | None
    times_smaller: float | None
    """family_nbytes_per_view / nbytes_per_view."""


def equal_kls(rows: Sequence[Measured]) -> list[EqualKl]:
    """For each codec and each of its rivals, the bytes that the rival needs for the same mean KL."""
    rivals: dict[str, list[Measured]] = {}
    for row in rows:
        if row.kind != "codec":
            rivals.setdefault(MAPS if row.kind == "maps" else row.family, []).append(row)
    codecs = [row for row in rows if row.kind == "codec"]
    return [_beside(codec, rival, settings) for codec in codecs for rival, settings in rivals.items()]


def _beside(codec: Measured, rival: str, settings: Sequence[Measured]) -> EqualKl:
    families = {row.family: [other for other in settings if other.family == row.family] for row in settings}
    nbytes = {name: interpolated_nbytes(family, codec.row_kl_nats) for name, family in families.items()}
    reached = {name: value for name, value in nbytes.items() if value is not None}
    family = min(reached, key=lambda name: reached[name], default=None)
    close = [row for row in settings if row.row_kl_nats <= codec.row_kl_nats]
    setting = min(close, key=lambda row: row.nbytes_per_view, default=None)
    return EqualKl(
        codec=codec.name,
        row_kl_nats=codec.row_kl_nats,
        nbytes_per_view=codec.nbytes_per_view,
        rival=rival,
        family=family,
        family_nbytes_per_view=None if family is None else reached[family],
        setting=None if setting is None else setting.name,
        setting_nbytes_per_view=None if setting is None else setting.nbytes_per_view,
        times_smaller=None if family is None else reached[family] / codec.nbytes_per_view,
    )


def interpolated_nbytes(family: Sequence[Measured], row_kl_nats: float) -> float | None:
    """Fewest bytes of a family at a KL, interpolated on logarithmic axes; None if all its settings have a larger KL."""
    reached = [row for row in family if row.row_kl_nats <= row_kl_nats]
    if not reached:
        return None
    nbytes = min(row.nbytes_per_view for row in reached)
    beyond = [row for row in family if row.row_kl_nats > row_kl_nats]
    if beyond:
        low, high = max(reached, key=lambda row: row.row_kl_nats), min(beyond, key=lambda row: row.row_kl_nats)
        low_log, log, high_log = (math.log(max(kl, 1e-12)) for kl in (low.row_kl_nats, row_kl_nats, high.row_kl_nats))
        share = (log - low_log) / (high_log - low_log) if high_log > low_log else 0.0
        nbytes = min(nbytes, low.nbytes_per_view ** (1 - share) * high.nbytes_per_view**share)
    return nbytes


def equal_kl_table(equals: Sequence[EqualKl]) -> list[str]:
    """The lines of a markdown table, and for each rival that stores factors a line of its bytes over the codecs'."""
    lines = [
        "| codec | mean KL | bytes a view | rival | at this KL it is | its bytes a view | ratio |",
        "|---|--:|--:|---|---|--:|--:|",
    ]
    for equal in equals:
        beside = (
            f"{equal.family} | {equal.family_nbytes_per_view:,.0f} | {equal.times_smaller:.3g}x"
            if equal.family is not None
            else "not measured so close | | "
        )
        lines.append(
            f"| {equal.codec} | {equal.row_kl_nats:.2g} | {equal.nbytes_per_view:,.0f} | {equal.rival} | {beside} |"
        )
    for rival in dict.fromkeys(equal.rival for equal in equals if equal.rival != MAPS):
        found = [equal for equal in equals if equal.rival == rival and equal.times_smaller is not None]
        ratios = ", ".join(f"{equal.codec} (KL {equal.row_kl_nats:.2g}) {equal.times_smaller:.2f}x" for equal in found)
        lines += ["", f"{rival}'s bytes over a codec's at the same KL: {ratios or 'no KL in common'}."]
    return lines
