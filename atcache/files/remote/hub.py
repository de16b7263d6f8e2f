"""Files of datasets on a Hugging Face hub: where it serves them, which commit a branch is, and how to ask it.

`huggingface_hub` knows the hub's address (HF_ENDPOINT) and the user's token (HF_TOKEN, or `hf auth login`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn, TypeVar
from urllib.parse import quote

from atcache.errors import AtcacheError, RemoteError
from atcache.files.location import Url

_Answer = TypeVar("_Answer")

_TIMEOUT_S = 30.0
_WAITS_S = (1.0, 2.0, 4.0)
_LONGEST_WAIT_S = 300.0


def served_at(url: Url) -> dict[str, str]:
    """The address below which the hub serves the files of a repository, and the header that shows who asks."""
    from huggingface_hub import constants, get_token

    root = f"{constants.ENDPOINT}/datasets/{url.repository}/resolve/{quote(url.revision, safe='')}"
    token = get_token()
    return {"root": root} if token is None else {"root": root, "authorization": f"Bearer {token}"}


def pinned(place: Url) -> Url:
    """The same place at the commit that its branch or tag is now, so that a later push changes nothing for its reader.

    Raises:
        FileNotFoundError: the hub has no such repository or revision, or does not show it to this user.
        RemoteError: the hub cannot be reached, or refuses.
    """
    if place.is_pinned:
        return place
    from huggingface_hub import HfApi

    def question() -> str | None:
        about = HfApi().dataset_info(place.repository, revision=place.revision, expand=["sha"], timeout=_TIMEOUT_S)
        return about.sha

    commit = ask_hub(place, question)
    if commit is None:
        raise RemoteError(f"{place}: the hub does not say which commit {place.revision!r} is. Name one: @COMMIT.")
    return place.at_revision(commit)


def ask_hub(place: Url, question: Callable[[], _Answer]) -> _Answer:
    """The answer to a question, which is repeated while the hub is busy or fails.

    Args:
        place: what it is about, for messages.
        question: calls huggingface_hub; asking twice does no harm.

    Raises:
        FileNotFoundError: there is no such repository or revision, or this user may not see it.
        RemoteError: the hub cannot be reached, or refuses.
    """
    for wait_s in _WAITS_S:
        try:
            return question()
        except Exception as error:  # whatever huggingface_hub raises; what it does not know is raised again
            if not _will_pass(error):
                _raise_explained(place, error)
            time.sleep(max(wait_s, _wanted_wait_s(error)))
    try:
        return question()
    except Exception as error:  # as above
        _raise_explained(place, error)


def _raise_explained(place: Url, error: Exception) -> NoReturn:
    explained = _explained(place, error)
    # An error must not become the cause of itself, nor of its own cause.
    raise explained from None if explained in (error, error.__cause__) else error


def _cause(error: BaseException) -> BaseException:
    """The error of the server or connection. huggingface_hub wraps those of its threads in a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    """The status of the hub's answer; None if it gave none."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = _cause(error)
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None


def _failed_on_the_way(error: BaseException) -> bool:
    """Whether the connection failed. Versions of huggingface_hub use different HTTP clients."""
    kind = type(_cause(error))
    # hf_xet, which moves large files, raises plain RuntimeErrors.
    is_of_client = kind is RuntimeError or kind.__module__.split(".")[0] in ("httpx2", "httpx", "requests", "hf_xet")
    return _status(error) is None and is_of_client


def _will_pass(error: BaseException) -> bool:
    status = _status(error)
    return _failed_on_the_way(error) or (status is not None and (status in (408, 429) or status >= 500))


def _wanted_wait_s(error: BaseException) -> float:
    """How long the server asks to wait."""
    response = getattr(_cause(error), "response", None)
    text = "" if response is None else str(response.headers.get("Retry-After", ""))
    return min(float(text), _LONGEST_WAIT_S) if text.isdecimal() else 0.0


def _explained(place: Url, error: BaseException) -> BaseException:
    """The error to raise in place of huggingface_hub's: a sentence, or `error` itself if it is none of the hub's."""
    from huggingface_hub import errors

    cause, status = _cause(error), _status(error)
    if isinstance(cause, AtcacheError):
        return cause
    if isinstance(cause, errors.GatedRepoError):
        return RemoteError(
            f"{place} may not be read: its owners ask who uses it. Ask for access on its page of the hub, then log in "
            "with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(cause, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return FileNotFoundError(str(place))
    if status is not None:
        reason = str(getattr(cause, "server_message", None) or f"status {status}").rstrip(".")
        is_denied = status in (401, 403)
        advice = (
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may do this."
            if is_denied
            else "Try the same command again later: what is there stays."
        )
        return RemoteError(f"{place}: the hub refuses ({reason}). {advice}")
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return RemoteError(f"{place} cannot be reached: HF_HUB_OFFLINE is set. Unset it.")
    if _failed_on_the_way(error):
        return RemoteError(
            f"{place}: the hub cannot be reached ({type(cause).__name__}). Check the connection and HF_ENDPOINT, then "
            "type the same command again: what is there stays."
        )
    return error
