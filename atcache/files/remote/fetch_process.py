"""The process that talks to servers: it runs obstore for one parent, over a socket, until the parent ends.

obstore's threads do not survive a fork, so a forked data loader would wait without end. This process is never forked.
The file is run as a script, not imported. It imports nothing from atcache, so that it starts quickly.

A request is a line of JSON. An answer is a line of JSON, followed by `nbytes` bytes.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from threading import Lock
from typing import Any, cast

import obstore
from obstore.exceptions import NotSupportedError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

NUM_THREADS = 24
_RETRIES: Any = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}

_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (FileNotFoundError, "missing"),
    (PreconditionError, "changed"),
    (NotSupportedError, "no ranges"),
    (PermissionDeniedError, "denied"),
    (UnauthenticatedError, "denied"),
)


@cache
def _store(root: str) -> Any:  # noqa: ANN401 - one of obstore's store classes
    scheme, _, host = root.partition("://")
    if scheme in ("http", "https"):
        options: Any = {"connect_timeout": "10s", "timeout": "120s", "allow_http": scheme == "http"}
        return HTTPStore.from_url(root, client_options=options, retry_config=_RETRIES)
    # Each store reads region, endpoint, credentials and timeouts from its own environment variables. Client options
    # given here would override them.
    store = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    return store(host, retry_config=_RETRIES)


class _ChangedError(Exception):
    pass


def _version(meta: Any) -> str:  # noqa: ANN401 - obstore's ObjectMeta
    return meta["e_tag"] or meta["last_modified"].isoformat()


def _head(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    meta = obstore.head(_store(request["root"]), request["key"])
    return {"size": meta["size"], "version": _version(meta)}, b""


def _get(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A range of a file, which must still have the version it had when it was opened."""
    options: dict[str, Any] = {"range": (request["start"], request["stop"])}
    if request["version"].startswith('"'):  # a weak entity tag never matches
        options["if_match"] = request["version"]
    result = obstore.get(_store(request["root"]), request["key"], options=cast("Any", options))
    # Some servers ignore `If-Match`, so the answer is checked too.
    if (result.meta["size"], _version(result.meta)) != (request["size"], request["version"]):
        raise _ChangedError
    return {}, result.bytes().to_bytes()


def _read(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    result = obstore.get(_store(request["root"]), request["key"])
    if result.meta["size"] > request["limit"]:
        raise ValueError(f"it has {result.meta['size']} bytes, expected at most {request['limit']}")
    return {}, result.bytes().to_bytes()


def _list(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    found = obstore.list(_store(request["root"]), request["key"] or None, chunk_size=1000)
    names = [meta["path"] for page in found for meta in page]
    return {}, json.dumps(names).encode()


_WORK: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]] = {
    "head": _head,
    "get": _get,
    "read": _read,
    "list": _list,
}


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        return _WORK[request["do"]](request)
    except _ChangedError:
        return {"error": "changed", "reason": ""}, b""
    except Exception as error:  # whatever obstore raises, the parent reports it
        kind = next((kind for known, kind in _KINDS if isinstance(error, known)), "failed")
        return {"error": kind, "reason": _first_sentence(str(error))}, b""


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
    with parent.makefile("rb") as requests:
        for line in requests:
            pool.submit(serve, json.loads(line))
    os._exit(0)  # nobody waits for what is still being fetched


if __name__ == "__main__":
    main(int(sys.argv[1]))
