"""Files from the Hugging Face hub: the local copy, a download, or a sentence saying what to fetch by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from atcache.errors import AtcacheError, TeacherError
from atcache.files.durable import disk_errors_explained

_REACH_TIMEOUT_S = 10.0


def fetch_weights(timm_name: str, config: dict[str, Any]) -> tuple[Path, str]:
    """The file of a timm model's weights on this machine, and the name of its source.

    A copy that was downloaded before is taken without using the network.

    Args:
        timm_name: the model's name with its tag, for messages.
        config: timm's pretrained config of the model, as a dict.

    Raises:
        TeacherError: the hub has no weights for it, cannot be reached, or refuses (some weights need an account).
    """
    repository = config.get("hf_hub_id")
    if not repository:
        raise TeacherError(f"{timm_name}: timm names no weights on the hub for it. Give a file with --weights FILE.")
    filename: str = config.get("hf_hub_filename") or "model.safetensors"
    path = fetch_file(repository, [filename], who=timm_name, then="give it with --weights FILE")
    return path, f"hub:{repository}/{filename}"


def fetch_file(repository: str, filenames: Sequence[str], *, who: str, then: str, revision: str | None = None) -> Path:
    """The first of `filenames` that a repository has, on this machine; its folder is named by the commit.

    A copy that was downloaded before is taken without using the network.

    Args:
        repository: ORGANISATION/NAME.
        filenames: the names to try, in order.
        who: what needs the file, for messages.
        then: what to do with a file fetched by hand, for messages.
        revision: a branch, tag or commit; None is the main branch.

    Raises:
        TeacherError: the hub cannot be reached, refuses, or has none of the files.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE

    for filename in filenames:
        cached = huggingface_hub.try_to_load_from_cache(repository, filename, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    page = f"{ENDPOINT}/{repository}"
    by_hand = f"Download {filenames[0]} of {page} on a machine with a connection, and {then}."
    unreachable = f"{who}: the Hugging Face hub cannot be reached. {by_hand}"
    for filename in filenames:
        url = huggingface_hub.hf_hub_url(repository, filename, revision=revision)
        try:
            # One short question first, because the download would try for minutes before it gives up.
            with suppress(errors.HfHubHTTPError):  # the hub did answer; the download will say what is wrong
                huggingface_hub.get_hf_file_metadata(url, timeout=_REACH_TIMEOUT_S)
        except Exception as error:  # the errors of whichever HTTP client huggingface_hub uses
            raise TeacherError(unreachable) from error
        try:
            with disk_errors_explained(Path(HF_HUB_CACHE)):
                return Path(huggingface_hub.hf_hub_download(repository, filename, revision=revision))
        except AtcacheError:
            raise
        except errors.LocalEntryNotFoundError as error:
            raise TeacherError(unreachable) from error
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError as error:
            raise TeacherError(
                f"{who}: the owners of {repository} ask who uses it. Ask for access at {page}, then log in with "
                "`hf auth login` or set HF_TOKEN to a token of your account."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise TeacherError(f"{who}: {page} has no branch, tag or commit {revision!r}.") from error
        except errors.RepositoryNotFoundError as error:
            raise TeacherError(
                f"{who}: the hub has no repository {repository}, or it is private. Check the name at {page}; for a "
                "private one log in with `hf auth login` or set HF_TOKEN."
            ) from error
        except errors.HfHubHTTPError as error:
            raise TeacherError(f"{who}: downloading hub:{repository}/{filename} failed ({error}). {by_hand}") from error
        except Exception as error:  # the connection broke: errors of the HTTP client, RuntimeErrors of hf_xet
            raise TeacherError(unreachable) from error
    raise TeacherError(f"{who}: {page} has no file {' or '.join(filenames)}.")
