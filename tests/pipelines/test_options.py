"""An option is one thing: a field of a config, an option of its command and an argument of its function."""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Literal

import click
import pytest

from atcache.cli.main import COMMANDS, cli
from atcache.errors import ConfigError
from atcache.files.location import Location, parse_location
from atcache.pipelines import api
from atcache.pipelines.build.config import BuildConfig
from atcache.pipelines.compare.config import CompareConfig
from atcache.pipelines.demo.config import DemoConfig
from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.pipelines.maps.config import MapsConfig
from atcache.pipelines.merge.config import MergeConfig
from atcache.pipelines.options import config, option, options_of
from atcache.pipelines.pack.config import PackConfig
from atcache.pipelines.plan.config import PlanConfig
from atcache.pipelines.pretrain.config import PretrainConfig
from atcache.pipelines.probe.config import ProbeConfig
from atcache.pipelines.publish.config import PullConfig, PushConfig
from atcache.pipelines.report.config import ReportConfig
from atcache.pipelines.running.commands import as_command
from atcache.pipelines.show.config import ShowConfig
from atcache.pipelines.stats.config import StatsConfig
from atcache.pipelines.train.config import TrainConfig
from atcache.pipelines.verify.config import VerifyConfig
from atcache.pipelines.view.config import ViewConfig

CONFIGS = {
    "build": BuildConfig,
    "train": TrainConfig,
    "eval": EvaluateConfig,
    "report": ReportConfig,
    "verify": VerifyConfig,
    "maps": MapsConfig,
    "merge": MergeConfig,
    "push": PushConfig,
    "pull": PullConfig,
    "plan": PlanConfig,
    "probe": ProbeConfig,
    "pack": PackConfig,
    "pretrain": PretrainConfig,
    "stats": StatsConfig,
    "compare": CompareConfig,
    "show": ShowConfig,
    "view": ViewConfig,
    "demo": DemoConfig,
}
# What a command has beyond its config, and why.
OF_THE_COMMAND_ALONE = {
    "train": {"sweep"},  # a file that makes several configs; train_sweep takes them as dicts
    "demo": {"json_file"},  # where the result goes
}
SHORT_NAMES = {("show", "out"): ["-o"]}  # beside the long ones
# What a function has beyond the options of its command, and why.
OF_PYTHON_ALONE = {name: {"client"} for name in ("build", "maps", "verify")}  # an open client, instead of --scheduler


def command_of(name: str) -> click.Command:
    return COMMANDS[name].load()


def test_every_command_but_info_has_a_config():
    assert CONFIGS.keys() == COMMANDS.keys() - {"info"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_command_has_the_options_of_its_config_and_no_others(name):
    parameters = {parameter.name: parameter for parameter in command_of(name).params}
    options = options_of(CONFIGS[name])
    assert parameters.keys() - OF_THE_COMMAND_ALONE.get(name, set()) == options.keys()
    for field_name, (field, about, kind) in options.items():
        parameter = parameters[field_name]
        if about.is_argument:
            assert isinstance(parameter, click.Argument)
            continue
        assert isinstance(parameter, click.Option)
        assert parameter.help == about.help
        assert parameter.opts == [*SHORT_NAMES.get((name, field_name), []), f"--{field_name.replace('_', '-')}"]
        assert parameter.required == (field.default is MISSING and field_name != "mode")
        if kind.choices:
            assert tuple(parameter.type.choices) == kind.choices
        if field.default is not MISSING and not kind.takes_several:
            assert parameter.default == field.default


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"demo", "stats", "view"}))
def test_a_function_has_the_arguments_of_its_config_and_tells_what_they_are(name):
    function = getattr(api, "evaluate" if name == "eval" else name)
    parameters = inspect.signature(function).parameters
    told = {name: " ".join(line.split()) for name, line in _arguments_told(function).items()}
    for field_name, (field, about, _) in options_of(CONFIGS[name]).items():
        default = parameters[field_name].default
        assert default is (inspect.Parameter.empty if field.default is MISSING else default)
        assert field.default is MISSING or default == field.default
        assert told[field_name] == " ".join(about.help.split())
    assert parameters.keys() - OF_PYTHON_ALONE.get(name, set()) == options_of(CONFIGS[name]).keys()
    for part in ("Returns:", "Raises:", "Example:"):
        assert f"\n{part}\n" in function.__doc__


def _arguments_told(function) -> dict[str, str]:
    lines = function.__doc__.partition("\nArgs:\n")[2].partition("\n\n")[0].splitlines()
    told: dict[str, str] = {}
    for line in lines:
        if not line.startswith(" " * 8):
            name, _, text = line.strip().partition(": ")
            told[name] = text
        else:
            told[name] += " " + line.strip()
    return told


@pytest.mark.parametrize("name", CONFIGS)
def test_help_says_each_option_with_its_choices_and_range(name):
    text = " ".join(command_of(name).get_help(click.Context(command_of(name), info_name=name)).split())
    for field_name, (_, about, kind) in options_of(CONFIGS[name]).items():
        if about.is_argument:
            continue
        assert f"--{field_name.replace('_', '-')}" in text
        assert "|".join(kind.choices) in text
        if about.above is not None:
            assert f"{about.above}<x" in text or f"x>{about.above}" in text
        assert about.help, "an option without a word of help"
    assert "Example:" in text


TYPED = [
    PackConfig(data=Path("my images"), out=Path("tars"), name="pets", in_order=True, samples_per_tar=5),
    BuildConfig(
        teacher="demo-mae",
        data="my tars/a.tar",
        out=Path("c.zarr"),
        policy="eval",
        workers=0,
        layers="0-2",
        dry_run=True,
    ),
    BuildConfig(teacher="a", data="b", out=Path("c.zarr"), codec_from=parse_location("s3://bucket/c.zarr")),
    TrainConfig(mode="copy", cache=Path("c.zarr"), out=Path("r"), steps=5, live_teacher=True, ema=0.99),
    TrainConfig(
        mode="distill",
        cache=(Path("a.zarr"), parse_location("https://example.org/b.zarr")),
        data=("a.tar", "b.tar"),
        out=Path("r"),
        recipe="distill-vit-l",
    ),
    PretrainConfig(model="vit_tiny_patch16_224", data="a.tar", out=Path("t"), normalise_targets=False),
    EvaluateConfig(runs=(Path("a"), Path("b c")), cache=Path("v.zarr"), workers=2),
    VerifyConfig(cache=Path("c.zarr"), all=True, repair=True),
    VerifyConfig(cache=parse_location("s3://bucket/c.zarr"), sample=0),
    PlanConfig(teacher="demo-mae", data="a.tar", codec=("int8", "exact"), assume=("samples=10", "disk-free-tb=1")),
    DemoConfig(seeds=3, pretrain=True),
]


@pytest.mark.parametrize("typed", TYPED, ids=lambda typed: type(typed).__name__)
def test_a_command_made_from_a_config_is_parsed_into_the_same_config(typed):
    name = next(name for name, config_class in CONFIGS.items() if type(typed) is config_class)
    words = shlex.split(as_command(name, typed))
    assert words[:2] == ["atcache", name]
    command = cli.get_command(click.Context(cli), name)
    recipe = ["--recipe", typed.recipe] if getattr(typed, "recipe", None) else []
    given = [word for word in words[2:] if word not in recipe]  # a recipe would set other options
    parsed = command.make_context(name, given).params
    fields = options_of(type(typed))
    extra = {key: value for key, value in parsed.items() if key not in fields and value}
    assert extra == {}
    values = {key: value for key, value in parsed.items() if key in fields}
    if recipe:
        values["recipe"] = typed.recipe
    assert type(typed)(**values) == typed


@config
class Settings:
    """One option of each kind."""

    path: Path = option("A path.")
    count: int = option("A count.", default=1, at_least=1)
    share: float = option("A share.", default=0.5, above=0, below=1)
    size: int | None = option("A size.", default=None, at_least=0, at_most=9)
    way: Literal["on", "off"] = option("A way.", default="on")
    flag: bool = option("A flag.", default=False)
    places: Location | tuple[Location, ...] | None = option("Places.", default=None)
    names: tuple[str, ...] = option("Names.", default=())


def test_texts_become_paths_and_lists_tuples():
    made = Settings(path="a/b", places=["x.zarr", "s3://bucket/y.zarr"], names="one")
    assert made.path == Path("a/b")
    assert made.places == (Path("x.zarr"), parse_location("s3://bucket/y.zarr"))
    assert made.names == ("one",)
    assert Settings(path=Path("a"), places="x.zarr").places == Path("x.zarr")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count=0: expected at least 1."),
        ({"count": 1.5}, "count=1.5: expected a whole number."),
        ({"count": True}, "count=True: expected a whole number."),
        ({"count": None}, "count=None: expected a whole number."),
        ({"path": None}, "path is missing: give --path, or path= in Python. A path."),
        ({"share": 1.0}, "share=1.0: expected more than 0 and less than 1."),
        ({"share": float("nan")}, "share=nan: expected a finite number."),
        ({"share": "0.5"}, "share='0.5': expected a number."),
        ({"size": 10}, "size=10: expected 0 to 9."),
        ({"way": "of"}, "way='of': expected one of on, off."),
        ({"flag": "yes"}, "flag='yes': expected True or False."),
        ({"path": 3}, "path=3: expected a path."),
        ({"places": [3]}, "places[0]=3: expected a path or a URL."),
        ({"places": "ftp://x/y"}, "ftp://x/y"),
        ({"names": [1]}, "names[0]=1: expected text."),
    ],
)
def test_what_an_option_does_not_take_is_refused_in_a_sentence(fields, message):
    with pytest.raises(ConfigError) as raised:
        Settings(**{"path": "p", **fields})
    assert message in str(raised.value)


def test_configs_import_nothing_slow():
    modules = sorted({config_class.__module__ for config_class in CONFIGS.values()})
    code = f"import sys, {', '.join(modules)}\n"
    code += "print(sorted({'torch', 'numpy', 'zarr', 'dask', 'timm', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
