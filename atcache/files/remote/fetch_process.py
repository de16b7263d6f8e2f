"""The process that talks to servers: it runs obstore for one parent, over a socket, until the parent ends.

obstore's threads do not survive a fork, so a forked data loader would wait without end. This process is never forked.
The file is run as a script, not imported. It imports little, so that it starts quickly. Web servers are asked by
`web`, object stores by obstore.

A request is a line of JSON. An answer is a line of JSON, followed by `nbytes` bytes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, S3Store

sys.path.append(str(Path(__file__).parents[3]))  # if atcache is not installed: a script has no package

from atcache.files.remote.web import Found, Web, WebError

NUM_THREADS = 40
_MAX_RETRIES = 6

_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (FileNotFoundError, "missing"),
    (PreconditionError, "changed"),
    (NotSupportedError, "no ranges"),
    (PermissionDeniedError, "denied"),
    (UnauthenticatedError, "denied"),
)
_IS_DENIED = re.compile(r"status code: 40[13]\b")

_IS_WHOLE = "Received non-partial response"  # obstore's words for an answer without status 206
_one_whole_file = Lock()


@cache
def _web_at(root: str, authorization: str | None) -> Web | None:
    """The web server of a root: its address, and the headers that only this server gets. None for an object store."""
    headers = {} if authorization is None else {"Authorization": authorization}
    return Web(root, headers) if root.startswith(("http://", "https://")) else None


def _web(request: dict[str, Any]) -> Web | None:
    return _web_at(request["root"], request.get("authorization"))


@cache
def _store(root: str) -> Any:  # noqa: ANN401 - one of obstore's store classes
    scheme, _, host = root.partition("://")
    # Each store reads region, endpoint, credentials and timeouts from its own environment variables. Client options
    # given here would override them.
    store = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    return store(host, retry_config=_retries(1))


def _retries(minutes: int) -> Any:  # noqa: ANN401 - obstore's RetryConfig
    return {"max_retries": _MAX_RETRIES, "retry_timeout": timedelta(minutes=minutes)}


_ENVIRONMENT = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_SLOWEST_NBYTES_PER_S = 500_000


def _store_for(root: str, nbytes: int) -> Any:  # noqa: ANN401 - one of obstore's store classes
    """A store that gives a request time for so many bytes. By default one would end after 30 seconds."""
    scheme, _, host = root.partition("://")
    if f"{_ENVIRONMENT[scheme]}_TIMEOUT" in os.environ:
        return _store(root)
    return _patient_store(scheme, host, 1 + nbytes // (60 * _SLOWEST_NBYTES_PER_S))


@cache
def _patient_store(scheme: str, host: str, minutes: int) -> Any:  # noqa: ANN401 - one of obstore's store classes
    store: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    return store(host, config={"timeout": f"{60 * minutes}s"}, retry_config=_retries(minutes))


class _OnTheWay:
    """Counts the bytes that all present requests read together, because they share one connection to the network."""

    def __init__(self) -> None:
        self._lock, self._nbytes = Lock(), 0

    @contextmanager
    def adding(self, nbytes: int) -> Generator[int]:
        """A context of one request; gives the bytes of all."""
        with self._lock:
            self._nbytes += nbytes
            total = self._nbytes
        try:
            yield total
        finally:
            with self._lock:
                self._nbytes -= nbytes


_on_the_way = _OnTheWay()


class _ChangedError(Exception):
    pass


def _version(meta: Any) -> str:  # noqa: ANN401 - obstore's ObjectMeta
    return meta["e_tag"] or meta["last_modified"].isoformat()


def _head(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    if web := _web(request):
        found = web.head(request["key"])
        return {"size": found.size, "version": found.version, "modified_s": 0.0, "generation": ""}, b""
    meta = obstore.head(_store(request["root"]), request["key"])
    modified_s, generation = meta["last_modified"].timestamp(), meta["version"] or ""
    return {"size": meta["size"], "version": _version(meta), "modified_s": modified_s, "generation": generation}, b""


def _get(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A range of a file, which must still have the version it had when it was opened."""
    if web := _web(request):
        expected = Found(request["size"], request["version"])
        return {}, web.get(request["key"], request["start"], request["stop"], expected)
    options: dict[str, Any] = {}
    if request["stop"] - request["start"] < request["size"]:  # some servers answer a range of all bytes without one
        options["range"] = request["start"], request["stop"]
    if request["version"].startswith('"'):  # a weak entity tag never matches
        options["if_match"] = request["version"]
    with _on_the_way.adding(request["stop"] - request["start"]) as nbytes:
        try:
            return {}, _get_checked(request, options, nbytes).bytes().to_bytes()
        except GenericError as error:
            if "range" not in options or _IS_WHOLE not in str(error):
                raise
    return {}, _cut_from_whole(request)


def _get_checked(request: dict[str, Any], options: dict[str, Any], nbytes: int) -> Any:  # noqa: ANN401 - obstore's GetResult
    """The answer to a request that has time for so many bytes."""
    result = obstore.get(_store_for(request["root"], nbytes), request["key"], options=cast("Any", options))
    # Some servers ignore `If-Match`, so the answer is checked too.
    if (result.meta["size"], _version(result.meta)) != (request["size"], request["version"]):
        raise _ChangedError
    return result


def _cut_from_whole(request: dict[str, Any]) -> bytes:
    """A range of a file whose server has no answer for ranges that obstore takes, as `rclone serve s3`."""
    _tell_of_ranges(request["root"])
    start, stop = request["start"], request["stop"]
    found, at = bytearray(), 0
    with _one_whole_file:
        for piece in _get_checked(request, {}, request["stop"]).stream(min_chunk_size=2**20):
            found += memoryview(bytes(piece))[max(start - at, 0) : max(stop - at, 0)]
            at += len(piece)
            if at >= stop:
                break
    return bytes(found)


@cache
def _tell_of_ranges(root: str) -> None:
    print(
        f"NOTE: the server of {root} does not answer requests for parts of files as S3 does. Files are read from their "
        "beginning for each part, which is slow: copy the cache to a disk, or use another server.",
        file=sys.stderr,
    )


def _read(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    if web := _web(request):
        return {}, web.read(request["key"], request["limit"])
    store = _store_for(request["root"], 0)
    result = obstore.get(store, request["key"])
    if result.meta["size"] > request["limit"]:
        raise ValueError(f"it has {result.meta['size']} bytes, expected at most {request['limit']}")
    with _on_the_way.adding(result.meta["size"]) as nbytes:
        patient = _store_for(request["root"], nbytes)
        if patient is not store:  # only now is the size known; the bytes were not fetched yet
            result = obstore.get(patient, request["key"])
        return {}, result.bytes().to_bytes()


def _list(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    found = obstore.list(_store(request["root"]), request["key"] or None, chunk_size=1000)
    names = [meta["path"] for page in islice(found, request["num_pages"]) for meta in page]
    return {}, json.dumps(names).encode()


def _put(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Store a local file whole, in one request. What goes wrong is an answer: the parent decides what to do."""
    file, mode = Path(request["file"]), request["mode"]
    try:
        store = _store_for(request["root"], file.stat().st_size)
        result = obstore.put(store, request["key"], file, mode=mode, use_multipart=False)
    except AlreadyExistsError:
        return {"outcome": "exists"}, b""
    except Exception as error:
        header = _failure(error)
        # What was to be replaced is gone, or there is no such bucket; only the first can be told by asking for it.
        is_gone = isinstance(mode, dict) and header["outcome"] == "missing"
        return {"outcome": "changed"} if is_gone else header, b""
    return {"outcome": "stored", "version": result["e_tag"] or ""}, b""


def _delete(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        obstore.delete(_store(request["root"]), request["key"])
    except FileNotFoundError:
        pass
    except Exception as error:
        return _failure(error), b""
    return {"outcome": "deleted"}, b""


def _failure(error: Exception) -> dict[str, Any]:
    return {"outcome": _kind(error), "reason": _first_sentence(str(error))}


_WORK: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]] = {
    "head": _head,
    "get": _get,
    "read": _read,
    "list": _list,
    "put": _put,
    "delete": _delete,
}


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        return _WORK[request["do"]](request)
    except _ChangedError:
        return {"error": "changed", "reason": ""}, b""
    except WebError as error:
        return {"error": error.kind, "reason": str(error)}, b""
    except Exception as error:  # whatever obstore raises, the parent reports it
        return {"error": _kind(error), "reason": _first_sentence(str(error))}, b""


def _kind(error: Exception) -> str:
    # obstore has no class of its own for a listing that is refused.
    other = "denied" if _IS_DENIED.search(str(error)) else "failed"
    return next((kind for known, kind in _KINDS if isinstance(error, known)), other)


def _first_sentence(message: str) -> str:
    """The reason in obstore's message, without the retry counts, the server's HTML page and the debug structures."""
    sentence = " ".join(message.partition("\n\nDebug source")[0].partition("<")[0].split())
    return sentence.rpartition(" - ")[2][:300].rstrip(" :")


def main(descriptor: int) -> None:
    """Answer the parent's requests, several at a time, until the parent closes the socket or ends."""
    parent, sending = socket.socket(fileno=descriptor), Lock()

    def serve(request: dict[str, Any]) -> None:
        header, payload = _answer(request)
        line = json.dumps({**header, "id": request["id"], "nbytes": len(payload)}).encode() + b"\n"
        with sending:
            parent.sendall(line)
            parent.sendall(payload)

    pool = ThreadPoolExecutor(NUM_THREADS)
    # A parent that is killed may reset the connection instead of closing it.
    with suppress(ConnectionError), parent.makefile("rb") as requests:
        for line in requests:
            pool.submit(serve, json.loads(line))
    os._exit(0)  # nobody waits for what is still being fetched


if __name__ == "__main__":
    main(int(sys.argv[1]))
