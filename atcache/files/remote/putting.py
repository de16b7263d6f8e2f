"""Stores files on an object store: whole, on conditions, and again for a while if the server fails.

A server may obey a request whose answer is lost. So an object that a repeated request finds there already may be its
own: callers look at what it is before they believe that it is another writer's.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from atcache.errors import NotWritableError, RemoteError
from atcache.files.location import Url
from atcache.files.remote.fetcher import DeniedError, Meta, delete_once, put_once

Result = TypeVar("Result")

PATIENCE_S = 180.0
"""How long a failing request is repeated, in addition to what obstore itself repeats."""
_LONG_TRY_S = 60.0
"""What a try lasts beyond this is time that data took, not time that a failing server was asked."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 15.0
# 408 is a timeout, 409 another writer at the same moment, 429 too many requests: these pass.
_IS_FINAL = re.compile(r"status code: 4(?!08|09|29)\d\d")


class Put(NamedTuple):
    """What became of a file that was to be stored."""

    outcome: str
    """"stored"; "exists" or "changed" if there is an object already, or not the one that was to be replaced; or
    "unsupported" if the store knows no such condition."""
    version: str = ""
    """The entity tag of what was stored; empty if it was not, or if the store gives none."""


def put_file(
    url: Url, file: Path, *, create: bool = False, replace: Meta | None = None, patience_s: float | None = None
) -> Put:
    """Store a local file whole.

    Args:
        url: where.
        file: a file of this machine, which must not change meanwhile.
        create: store it only if there is nothing yet.
        replace: store it only in place of the object of which the store said this.
        patience_s: how long it is tried again if the server fails; `PATIENCE_S` if None.

    Raises:
        NotWritableError: there is no such bucket, access is refused, or the server fails for minutes.
    """
    mode: str | dict[str, str] = "create" if create else "overwrite"
    if replace is not None:
        mode = {"e_tag": replace.version, **({"version": replace.generation} if replace.generation else {})}
    header = patiently(lambda: _judged(url, put_once(url, file, mode)), patience_s)
    return Put(header["outcome"], header.get("version", ""))


def delete_file(url: Url) -> None:
    """Delete an object, if it is there.

    Raises:
        NotWritableError: as `put_file`.
    """
    patiently(lambda: _judged(url, delete_once(url)))


def patiently(request: Callable[[], Result], patience_s: float | None = None) -> Result:
    """What a request returns, which is repeated while the server fails.

    Raises:
        NotWritableError: access is refused, or the server fails for minutes.
    """
    stop_s, pause_s = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s), _FIRST_PAUSE_S
    while True:
        begin_s = time.monotonic()
        try:
            return request()
        except DeniedError as error:
            raise NotWritableError(
                f"{error} They must allow to list, read, put and delete objects there. Without the right to list (on "
                "Amazon's S3, s3:ListBucket), the server says the same of objects that are not there."
            ) from error
        except RemoteError as error:
            # A large upload that is dropped after minutes has not used up the patience with a server that fails.
            stop_s += max(0.0, time.monotonic() - begin_s - _LONG_TRY_S)
            if time.monotonic() > stop_s:
                raise NotWritableError(
                    f"{error} What was stored before is valid. When the server answers again, type the same command "
                    "to continue."
                ) from error
        # At random, so that the processes of a build do not come back all at once to a server that was overloaded.
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _judged(url: Url, header: dict[str, Any]) -> dict[str, Any]:
    """The answer to a put or delete that was obeyed, or that met a condition.

    Raises:
        NotWritableError: it would be refused again.
        RemoteError: the server has failed, and may obey the next time.
    """
    outcome, reason = header["outcome"], header.get("reason") or "the server does not answer"
    if outcome == "missing":
        raise NotWritableError(
            f"{url} cannot be written: there is no bucket {url.root}. Make it, or give another --out."
        )
    if outcome == "denied":
        raise NotWritableError(
            f"{url} cannot be written: the server refuses access ({reason}). Give credentials that may list, read, put "
            "and delete objects there, in the environment variables of the store."
        )
    if outcome == "no ranges" or (outcome == "failed" and "status code: 501" in reason):
        return {"outcome": "unsupported"}
    if outcome == "failed" and _IS_FINAL.search(reason):
        raise NotWritableError(f"{url} cannot be written: {reason}. Check the settings of the store.")
    if outcome == "failed":
        raise RemoteError(f"{url} cannot be written: {reason}.")
    return header
