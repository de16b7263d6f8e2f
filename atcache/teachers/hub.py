"""Weights from the Hugging Face hub: the local copy, a download, or a sentence saying which file to fetch by hand."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from atcache.errors import TeacherError

_REACH_TIMEOUT_S = 10.0


def fetch_weights(timm_name: str, config: dict[str, Any]) -> tuple[Path, str]:
    """The file of a timm model's weights on this machine, and a name for where it came from.

    A copy that was downloaded before is taken without asking the network.

    Args:
        timm_name: with its tag, for messages.
        config: timm's pretrained config of it, as a dict.

    Raises:
        TeacherError: there are none, the hub cannot be reached, or it refuses (some weights need an account).
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository = config.get("hf_hub_id")
    if not repository:
        raise TeacherError(f"{timm_name}: timm names no weights on the hub for it. Give a file with --weights FILE.")
    filename: str = config.get("hf_hub_filename") or "model.safetensors"
    source = f"hub:{repository}/{filename}"
    by_hand = (
        f"Fetch {filename} of https://huggingface.co/{repository} where there is a connection, and give it with "
        f"--weights FILE."
    )
    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached), source
    if not _is_reachable(repository, filename):
        raise TeacherError(f"{timm_name}: the Hugging Face hub cannot be reached. {by_hand}")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename)), source
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TeacherError(f"{timm_name}: the Hugging Face hub cannot be reached. {by_hand}") from error
    except HfHubHTTPError as error:
        raise TeacherError(f"{timm_name}: the hub does not give {source} ({error}). {by_hand}") from error


def _is_reachable(repository: str, filename: str) -> bool:
    """Whether the hub answers at all, whatever it says; its own client retries for half a minute before it gives up."""
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(hf_hub_url(repository, filename), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # A certificate Python does not know may be one the hub's client does: let that client decide.
        return not isinstance(error.reason, socket.gaierror | TimeoutError | ConnectionError)
    except TimeoutError:
        return False
    return True
