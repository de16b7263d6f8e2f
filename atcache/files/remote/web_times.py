"""The times that web servers name: in headers, and in the queries of signed addresses."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qs, urlsplit

_UNKNOWN_LIFE_S = 300.0  # of a redirect that does not say when it ends


def parse_date(text: str) -> datetime | None:
    """The time in a header; None if it is none."""
    with suppress(ValueError):
        found = parsedate_to_datetime(text)
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return None


def expiry(url: str, cache_control: str) -> float:
    """When the address of a redirect ends, by the clock, a little early. Signed addresses say so in their query.

    Args:
        url: the address.
        cache_control: this header of the redirect.
    """
    now = time.time()
    query = {name.lower(): values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    ends: list[float] = []
    with suppress(ValueError):
        if query.get("expires", "").isdecimal():  # CloudFront, and old signatures of S3 and GCS
            ends.append(float(query["expires"]))
    for kind in ("amz", "goog"):
        with suppress(ValueError, KeyError, OverflowError):
            signed = datetime.strptime(query[f"x-{kind}-date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
            ends.append(signed.timestamp() + int(query[f"x-{kind}-expires"]))
    with suppress(ValueError, KeyError, OverflowError):  # Azure
        end = datetime.fromisoformat(query["se"])
        ends.append((end if end.tzinfo else end.replace(tzinfo=UTC)).timestamp())
    for rule in cache_control.split(","):
        name, _, seconds = rule.strip().partition("=")
        if name == "max-age" and seconds.isdecimal():
            ends.append(now + float(seconds))
    life = min(ends) - now if ends else _UNKNOWN_LIFE_S
    return now + life - min(30.0, max(0.0, life) / 10)
