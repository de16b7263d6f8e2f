"""The commands as functions: `atcache.build(teacher=..., data=..., out=...)` does what `atcache build` does.

Each function takes the fields of its command's config as keywords, so it can do all that the command can.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar, cast

from atcache.errors import ConfigError

from .build.config import BuildConfig
from .build.run import build as run_build
from .compare.config import CompareConfig
from .compare.run import compare as run_compare
from .evaluate.config import EvaluateConfig
from .evaluate.run import evaluate as run_evaluate
from .maps.config import MapsConfig
from .maps.run import maps as run_maps
from .merge.config import MergeConfig
from .merge.run import merge as run_merge
from .options import options_of
from .pack.config import PackConfig
from .pack.run import pack as run_pack
from .plan.config import PlanConfig
from .plan.run import plan as run_plan
from .pretrain.config import PretrainConfig
from .pretrain.run import pretrain as run_pretrain
from .probe.config import ProbeConfig
from .probe.run import probe as run_probe
from .publish.config import PullConfig, PushConfig
from .publish.pull import pull as run_pull
from .publish.push import push as run_push
from .report.after_training import train as run_train, train_sweep as run_train_sweep
from .report.config import ReportConfig
from .report.run import report as run_report
from .show.config import ShowConfig
from .show.run import show as run_show
from .train.config import TrainConfig
from .train.recipes import read_recipe, views_to_draw
from .train.summary import SweepResult
from .train.sweep import sweep_configs
from .verify.config import VerifyConfig
from .verify.run import verify as run_verify

_Fields = ParamSpec("_Fields")
_Config = TypeVar("_Config")
_Result = TypeVar("_Result")


def _function(
    config_class: Callable[_Fields, _Config],
    run: Callable[[_Config], _Result],
    doc: str,
    recipes_of: Literal["build", "train"] | None = None,
) -> Callable[_Fields, _Result]:
    """A function that makes a config from keywords and runs it.

    Args:
        config_class: made with `pipelines.options.config`; its signature becomes the function's.
        run: does what the config says.
        doc: the docstring without its arguments, which come from the fields.
        recipes_of: the recipe's table that fills in what is not passed; None if the command takes no recipes.
    """

    def function(*args: _Fields.args, **fields: _Fields.kwargs) -> _Result:
        if recipes_of is not None:
            wanted = _with_recipe(recipes_of, cast("type[Any]", config_class), dict(fields))
            return run(cast("Callable[..., _Config]", config_class)(**wanted))
        return run(config_class(*args, **fields))

    summary, _, rest = inspect.cleandoc(doc).partition("\n\nReturns:")
    function.__name__ = function.__qualname__ = run.__name__
    function.__doc__ = f"{summary}\n\nArgs:\n{_describe(cast('type[Any]', config_class))}\n\nReturns:{rest}"
    # The signature of a dataclass says "-> None".
    function.__signature__ = inspect.signature(config_class).replace(  # type: ignore[attr-defined]
        return_annotation=inspect.signature(run).return_annotation
    )
    return function


def _describe(config_class: type[Any]) -> str:
    lines = [f"{name}: {about.help}" for name, (_, about, _) in options_of(config_class).items()]
    return "\n".join(
        textwrap.fill(line, 110, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)
        for line in lines
    )


def _with_recipe(command: str, config_class: type[Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, filled up with the settings of their recipe.

    Raises:
        ConfigError: there is no such recipe, it sets nothing for the command, or it sets an unknown option.
    """
    name = fields.get("recipe")
    if name is None:
        return fields
    settings = read_recipe(name)[command]
    if command == "train" and not fields.get("cache"):
        settings = {**views_to_draw(name), **settings}
    if not settings:
        raise ConfigError(f"recipe {name}: it has no table [{command}], so it sets nothing here.")
    if unknown := sorted(settings.keys() - options_of(config_class).keys()):
        raise ConfigError(f"recipe {name}: [{command}] {unknown[0]} is not an option of `atcache {command}`.")
    return {**settings, **fields}


build = _function(
    BuildConfig,
    run_build,
    """Run the teacher once over a dataset and keep its attention in a cache.

    The same call continues a build that was stopped, and ends with the same bytes. Instead of `scheduler`, `client`
    may be a `distributed.Client`.

    Returns:
        What was planned and done. A dry run writes nothing.

    Raises:
        AtcacheError: a child of it names what does not fit. What was stored before stays.

    Example:

        atcache.build(teacher="mae-vit-l", data="train-{000000..001281}.tar", out="in1k.zarr", views=2)
    """,
    recipes_of="build",
)

train = _function(
    TrainConfig,
    run_train,
    """Train a student from a cache, or from scratch.

    The same call continues a run that was stopped. At the end, a page about the run is written into its folder.

    Returns:
        The run's losses, scores and speed.

    Raises:
        AtcacheError: a child of it names what does not fit. A checkpoint that was saved stays valid.

    Example:

        atcache.train(mode="copy", cache="in1k.zarr", val_cache="in1k-val.zarr", out="runs/copy")
    """,
    recipes_of="train",
)

evaluate = _function(
    EvaluateConfig,
    run_evaluate,
    """Measure the accuracy of finished runs, alone and averaged, on one or several sets of images.

    Returns:
        The scores by set and run. `score` is that of the first set: of the run, or of the mean of the probabilities.

    Raises:
        AtcacheError: a run is not finished, or the data do not fit it.

    Example:

        atcache.evaluate(runs="runs/copy", cache="in1k-val.zarr").score.top1
    """,
)

report = _function(
    ReportConfig,
    run_report,
    """Write a page about a finished run: curves, accuracy, agreement with the teacher, mistakes and pictures.

    `train` writes one at its end. Both passes over validation samples stop after half a minute.

    Returns:
        Where the page is, how many samples it shows, and what could not be shown.

    Raises:
        AtcacheError: there is no finished run, or the validation data that are given do not fit it.

    Example:

        atcache.report(run="runs/distill", val_cache="in1k-val.zarr").out
    """,
)

maps = _function(
    MapsConfig,
    run_maps,
    """Store a trained student's own attention in a cache, in the form of a teacher's.

    By default it has the samples and views of the cache that the student was trained from. Instead of `scheduler`,
    `client` may be a `distributed.Client`.

    Returns:
        What was planned and done. A dry run writes nothing.

    Raises:
        ConfigError: the run is not finished, or its student copies attention and so has none of its own.
        AtcacheError: a child of it names what does not fit. What was stored before stays.

    Example:

        atcache.maps(run="runs/distill", out="distill.zarr")
    """,
)

verify = _function(
    VerifyConfig,
    run_verify,
    """Prove that a cache is whole and, if its teacher is given, that it is faithful.

    Instead of `scheduler`, `client` may be a `distributed.Client`.

    Returns:
        All problems, and what was checked. After a repair, these are the problems found before it.

    Raises:
        CacheMissError, CorruptCacheError: there is no cache, or its zarr.json cannot be read at all.
        CacheMismatchError: the teacher is not the one that the cache was built with.

    Example:

        assert not atcache.verify(cache="in1k.zarr").problems
    """,
)

compare = _function(
    CompareConfig,
    run_compare,
    """Say how near the maps of two caches are to each other, on the views that both have.

    Returns:
        Tables of layers x heads, means, and the views where the maps are furthest apart.

    Raises:
        CacheMissError: there is no cache, or it does not store the layers and heads that are asked for.
        CacheMismatchError: the caches have no views in common, or their maps cannot be compared.

    Example:

        atcache.compare(a="in1k.zarr", b="distill.zarr", sample=32).mean["kl_nats"]
    """,
)

show = _function(
    ShowConfig,
    run_show,
    """Draw the maps of one view: over it, carried back to the clean image, and side by side.

    Returns:
        What was drawn, and the top of its scale.

    Raises:
        CacheMissError: there is no such sample, view or layer in the cache.
        ConfigError: there is no such query, or pictures of that kind cannot be written.

    Example:

        atcache.show(cache="in1k.zarr", sample="0", layer="8", query="5,7", out="maps.png")
    """,
)

merge = _function(
    MergeConfig,
    run_merge,
    """Join caches of parts of a dataset, made on different machines.

    Shards are linked where the disk allows it, else copied. The parts stay as they are.

    Returns:
        What was made, and how many bytes were copied.

    Raises:
        CacheMismatchError: two caches are not parts of one; the message names each difference.
        DiskFullError: shards must be copied, and do not fit.

    Example:

        atcache.merge(caches=("part-0.zarr", "part-1.zarr"), out="merged.zarr")
    """,
)

push = _function(
    PushConfig,
    run_push,
    """Publish a cache: send it to a dataset repository of a Hugging Face hub.

    The same call continues a push that was stopped, or sends what has changed since.

    Returns:
        What was sent, and the commit that has it.

    Raises:
        CacheMismatchError: the cache is not complete, or another cache is there.
        RemoteError: the hub cannot be reached, or refuses.

    Example:

        atcache.push(cache="in1k.zarr", to="hf://datasets/ORG/NAME", create="private")
    """,
)

pull = _function(
    PullConfig,
    run_pull,
    """Fetch a cache from a hub or another server, or some of its views and tars.

    The same call continues a pull that was stopped.

    Returns:
        What was fetched.

    Raises:
        CacheMissError: there is no cache at that place.
        CacheMismatchError: it is not complete, or `out` holds another cache.
        CorruptCacheError: a file there is not what its commit record says.
        RemoteError: the server cannot be read.

    Example:

        atcache.pull(cache="hf://datasets/ORG/NAME", out="in1k.zarr", views=1)
    """,
)

plan = _function(
    PlanConfig,
    run_plan,
    """Say how much space and time a cache would take, and whether it would pay. Nothing that it writes stays.

    Returns:
        Sizes, fidelity and times of each codec, and the decision.

    Raises:
        AtcacheError: a child of it names what does not fit.

    Example:

        print(atcache.plan(teacher="mae-vit-l", data="train-{000000..001281}.tar").decision.sentence)
    """,
)

probe = _function(
    ProbeConfig,
    run_probe,
    """Measure in minutes whether a teacher's attention helps on your images, with pairs of small training runs.

    The same call continues a probe that was stopped; more seeds add pairs.

    Returns:
        The difference in accuracy with its uncertainty, and the answer.

    Raises:
        AtcacheError: a child of it names what does not fit.

    Example:

        print(atcache.probe(teacher="mae-vit-l", data="train-{0000..0099}.tar", out="probe").sentence)
    """,
)

pack = _function(
    PackConfig,
    run_pack,
    """Pack folders of images, or Hugging Face image datasets, into WebDataset tars.

    Returns:
        How many images, classes and tars there are, and what was left out.

    Raises:
        SourceError: there is nothing to pack, an image cannot be read, or tars of that name exist.
        DiskFullError: the tars do not fit on the disk.

    Example:

        atcache.pack(data="imagenet/train", out="tars")
    """,
)

pretrain = _function(
    PretrainConfig,
    run_pretrain,
    """Pre-train a teacher as a masked autoencoder, without labels.

    The same call continues a run that was stopped. The result, `out`/model.safetensors, is a plain timm state dict.

    Returns:
        The run's losses and speed.

    Raises:
        AtcacheError: a child of it names what does not fit.

    Example:

        atcache.pretrain(model="vit_small_patch16_224", data="train-{0000..0099}.tar", out="teacher", workers=8)
    """,
)


def train_sweep(students: Mapping[str, Mapping[str, Any]], **common: Any) -> list[SweepResult]:  # noqa: ANN401 - fields of TrainConfig
    """Train several students from one stream of batches, which is read only once.

    On a CPU, each student ends up bit for bit the same as if `train` had trained it alone with the same order seed. A
    student whose loss becomes NaN is given up, and the others continue.

    Args:
        students: the name of each student, which is also the name of its folder, and its own keywords of `train`.
        common: keywords of `train` that all students share; the students' folders are in `out`.

    Raises:
        ConfigError: the students cannot share one stream, or a keyword does not exist.
        AtcacheError: as `train`.

    Example:

        atcache.train_sweep({"a": {}, "b": {"base_lr": 3e-4}}, mode="copy", cache="in1k.zarr", out="runs")
    """
    return run_train_sweep(sweep_configs(students, _with_recipe("train", TrainConfig, common)))
