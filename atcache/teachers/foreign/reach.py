"""Whether the Hugging Face hub can be reached: asked once, since its libraries try for a minute before they give up."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from atcache.errors import TeacherError

_TIMEOUT_S = 10.0


def check_reach(text: str, repository: str, by_hand: str) -> None:
    """Refuse to go on if files of a repository are neither here nor can be had.

    Args:
        text: the model's name, for messages.
        repository: ORG/MODEL on the hub.
        by_hand: what to do without a connection, as a sentence.

    Raises:
        TeacherError: nothing of the repository is on this machine, and the hub does not answer.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import repo_folder_name

    if (
        Path(huggingface_hub.constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    ).exists():
        return
    try:
        with suppress(HfHubHTTPError):  # the hub did answer; the download will say what is wrong
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repository, "README.md"), timeout=_TIMEOUT_S
            )
    except Exception as error:  # the errors of whichever HTTP client huggingface_hub uses
        raise TeacherError(f"model {text}: the Hugging Face hub cannot be reached. {by_hand}") from error
