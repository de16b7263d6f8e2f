"""Teachers of Hugging Face transformers: `transformers:ORG/MODEL`, with `@REVISION` or not, or `transformers:FOLDER`.

Weights are read from safetensors, or from torch files with `weights_only=True`, and no code of a repository is run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atcache.attention.survey import describe
from atcache.errors import TeacherError
from atcache.files.location import expand_home
from atcache.teachers.foreign.image_processor import processor_input, squashes
from atcache.teachers.foreign.loaded import ForeignModel
from atcache.teachers.foreign.names import CONFIG_VALUES, TRANSFORMERS, ForeignName
from atcache.teachers.foreign.reach import check_reach
from atcache.teachers.inputs import note_crop
from atcache.teachers.weight_files import check_weights
from atcache.teachers.weights import weights_sha256

MODEL_CLASSES = {
    "beit": "BeitModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "vit": "ViTModel",
    "vit_mae": "ViTMAEModel",
    "vit_msn": "ViTMSNModel",
}
"""transformers' class of each `model_type` that can be a teacher."""
_HEADS_OF_WIDTHS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 4096: 32}
"""Heads of the published models whose heads are not 64 wide: SigLIP so400m, the ViTs H, g and G, DINOv3 7B."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_WITHOUT_EFFECT = ("pooler.", "embeddings.mask_token")
"""Parameters that no map depends on, which files may therefore lack."""


def load_transformers(text: str, device: torch.device) -> ForeignModel:
    """The model that a name beginning with "transformers:" stands for.

    Args:
        text: the whole name.
        device: where it runs.

    Raises:
        TeacherError: transformers is not installed, or the model cannot be found, read or used; the message says why.
        UnsupportedAttentionError: its attention cannot be cached.
    """
    transformers = _import_transformers(text)
    place, revision = text.removeprefix(TRANSFORMERS), ""
    folder = expand_home(Path(place))
    if not folder.is_dir():  # the path of a folder may hold an @ of its own
        place, _, revision = place.partition("@")
        folder = expand_home(Path(place))
    is_local = bool(place) and folder.is_dir()
    if not is_local and (place.count("/") != 1 or place[:1] in "./~"):
        raise TeacherError(f"model {text}: there is no folder {place}, and a name on the hub is ORG/MODEL.")
    if is_local and revision:
        raise TeacherError(f"model {text}: {place} is a folder, which has no revisions. Leave out @{revision}.")
    if not is_local and ":" in place:
        raise TeacherError(
            f"model {text}: arguments after a second colon are for models of timm. The size of this model's images is "
            f"that of its preprocessor_config.json. Leave out :{place.partition(':')[2]}."
        )
    if is_local:
        check_weights(folder)
    where = str(folder) if is_local else place
    with _quiet(transformers), _told_plainly(text, place):
        model_type, settings, revision = _read_configs(transformers, text, where, revision or None)
        model = _load_model(getattr(transformers, MODEL_CLASSES[model_type]), text, where, revision)
    config: Any = model.config
    patch: int | tuple[int, int] = config.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    inputs = processor_input(text, settings, _model_size(config))
    note_crop(text, "squash" if squashes(settings) else "center")
    model = model.to(device).eval().requires_grad_(False)
    grid = inputs.height // patch_height, inputs.width // patch_width
    resizes = (inputs.height, inputs.width) != _model_size(config)
    return ForeignModel(
        model=describe(
            model,
            label=text,
            image_size=(inputs.height, inputs.width),
            grid=grid,
            forward=_forward(model, grid[0] * grid[1], resizes=resizes),
        ),
        name=ForeignName(text),
        source=folder.name if is_local else f"hub:{place}@{revision}",
        weights_sha256=_with_config(weights_sha256(model, without=_WITHOUT_EFFECT), config),
        input=inputs,
    )


def _with_config(sha256: str, config: Any) -> str:  # noqa: ANN401 - a transformers config
    """The hash of the weights, and of the values of their config that change maps and cannot be told from weights.

    Usual values add nothing, so that caches from before the config was hashed go on.
    """
    usual: dict[str, Any] = type(config)().to_dict()
    usual["num_attention_heads"] = _HEADS_OF_WIDTHS.get(config.hidden_size, config.hidden_size // 64)
    given: dict[str, Any] = config.to_dict()
    unusual = {name: given[name] for name in CONFIG_VALUES if name in given and given[name] != usual.get(name)}
    if not unusual:
        return sha256
    return hashlib.sha256(f"{sha256} with {json.dumps(unusual, sort_keys=True)}".encode()).hexdigest()


def _import_transformers(text: str) -> Any:  # noqa: ANN401 - a module
    try:
        import transformers
    except ImportError as error:
        raise TeacherError(
            f"model {text}: the library transformers is not installed. Install it with: pip install "
            "'atcache[transformers]'."
        ) from error
    return transformers


def _read_configs(
    transformers: Any,  # noqa: ANN401 - a module
    text: str,
    where: str,
    revision: str | None,
) -> tuple[str, dict[str, Any], str | None]:
    """The model's type, the image processor's settings, and the commit they are of. Copies on this machine first."""

    is_folder = Path(where).is_dir()

    def read(*, local_files_only: bool) -> tuple[str, dict[str, Any], str | None]:
        commit = None if is_folder else _commit(where, revision, local_files_only=local_files_only)
        options: dict[str, Any] = {"revision": commit, "local_files_only": local_files_only}
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
        if config.model_type not in MODEL_CLASSES:
            raise TeacherError(
                f"model {text}: its model_type is {config.model_type!r}, expected one of {', '.join(MODEL_CLASSES)}. "
                "Other ViTs can be handed over from Python with atcache.own_teacher."
            )
        settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(where, **options)
        return config.model_type, settings, commit

    try:
        return read(local_files_only=True)
    except OSError:
        if is_folder:
            raise
        by_hand = (
            f"Download https://huggingface.co/{where} elsewhere, and give the folder: {TRANSFORMERS}FOLDER. If {where} "
            "is meant to be a folder, there is none here."
        )
        check_reach(text, where, by_hand)
        return read(local_files_only=False)


def _commit(repository: str, revision: str | None, *, local_files_only: bool) -> str:
    """The commit that a revision is now; all files are then taken from it."""
    import huggingface_hub

    config = huggingface_hub.hf_hub_download(
        repository, "config.json", revision=revision, local_files_only=local_files_only
    )
    return Path(config).parent.name  # snapshots/COMMIT/config.json


def _load_model(model_class: Any, text: str, where: str, revision: str | None) -> nn.Module:  # noqa: ANN401
    """The model with all its weights in float32.

    Raises:
        TeacherError: weights that its maps depend on are missing, or have another shape.
    """
    options: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(model_class).parameters:
        options["add_pooling_layer"] = False  # many files lack it, and no map depends on it
    # transformers fills what a file lacks with random numbers; drawing them must not change those of a later student.
    with torch.random.fork_rng(devices=[]):
        model, report = model_class.from_pretrained(
            where,
            revision=revision,
            trust_remote_code=False,
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    lacking = sorted(name for name in report["missing_keys"] if not name.startswith(_WITHOUT_EFFECT))
    misfits = sorted(name for name, *_ in report["mismatched_keys"])
    for names, what in ((lacking, "are missing in"), (misfits, "have another shape in")):
        if names:
            raise TeacherError(
                f"model {text}: {len(names)} tensors {what} its weights, the first {names[0]}. The weights are of "
                "another model than its config.json."
            )
    _refuse_more_layers(model, text, report["unexpected_keys"])
    return model


def _refuse_more_layers(model: nn.Module, text: str, unexpected: Iterable[str]) -> None:
    """Refuse weights with layers that the model lacks. Heads, decoders and text towers have other names.

    Raises:
        TeacherError: names the first tensor of such a layer.
    """
    of_layers = {_NUMBER.sub("#", name) for name in model.state_dict() if _NUMBER.search(name)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    more = sorted(name for name in unexpected if _NUMBER.sub("#", name.removeprefix(prefix)) in of_layers)
    if more:
        raise TeacherError(
            f"model {text}: {len(more)} tensors of its weights are of layers that its config.json does not have, the "
            f"first {more[0]}. The weights are of another model than its config.json."
        )


def _model_size(config: Any) -> tuple[int, int] | None:  # noqa: ANN401 - a transformers config
    size = getattr(config, "image_size", None)
    return (size, size) if isinstance(size, int) else None if size is None else (int(size[0]), int(size[1]))


def _forward(model: nn.Module, num_patches: int, *, resizes: bool) -> Callable[[nn.Module, Tensor], Any]:
    """What runs the model on images, with all patches in their order."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"interpolate_pos_encoding": True} if resizes and _INTERPOLATES in accepted else {}
    if "noise" not in accepted:
        return lambda module, images: module(pixel_values=images, **options)
    # ViTMAE drops patches and shuffles the others, in the order of this noise.
    config: Any = model.config
    config.mask_ratio = 0.0

    def forward(module: nn.Module, images: Tensor) -> Any:  # noqa: ANN401 - transformers' output
        noise_BT = torch.arange(num_patches, dtype=torch.float32, device=images.device).expand(len(images), -1)
        return module(pixel_values=images, noise=noise_BT, **options)

    return forward


_INTERPOLATES = "interpolate_pos_encoding"


@contextmanager
def _quiet(transformers: Any) -> Generator[None]:  # noqa: ANN401 - a module
    """A context in which transformers shows no bars and reports; what matters of them is checked and said by us."""
    log = transformers.utils.logging
    level, shows_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shows_bars:
            log.enable_progress_bar()


@contextmanager
def _told_plainly(text: str, place: str) -> Generator[None]:
    """A context that makes one sentence of what transformers and the hub raise."""
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:  # transformers raises anything on folders it was not written for
        classes = {type(cause).__name__ for cause in _causes(error)}
        page = f"https://huggingface.co/{place}"
        if "GatedRepoError" in classes:
            reason = f"its authors ask you to agree to a licence. Do so at {page}, and give your token: hf auth login"
        elif "RepositoryNotFoundError" in classes:
            reason = f"there is no public repository {page}, or it needs your token: hf auth login"
        elif "RevisionNotFoundError" in classes:
            reason = f"{page} has no such revision"
        elif "Can't load image processor" in str(error):
            reason = (
                "it has no preprocessor_config.json, which says the size, mean and std of its images. Put that of the "
                "model it was trained from beside its config.json, or hand it over with atcache.own_teacher"
            )
        elif "trust_remote_code" in str(error):
            reason = "it needs code of its repository, which is never run. Hand it over with atcache.own_teacher"
        elif "UnpicklingError" in classes:
            reason = "its weights hold pickled Python objects beside tensors, which could run code; they were not read"
        else:
            words = " ".join(str(error).split())
            reason = f"transformers cannot load it ({type(error).__name__}: {words[:300]})"
        raise TeacherError(f"model {text}: {reason}.") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
