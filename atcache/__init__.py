"""atcache runs a teacher ViT once over a dataset, keeps its attention in a cache, and trains students from the cache.

    import atcache

    atcache.build(teacher="mae-vit-l", data="train-{000000..001281}.tar", out="in1k.zarr", views=4)  # the teacher, once
    atcache.train(mode="copy", cache="in1k.zarr", out="runs/copy")  # a student, without the teacher
    cache = atcache.open("in1k.zarr")  # look at what is in it
    maps = cache.maps(layer=5)  # lazy: view, sample, head, query, key
    entropy_bits = atcache.stats.attention_entropy(maps[0, :100]).mean().compute()
    batches = atcache.batches("in1k.zarr", epochs=30)  # or train a student in your own loop
    student = atcache.make_student("in1k.zarr", "distill").to(batches.device)
    for batch in batches:
        logits, attention_loss = student(batch.images, batch.attention)

The functions `pack`, `pretrain`, `plan`, `probe`, `build`, `merge`, `push`, `pull`, `verify`, `train`, `report`,
`maps`, `compare` and `show` do what the commands of the same names do, `evaluate` what `atcache eval` does, and
`train_sweep` what `atcache train --sweep` does. A user's mistake and damaged data raise an `AtcacheError`. `import
atcache` is fast: it imports torch, timm, zarr and dask only when a function that needs them is first used.
"""

# In the checkout, the package atcache.pipelines is the folder beside this one, so pyright does not find it.
# pyright: reportMissingImports=false, reportUnknownVariableType=false

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from atcache.errors import (
    AtcacheError as AtcacheError,
    AttentionShapeError as AttentionShapeError,
    BadImageError as BadImageError,
    CacheMismatchError as CacheMismatchError,
    CacheMissError as CacheMissError,
    CodecError as CodecError,
    ConfigError as ConfigError,
    CorruptCacheError as CorruptCacheError,
    DiskFullError as DiskFullError,
    NotWritableError as NotWritableError,
    RemoteError as RemoteError,
    SourceError as SourceError,
    TeacherError as TeacherError,
    UnsupportedAttentionError as UnsupportedAttentionError,
    WorkerLostError as WorkerLostError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from atcache import pictures as pictures, stats as stats
    from atcache.attention.regrid import regrid_maps as regrid_maps
    from atcache.cache.cache import Cache as Cache
    from atcache.cache.decoded import View as View
    from atcache.files.location import Location
    from atcache.pipelines.api import (
        build as build,
        compare as compare,
        evaluate as evaluate,
        maps as maps,
        merge as merge,
        pack as pack,
        plan as plan,
        pretrain as pretrain,
        probe as probe,
        pull as pull,
        push as push,
        report as report,
        show as show,
        train as train,
        train_sweep as train_sweep,
        verify as verify,
    )
    from atcache.students.batches import Batches as Batches, TrainingBatch as TrainingBatch, batches as batches
    from atcache.students.make import make_student as make_student
    from atcache.students.pairing import Pairing as Pairing
    from atcache.teachers.foreign.own import own_teacher as own_teacher
    from atcache.views.corrupt import corrupt as corrupt

__version__ = "0.1.0"

# Names that are imported on first use, and the modules they come from.
_MODULE_OF = {
    **dict.fromkeys(
        (
            "pack",
            "pretrain",
            "plan",
            "probe",
            "build",
            "merge",
            "push",
            "pull",
            "verify",
            "train",
            "train_sweep",
            "evaluate",
            "report",
            "maps",
            "compare",
            "show",
        ),
        "atcache.pipelines.api",
    ),
    "Cache": "atcache.cache.cache",
    "View": "atcache.cache.decoded",
    **dict.fromkeys(("batches", "Batches", "TrainingBatch"), "atcache.students.batches"),
    "make_student": "atcache.students.make",
    "regrid_maps": "atcache.attention.regrid",
    "Pairing": "atcache.students.pairing",
    "own_teacher": "atcache.teachers.foreign.own",
    "corrupt": "atcache.views.corrupt",
}

__all__ = [
    "AtcacheError",
    "AttentionShapeError",
    "BadImageError",
    "Batches",
    "Cache",
    "CacheMismatchError",
    "CacheMissError",
    "CodecError",
    "ConfigError",
    "CorruptCacheError",
    "DiskFullError",
    "NotWritableError",
    "Pairing",
    "RemoteError",
    "SourceError",
    "TeacherError",
    "TrainingBatch",
    "UnsupportedAttentionError",
    "View",
    "WorkerLostError",
    "__version__",
    "batches",
    "build",
    "compare",
    "corrupt",
    "evaluate",
    "make_student",
    "maps",
    "merge",
    "open",
    "own_teacher",
    "pack",
    "pictures",
    "plan",
    "pretrain",
    "probe",
    "pull",
    "push",
    "regrid_maps",
    "report",
    "show",
    "stats",
    "train",
    "train_sweep",
    "verify",
]


def open(path: str | Location, *, data: str | Path | Sequence[str | Path] | None = None) -> Cache:
    """Open a cache for reading: its maps, single views, and its metadata. See `Cache`.

    This reads one small file, however large the cache is.

    Args:
        path: the cache's folder, or its URL.
        data: where the tars are now. Needed only to read images, and only if the tars were moved since the build.

    Raises:
        CacheMissError: there is no cache at this path.
        CorruptCacheError: the cache's metadata cannot be read.

    Example:
        cache = atcache.open("in1k.zarr")
        view = cache.view(sample=0)
        view.maps_LHQK.shape  # (layer, head, query, key)
    """
    from atcache.cache.cache import Cache

    return Cache(path, data=data)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - one of all public names
    if name in ("pictures", "stats"):
        value = importlib.import_module(f"atcache.{name}")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module 'atcache' has no attribute {name!r}")
    globals()[name] = value  # so that the next access does not come here again
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
