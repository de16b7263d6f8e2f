"""Sizes as people read them."""

from __future__ import annotations


def size_text(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold, with three digits.

    >>> size_text(750), size_text(29_807_616), size_text(3.8e13)
    ('750 bytes', '29.8 MB', '38 TB')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * factor:  # 999,600 bytes are 1 MB: no number has four digits, except of TB
            value = nbytes / factor
            return f"{value:,.0f} {unit}" if value >= 999.5 else f"{value:.3g} {unit}"
    return f"{nbytes:.0f} byte{'' if round(nbytes) == 1 else 's'}"
