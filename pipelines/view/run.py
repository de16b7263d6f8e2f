"""Serve caches until Ctrl-C."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from atcache.errors import ConfigError

from .config import ViewConfig
from .files import CacheFiles
from .images import Pictures
from .server import ViewServer
from .site import ServedCache, Site, name_caches

_FIRST_PORT = 8642
_NUM_PORTS = 20


def view(config: ViewConfig, tell: Callable[[str], None]) -> None:
    """Serve caches and the page until Ctrl-C or SIGTERM.

    Args:
        config: the options.
        tell: gets the page's address, once it is served.

    Raises:
        CacheMissError, CacheMismatchError, CorruptCacheError: a cache cannot be opened.
        ConfigError: the address cannot be listened at.
    """
    opened = [Pictures(cache, config.data) for cache in config.caches]
    # On a hub, an opened cache names the commit that was there: all files come from it.
    places = [pictures.cache.path for pictures in opened]
    site = Site(
        [
            ServedCache(name, CacheFiles(place), pictures)
            for name, place, pictures in zip(name_caches(places), places, opened, strict=True)
        ]
    )
    with _listen(config, site) as server, signals_as_bytes() as signals:
        for work in (server.serve_forever, *(pictures.warm_up for pictures in opened)):
            threading.Thread(target=work, daemon=True).start()
        address = _address(server, config)
        tell(address)
        if _wants_browser(config):
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        signals.recv(1)  # open connections do not hold up the end: their threads end with the process


@contextmanager
def signals_as_bytes() -> Generator[socket.socket]:
    """A socket that gets a byte for each Ctrl-C and SIGTERM. They raise nothing: a second one does no harm.

    A lock or an event cannot be waited for instead. A signal that comes just before the wait begins would only be
    handled after the wait, which never ends then (https://docs.python.org/3/library/signal.html#signal.set_wakeup_fd).
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    waiting, written = socket.socketpair()
    with waiting, written:
        written.setblocking(False)
        handlers = [signal.signal(number, _do_nothing) for number in numbers]
        wakeup_before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            yield waiting
        finally:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler, without which no byte would be written."""


def _listen(config: ViewConfig, site: Site) -> ViewServer:
    host = config.host or "127.0.0.1"
    token = secrets.token_urlsafe(16) if config.host else ""
    names = frozenset(name.lower() for name in (config.host, socket.gethostname()) if name and config.host)
    # 0 and a port that was named are tried once; else the first of several that is free.
    ports = range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS) if config.port is None else (config.port,)
    for port in ports:
        try:
            return ViewServer(host, port, site, token=token, names=names, origin=config.allow_origin or "")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    f"host={host!r}, port={port}: cannot be listened at ({error.strerror}). Give an address of this "
                    "machine, and a port above 1023."
                ) from error
    raise ConfigError(
        f"port={ports[0]}: already in use"
        + (f", and so are the next {len(ports) - 1}" if len(ports) > 1 else "")
        + ". Give another --port, or 0 for any that is free."
    )


def _address(server: ViewServer, config: ViewConfig) -> str:
    """The page's address, for a browser."""
    host, port = server.server_name, server.server_port
    if config.host and host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'{server.token}/' if server.token else ''}"


def _wants_browser(config: ViewConfig) -> bool:
    if config.browser is not None:
        return config.browser
    # Without a screen, a browser of the terminal would take it over; of a remote machine nobody sees it.
    has_screen = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    return has_screen and sys.stderr.isatty() and "SSH_CONNECTION" not in os.environ
