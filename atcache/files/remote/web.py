"""Files on a web server, over HTTP/1.1 and the connections that it keeps open. Used in the fetch process only.

obstore's own HTTP store follows a redirect again for every range, and does not wait as long as `Retry-After` says. A
hub redirects each file to a signed address that expires, and refuses clients that ask too often. So here an address is
kept until it expires or is refused, and when a server asks for time, no thread of this process asks it again before.
"""

from __future__ import annotations

import random
import ssl
import sys
import time
from base64 import b64encode
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPSConnection, RemoteDisconnected
from threading import Lock
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from atcache.files.remote.web_times import expiry, parse_date

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
_MAX_FAILURES = 6
_MAX_WAIT_S = 60.0  # for one wait that a server asks for; it may ask again
_PATIENCE_S = 600.0  # for all such waits of one request
_SILENT_WAIT_S = 5.0
_TIMEOUT_S = 120.0
_MAX_IGNORED_NBYTES = 2**16  # of an answer that is not used; after a longer one the connection is closed
_NUM_LOCKS = 256
_MAX_TARGETS = 10_000  # of one address, so that a source of very many files takes no memory without bound
_EPOCH = datetime.fromtimestamp(0, UTC)


class WebError(Exception):
    """A file cannot be read: the kind is one of those that the parent has sentences for."""

    def __init__(self, kind: str, reason: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


class Found(NamedTuple):
    """What a server says about a file."""

    size: int
    version: str


class _Answer(NamedTuple):
    status: int
    reason: str
    headers: Message
    body: bytes


@dataclass(eq=False, slots=True)
class _Target:
    """Where a file's bytes are, after all redirects."""

    url: str
    until: float
    """When another one must be asked for, by the clock."""
    is_elsewhere: bool
    linked: Found | None
    """What the hub that redirects says of the file; None if it says nothing."""
    entity_tag: str | None = None
    """That of the first answer, if `linked` is known: a hub and the server of its bytes have different ones."""


class Web:
    """The files below one address. Threads may share it."""

    def __init__(self, base: str, headers: Mapping[str, str]) -> None:
        """Remember the address, without its last slash, and headers for it, which no other host is sent."""
        self._base = base
        self._headers = dict(headers)
        self._targets: dict[str, _Target] = {}
        self._locks = [Lock() for _ in range(_NUM_LOCKS)]
        self._redirects: bool | None = None  # whether it ever did; None before the first answer

    def head(self, key: str) -> Found:
        """Size and version of a file."""
        answer, target = self._ask("HEAD", key, {})
        if target.linked is not None:
            return target.linked
        if answer.status == 416:  # an empty file has no first byte
            return Found(_total(answer), _version(answer))
        self._check(answer)
        return Found(_total(answer), _version(answer))

    def get(self, key: str, start: int, stop: int, expected: Found) -> bytes:
        """The bytes [start, stop) of a file, which must still be the one expected."""
        wanted = {"Range": f"bytes={start}-{stop - 1}"}
        if expected.version.startswith('"'):  # a weak entity tag never matches
            wanted["If-Match"] = expected.version
        answer, target = self._ask("GET", key, wanted, limit=stop - start)
        if answer.status in (412, 416):
            raise WebError("changed")
        if answer.status == 200 and (start, stop) != (0, expected.size):
            raise WebError("no ranges")
        self._check(answer)
        entity_tag = answer.headers.get("ETag")
        if target.linked is None:
            found = Found(_total(answer), _version(answer))
        else:
            target.entity_tag = target.entity_tag or entity_tag
            found = target.linked if entity_tag == target.entity_tag else None
        # Some servers ignore `If-Match`, so what they answer is checked too.
        if found != expected or _total(answer) != expected.size:
            raise WebError("changed")
        if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise WebError("failed", f"its server sent {answer.headers.get('Content-Range')} for bytes from {start} on")
        return answer.body

    def read(self, key: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes."""
        answer, _ = self._ask("GET", key, {}, limit=limit)
        self._check(answer)
        return answer.body

    def _check(self, answer: _Answer) -> None:
        if answer.status in (404, 410):
            raise WebError("missing")
        if answer.status in (401, 403):
            raise WebError("denied", f"{answer.status} {answer.reason}")
        if answer.status not in (200, 206):
            raise WebError("failed", f"its server answered {answer.status} {answer.reason}".rstrip())

    def _ask(self, method: str, key: str, headers: dict[str, str], limit: int = 0) -> tuple[_Answer, _Target]:
        """The answer for a file, from where it was found before if that still holds."""
        known = self._known(key)
        if known is None and self._redirects is not False:
            # Others that want this file wait, and are then redirected already.
            with self._lock_of(key):
                known = self._known(key)
                if known is None:
                    return self._follow(method, key, headers, limit)
        if known is None or not known.is_elsewhere:
            return self._follow(method, key, headers, limit)
        if method == "HEAD" and known.linked is not None:
            known = None  # the hub is asked again: this is how a change is noticed
        else:
            answer, found = self._ask_again(known, method, key, headers, limit)
            if answer.status not in (401, 403, 404, 410, *_REDIRECTS):
                return answer, found
        with self._lock_of(key):
            with _lock:
                if known is not None and self._targets.get(key) is known:  # else another thread has just asked
                    del self._targets[key]
            newer = self._known(key) if known is not None else None
            if newer is None:
                return self._follow(method, key, headers, limit)
        return self._ask_again(newer, method, key, headers, limit)

    def _lock_of(self, key: str) -> Lock:
        """The lock of one who asks where a file is; it may be that of other files, too."""
        return self._locks[hash(key) % len(self._locks)]

    def _known(self, key: str) -> _Target | None:
        found = self._targets.get(key)
        return found if found is not None and time.time() < found.until else None

    def _send_to(self, target: _Target, method: str, headers: dict[str, str], limit: int) -> _Answer:
        if target.linked is not None:
            # The hub's entity tag means nothing to the server of the bytes.
            headers = {name: value for name, value in headers.items() if name != "If-Match"}
        if method == "HEAD":
            # An address that is signed for GET refuses HEAD.
            method, headers, limit = "GET", {**headers, "Range": "bytes=0-0"}, 1
        return _send(method, target.url, {**headers, **self._own_headers(target.url)}, limit)

    def _own_headers(self, url: str) -> dict[str, str]:
        return self._headers if _origin(url) == _origin(self._base) else {}

    def _follow(self, method: str, key: str, headers: dict[str, str], limit: int) -> tuple[_Answer, _Target]:
        """Ask at the file's own address, and where that redirects to."""
        url = f"{self._base}/{quote(key)}"
        target = _Target(url, float("inf"), is_elsewhere=False, linked=None)
        answer = _send(method, url, {**headers, **self._own_headers(url)}, limit)
        return self._follow_on(answer, target, method, key, headers, limit)

    def _ask_again(
        self, known: _Target, method: str, key: str, headers: dict[str, str], limit: int
    ) -> tuple[_Answer, _Target]:
        """Ask where the file was found before. A `HEAD` may have found only the first of several redirects."""
        return self._follow_on(self._send_to(known, method, headers, limit), known, method, key, headers, limit)

    def _follow_on(
        self, answer: _Answer, asked: _Target, method: str, key: str, headers: dict[str, str], limit: int
    ) -> tuple[_Answer, _Target]:
        """Go where an answer redirects to, if it does, and keep what was found there."""
        target, is_found = asked, answer.status in (200, 206)
        for _ in range(_MAX_REDIRECTS):
            if answer.status not in _REDIRECTS:
                break
            location = urljoin(target.url, answer.headers.get("Location", ""))
            scheme = urlsplit(location).scheme
            if scheme not in ("http", "https") or (scheme == "http" and target.url.startswith("https:")):
                raise WebError("failed", f"its server redirects to {location.partition('?')[0]!r}, which is not https")
            until = min(target.until, expiry(location, answer.headers.get("Cache-Control", "")))
            target = _Target(location, until, is_elsewhere=True, linked=target.linked or _linked(answer))
            if is_found := method == "HEAD" and target.linked is not None:
                break
            answer = self._send_to(target, method, headers, limit)
            is_found = answer.status in (200, 206)
        self._redirects = self._redirects or target.is_elsewhere
        if target.is_elsewhere and target is not asked and is_found:
            with _lock:
                self._targets[key] = target
                if len(self._targets) > _MAX_TARGETS:
                    del self._targets[next(iter(self._targets))]  # that of the file which was found first
        return answer, target


def _linked(answer: _Answer) -> Found | None:
    """What Hugging Face's hub says about a file that it redirects to."""
    size, version = answer.headers.get("X-Linked-Size", ""), answer.headers.get("X-Linked-ETag")
    return Found(int(size), version) if size.isdecimal() and version else None


def _version(answer: _Answer) -> str:
    """The entity tag, or the time of the last change, as obstore writes it."""
    changed = parse_date(answer.headers.get("Last-Modified", ""))
    return answer.headers.get("ETag") or (changed or _EPOCH).isoformat()


def _total(answer: _Answer) -> int:
    """The size of the whole file that this answer is about."""
    text = answer.headers.get("Content-Length") or ""
    if answer.status in (206, 416):
        text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if not text.isdecimal():
        raise WebError("failed", "its server does not say how large it is")
    return int(text)


def _origin(url: str) -> str:
    found = urlsplit(url)
    return f"{found.scheme}://{found.netloc}"


_not_before: dict[str, float] = {}
"""Until when a server wants to be left alone, by the monotonic clock."""
_idle: defaultdict[str, list[HTTPConnection]] = defaultdict(list)
"""Open connections that nobody uses."""
_lock = Lock()


def _send(method: str, url: str, headers: Mapping[str, str], limit: int) -> _Answer:
    """One answer, with a body of at most `limit` bytes. Tries again if the server fails, and waits if it asks for it.

    Raises:
        WebError: the server cannot be reached, sends too much, or has failed too often.
    """
    origin, patience_ends = _origin(url), time.monotonic() + _PATIENCE_S
    failures = num_waits = 0
    while True:
        while (wait_s := _not_before.get(origin, 0.0) - time.monotonic()) > 0:
            time.sleep(wait_s)
        asked_s = None
        try:
            answer = _once(method, url, headers, limit)
            if answer.status not in _TRY_AGAIN:
                return answer
            reason = f"its server answered {answer.status} {answer.reason}".rstrip()
            asked_s = _retry_after_s(answer)
        except (OSError, HTTPException) as error:
            reason = str(error) or type(error).__name__
        if asked_s is not None and time.monotonic() < patience_ends:
            # Some ask for no time at all, however often they refuse.
            _leave_alone(origin, max(asked_s, 0.05 * 2 ** min(num_waits, 8)), reason)
            num_waits += 1
            continue
        failures += 1
        if failures > _MAX_FAILURES:
            raise WebError("failed", reason)
        time.sleep(random.uniform(0.05, 0.1) * 2 ** (failures - 1))


def _retry_after_s(answer: _Answer) -> float | None:
    """How long the server asks to wait; None if it does not."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    date = parse_date(text)
    return None if date is None else max(0.0, date.timestamp() - time.time())


def _leave_alone(origin: str, asked_s: float, reason: str) -> None:
    """Let all threads wait until this server may be asked again, a little longer so that not all ask at once."""
    wait_s = min(asked_s, _MAX_WAIT_S)
    now = time.monotonic()
    with _lock:
        is_new = _not_before.get(origin, 0.0) < now
        _not_before[origin] = max(_not_before.get(origin, 0.0), now + wait_s + random.uniform(0.0, 0.1))
    if is_new and wait_s > _SILENT_WAIT_S:
        print(f"atcache: {origin}: {reason}, and asks to wait {asked_s:.0f} s. Waiting.", file=sys.stderr, flush=True)


def _once(method: str, url: str, headers: Mapping[str, str], limit: int) -> _Answer:
    """One try."""
    place = urlsplit(url)
    origin = _origin(url)
    proxy = _proxy(place.scheme, place.hostname or "")
    path = f"{place.path or '/'}{'?' + place.query if place.query else ''}"
    if proxy is not None and place.scheme == "http":
        path = url
        headers = {**headers, **_proxy_headers(proxy)}
    while True:
        with _lock:
            kept = _idle[origin].pop() if _idle[origin] else None
        connection = kept or _connect(place, proxy)
        try:
            connection.request(method, path, headers={"User-Agent": "atcache", **headers})
            answer = connection.getresponse()
        except (RemoteDisconnected, ConnectionError):
            connection.close()
            if kept is None:
                raise
            continue  # the server has closed it while nobody used it
        except BaseException:
            connection.close()
            raise
        break
    is_used = answer.status in (200, 206) and method != "HEAD"
    allowed = limit if is_used else _MAX_IGNORED_NBYTES
    is_reusable = False
    try:
        if is_used and (answer.length or 0) > allowed:
            # A server that ignores the range. Its headers say enough, and its body may be huge.
            if "Range" in headers and answer.status == 200:
                return _Answer(answer.status, answer.reason, answer.headers, b"")
            raise WebError("failed", f"its server sends {answer.length} bytes, expected at most {limit}")
        # Without a length, the body ends with its last chunk.
        body = answer.read() if answer.length is not None and answer.length <= allowed else answer.read(allowed + 1)
        if is_used and len(body) > allowed:
            raise WebError("failed", f"its server sends more than the {limit} bytes expected")
        is_reusable = answer.isclosed() and not answer.will_close
        return _Answer(answer.status, answer.reason, answer.headers, body)
    except HTTPException as error:
        raise ConnectionError(f"the connection ended within the body ({error})") from error
    finally:
        if is_reusable:
            with _lock:
                _idle[origin].append(connection)
        else:
            connection.close()


@cache
def _proxy(scheme: str, host: str) -> SplitResult | None:
    """The proxy that the environment names for a server."""
    named = getproxies().get(scheme)
    if not named or proxy_bypass(host):
        return None
    return urlsplit(named if "://" in named else f"http://{named}")


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(secret.encode()).decode()}"}


def _connect(place: SplitResult, proxy: SplitResult | None) -> HTTPConnection:
    host, port = place.hostname or "", place.port
    through = (proxy.hostname or "", proxy.port) if proxy is not None else (host, port)
    if place.scheme == "http":
        return HTTPConnection(*through, timeout=_TIMEOUT_S)
    connection = HTTPSConnection(*through, timeout=_TIMEOUT_S, context=_trusted())
    if proxy is not None:
        connection.set_tunnel(host, port, headers=_proxy_headers(proxy))
    return connection


@cache
def _trusted() -> ssl.SSLContext:
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if not (paths.cafile or paths.capath):  # a Python without the system's certificates
        with suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    return context
