"""Open a cluster from what `--scheduler` says, or take a client from Python."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from atcache.errors import ConfigError
from atcache.files.location import Location, expand_home
from atcache.images.tars import as_typed_in
from atcache.machine import num_processors

from .cluster import Cluster
from .local import local_client
from .mapping import InThreads, Mapper, OnCluster

if TYPE_CHECKING:
    from distributed import Client

    from atcache.cache.cache import Cache

LOCAL = "local"
_SECURE = ("tls", "wss")
_SCHEMES = ("tcp", "ws", *_SECURE)


def check_scheduler(scheduler: str | None, client: object) -> None:
    """Refuse what can be no cluster. Connects to nothing.

    Raises:
        ConfigError: both are given, the client is none, or `distributed` is not installed.
    """
    if scheduler is None and client is None:
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError("a dask cluster needs distributed: pip install 'atcache[cluster]'.") from error
    if client is None:
        return
    if scheduler is not None:
        raise ConfigError(f"scheduler={scheduler!r} and a client: the client has its scheduler. Give one of them.")
    if not isinstance(client, Client):
        raise ConfigError(f"client={client!r:.80}: expected a distributed.Client.")
    if client.status != "running":
        raise ConfigError(f"the client is {client.status}: it has no scheduler any more. Give one that is running.")
    if client.asynchronous:
        raise ConfigError("the client is asynchronous, and atcache waits for its work. Give one that is not.")


@contextmanager
def connected(scheduler: str | None, client: Any, *, device: str) -> Generator[Cluster]:  # noqa: ANN401 - an optional Client
    """A cluster that has a worker. At the end it is left, and a local one ends; the caller's client stays open.

    Args:
        scheduler: an address, a scheduler file, or "local"; None if there is a client.
        client: a `distributed.Client`, or None.
        device: what the work runs on; a local cluster has one worker a GPU unless it is "cpu".

    Raises:
        ConfigError: the scheduler does not answer, or the workers have another atcache.
        WorkerLostError: there are no workers.
    """
    if client is not None:
        yield Cluster.checked(client, is_local=False)
    elif scheduler == LOCAL:
        if device != "cpu":
            _check_device(device)
        with local_client(uses_gpus=device != "cpu") as own:
            yield Cluster.checked(own, is_local=True)
    else:
        assert scheduler is not None, "one of both is given"
        with _client_of(scheduler) as own:
            yield Cluster.checked(own, is_local=False)


@contextmanager
def mapper_of(scheduler: str | None, client: Any, num_threads: int | None) -> Generator[Mapper]:  # noqa: ANN401 - an optional Client
    """What applies functions to many items: a cluster, if one is given, or threads of this process.

    Args:
        scheduler: as in `connected`, or None.
        client: likewise.
        num_threads: of this process; None for as many as it may use processors.
    """
    if scheduler is None and client is None:
        yield InThreads(num_threads or num_processors())
        return
    with connected(scheduler, client, device="cpu") as cluster:
        yield OnCluster(cluster)


def check_workers_option(workers: int | None, scheduler: str | None, client: object) -> None:
    """Refuse a number of threads of this process for work that is done elsewhere.

    Raises:
        ConfigError: both are given.
    """
    if workers is not None and (scheduler is not None or client is not None):
        raise ConfigError(f"workers={workers}: a cluster's workers have their own number of threads. Leave it out.")


def open_for(cache: Location, data: str | None, *, sends: bool) -> Cache:
    """A cache, opened so that it can be sent to workers, if it is to be: they have other working folders."""
    from atcache.cache.cache import Cache

    if not sends:
        return Cache(cache, data=data)
    return Cache(cache.absolute(), data=None if data is None else as_typed_in(Path.cwd(), data))


def _check_device(device: str) -> None:
    from atcache.teachers.devices import resolve_device

    resolve_device(device)


def _client_of(scheduler: str) -> Client:
    """A client of the scheduler with this address, or that wrote this file."""
    from distributed import Client

    file = expand_home(Path(scheduler))
    is_file = "://" not in scheduler and (file.exists() or file.suffix == ".json")
    if is_file and not file.is_file():
        raise ConfigError(
            f"scheduler={scheduler!r}: there is no such file. It is written by `dask scheduler --scheduler-file`."
        )
    address = _read_address(file) if is_file else scheduler
    # Checked here: a client that cannot be made waits for a minute when it is given up.
    if (problem := _problem_of(address)) is not None:
        raise _not_answering(scheduler, problem)
    try:
        return Client(address, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:  # TimeoutError is an OSError
        raise _not_answering(scheduler, str(error)) from error


def _problem_of(address: str) -> str | None:
    """Why nobody can be at an address; None if a scheduler may be."""
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.security import Security

    try:
        scheme, place = parse_address(address)
        parse_host_port(place)
    except ValueError:
        return "it is not an address with a port"
    if scheme not in _SCHEMES:
        return f"its scheme is none of {', '.join(_SCHEMES)}"
    if scheme in _SECURE and cast("Any", Security)().get_connection_args("client").get("ssl_context") is None:
        return "dask's configuration names no certificates for TLS"
    return None


def _read_address(file: Path) -> str:
    """The address in a file that a scheduler has written."""
    try:
        content: Any = json.loads(file.read_bytes())
        address = content["address"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"scheduler={str(file)!r} is not a scheduler file: it names no address. It is written by "
            "`dask scheduler --scheduler-file`."
        ) from error
    return str(address)


def _not_answering(scheduler: str, reason: str) -> ConfigError:
    return ConfigError(
        f"scheduler={scheduler!r} does not answer as a dask scheduler ({reason}). Expected an address such as "
        "tcp://HOST:8786, a scheduler file, or local."
    )
