"""Datasets on the Hugging Face hub: their parquet files, of one commit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from atcache.errors import AtcacheError, SourceError
from atcache.files.durable import disk_errors_explained

from ..running.progress import Progress
from .config import PackConfig
from .splits import choose_files
from .tables import PARQUET

_CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a parquet copy of a dataset that has other files."""
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFiles:
    """Files that were fetched."""

    files: tuple[Path, ...]
    source: str
    """What they are: hf:ORG/NAME@COMMIT."""


def fetch_dataset(name: str, config: PackConfig) -> HubFiles:
    """The parquet files of a dataset on this machine, in the hub's own cache, which fetches each file only once.

    Args:
        name: ORG/NAME.
        config: the subset, split and revision that are wanted. Without a revision it is main, or the hub's parquet
            copy if main has no parquet files.

    Raises:
        SourceError: the hub cannot be reached or refuses, or there is no such dataset, subset or split.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = config.revision
    try:
        commit, files = _listed(name, revision)
        if not files and revision is None:
            with suppress(RevisionNotFoundError):  # the hub copies only what it can read without running code
                commit, files = _listed(name, _CONVERTED)
        if not files:
            raise SourceError(
                f"hf:{name} has no parquet files. Load it with `datasets`, save it with save_to_disk and pack that "
                "folder."
            )
        chosen = choose_files(files, config.subset, config.split, f"hf:{name}")
        paths: list[Path] = []
        with Progress("download", total=len(chosen), unit="files") as progress:
            for file in chosen:
                with disk_errors_explained(Path(huggingface_hub.constants.HF_HUB_CACHE)):
                    paths.append(
                        Path(huggingface_hub.hf_hub_download(name, str(file), repo_type="dataset", revision=commit))
                    )
                progress.advance(1)
    except AtcacheError:
        raise
    except GatedRepoError as error:
        raise SourceError(
            f"hf:{name} is given only to those who ask: accept its terms on https://huggingface.co/datasets/{name} and "
            "set the environment variable HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"hf:{name}: the hub has no such dataset{'' if revision is None else f' or revision {revision!r}'}. Check "
            "the name, ORG/NAME; a private one needs the environment variable HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise SourceError(f"hf:{name}: the hub refused ({reason}).") from error
    except Exception as error:  # the errors of whichever HTTP client huggingface_hub uses
        raise SourceError(
            f"hf:{name}: the Hugging Face hub cannot be reached ({type(error).__name__}). Fetch the parquet files on a "
            "machine with a connection, and pack the folder with them."
        ) from error
    return HubFiles(files=tuple(paths), source=f"hf:{name}@{commit}")


def _listed(name: str, revision: str | None) -> tuple[str, list[PurePosixPath]]:
    """The commit that a revision means, and its parquet files."""
    import huggingface_hub

    found: Any = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT_S)
    files = [PurePosixPath(one.rfilename) for one in found.siblings or ()]
    return str(found.sha), sorted(file for file in files if file.suffix == PARQUET)
