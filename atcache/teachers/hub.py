"""Weights from the Hugging Face hub: the local copy, a download, or a sentence saying which file to fetch by hand."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from atcache.errors import TeacherError

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
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository = config.get("hf_hub_id")
    if not repository:
        raise TeacherError(f"{timm_name}: timm names no weights on the hub for it. Give a file with --weights FILE.")
    filename: str = config.get("hf_hub_filename") or "model.safetensors"
    source = f"hub:{repository}/{filename}"
    by_hand = (
        f"Download {filename} of https://huggingface.co/{repository} on a machine with a connection, and give it with "
        f"--weights FILE."
    )
    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached), source
    unreachable = f"{timm_name}: the Hugging Face hub cannot be reached. {by_hand}"
    try:
        # One short question first, because the download would try for minutes before it gives up.
        with suppress(HfHubHTTPError):  # the hub did answer; the download will say what is wrong
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repository, filename), timeout=_REACH_TIMEOUT_S
            )
    except Exception as error:  # the errors of whichever HTTP client huggingface_hub uses
        raise TeacherError(unreachable) from error
    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename)), source
    except LocalEntryNotFoundError as error:
        raise TeacherError(unreachable) from error
    except HfHubHTTPError as error:
        raise TeacherError(f"{timm_name}: downloading {source} failed ({error}). {by_hand}") from error
