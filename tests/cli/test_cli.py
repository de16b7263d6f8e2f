"""The command line's frame: what it imports, what it says, what it exits with, and defaults from a file."""

from __future__ import annotations

import ast
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from atcache.cli.defaults import read_defaults
from atcache.cli.main import COMMANDS, LazyCommand, LazyGroup, cli
from atcache.errors import ConfigError

HEAVY = ("torch", "timm", "zarr", "numpy", "dask", "matplotlib", "webdataset", "rich")

# A real command of every kind of option, in a module of its own, as the lazy group wants it.
TOY = '''
import json, sys, time
import click
from atcache.errors import SourceError

@click.command()
@click.option("--data", required=True)
@click.option("--views", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--kl-target", type=float, default=0.005)
@click.option("--codec", type=click.Choice(["exact", "int8"]), default="exact")
@click.option("--weights", type=click.Path(exists=True), default=None)
@click.option("--layer", "layers", type=int, multiple=True)
@click.option("--resume/--no-resume", default=False)
def build(**values):
    """Build nothing."""
    if values["data"] == "missing.tar":
        raise SourceError("missing.tar does not exist: name a tar that does.")
    if values["data"] == "bug":
        raise ZeroDivisionError("ours")
    if values["data"] == "private":
        raise PermissionError(13, "Permission denied", "/private/x.zarr")
    if values["data"] == "gone":
        raise FileNotFoundError(2, "No such file or directory", "ours.bin")
    if values["data"] == "worker":
        raise BrokenPipeError("a worker has gone")
    if values["data"] == "endless":
        while True:
            print("x" * 1000)
    if values["data"] == "slow":
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    click.echo(json.dumps(values))
'''
RUN_TOY = """
import sys
from atcache.cli.main import LazyCommand, LazyGroup
LazyGroup(name="atcache", lazy_commands={"build": LazyCommand(module="toy_build", attribute="build", summary="")})()
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LazyGroup:
    """A group with the toy command, in an empty working folder."""
    (tmp_path / "toy_build.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_build", raising=False)
    command = LazyCommand(module="toy_build", attribute="build", summary="Build nothing.")
    config = click.Option(["--config"], type=click.Path(path_type=Path))
    return LazyGroup(name="atcache", lazy_commands={"build": command, "train": command}, params=[config])


@pytest.fixture
def toy_process(toy: LazyGroup) -> list[str]:
    """The command that runs the same group in a process of its own, from the working folder of `toy`."""
    return [sys.executable, "-c", RUN_TOY, "build"]


def test_help_and_version_import_nothing_heavy():
    for option in ("--help", "--version"):
        assert _imported_by(f"cli.main(['{option}'], standalone_mode=False)") == set()


def test_the_help_of_a_command_imports_nothing_heavy():
    loads = "; ".join(f"COMMANDS[{name!r}].load()" for name in COMMANDS)
    assert _imported_by(f"from atcache.cli.main import COMMANDS; {loads}") <= {"rich"}  # pack's bar


def test_the_import_guard_bites():
    assert "numpy" in _imported_by("import numpy")


def _imported_by(statement: str) -> set[str]:
    script = f"from atcache.cli.main import cli\n{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(HEAVY).intersection(json.loads(done.stdout.splitlines()[-1]))


def test_help_lists_every_command_with_its_summary():
    help_text = " ".join(CliRunner().invoke(cli, ["--help"]).output.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.summary}" in help_text


@pytest.mark.parametrize("name", COMMANDS)
def test_listed_summary_is_the_first_line_of_the_commands_help(name: str):
    command = COMMANDS[name].load()
    assert command.name == name
    assert (command.help or "").strip().splitlines()[0] == COMMANDS[name].summary


def test_help_names_the_commands_that_print_text_and_all_others_print_json():
    help_text = " ".join(CliRunner().invoke(cli, ["--help"]).output.split())
    told = re.search(r"The commands (\w+) and (\w+) print text", help_text)
    assert told is not None
    writers = {name: _what_writes_to_stdout(command) for name, command in COMMANDS.items()}
    assert set(told.groups()) == {name for name, calls in writers.items() if calls - {"options.print_json"}}
    assert {name for name, calls in writers.items() if "options.print_json" in calls} == set(COMMANDS) - {"demo"}
    assert all("--json" in CliRunner().invoke(cli, [name, "--help"]).output for name in told.groups())


def _what_writes_to_stdout(command: LazyCommand) -> set[str]:
    """The functions that the command's module calls to write to stdout."""
    source = Path(str(importlib.import_module(command.module).__file__)).read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    to_stdout = [call for call in calls if not {"err", "stderr"} & {keyword.arg for keyword in call.keywords}]
    return {ast.unparse(call.func) for call in to_stdout} & {"options.print_json", "click.echo", "print", "Console"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_explains_itself(name: str):
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Example:" in result.output
    undocumented = [p.name for p in COMMANDS[name].load().params if isinstance(p, click.Option) and not p.help]
    assert undocumented == []


def test_unknown_command_names_the_nearest():
    result = CliRunner().invoke(cli, ["biuld"])
    assert result.exit_code == 2
    assert "No such command 'biuld'. Did you mean build?" in result.stderr


def test_users_mistake_is_one_sentence_and_exit_code_1(toy: LazyGroup):
    result = CliRunner().invoke(toy, ["build", "--data", "missing.tar"])
    assert result.exit_code == 1
    assert result.stderr == "Error: missing.tar does not exist: name a tar that does.\n"
    assert result.stdout == ""


def test_a_place_that_cannot_be_written_is_one_sentence(toy: LazyGroup):
    result = CliRunner().invoke(toy, ["build", "--data", "private"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: /private/x.zarr cannot be read or written: Permission denied. Give another")
    assert result.stderr.count("\n") == 1


def test_our_bug_keeps_its_traceback(toy_process: list[str]):
    for data, message in (("bug", "ZeroDivisionError: ours"), ("gone", "FileNotFoundError")):
        done = subprocess.run([*toy_process, "--data", data], capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert message in done.stderr


def test_interruption_says_that_nothing_is_lost(toy_process: list[str]):
    # Whoever runs the tests in the background may have had it ignored.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*toy_process, "--data", "slow"], stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "Stopped. What was stored stays; type the same command again to continue.\n"


def test_output_cut_short_by_its_reader_ends_quietly(toy_process: list[str]):
    process = subprocess.Popen([*toy_process, "--data", "endless"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1
    process.stderr.close()


def test_broken_pipe_of_a_worker_is_not_hidden(toy_process: list[str]):
    done = subprocess.run([*toy_process, "--data", "worker"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "a worker has gone" in done.stderr


def test_file_gives_defaults_and_the_command_line_wins(toy: LazyGroup):
    Path("atcache.toml").write_text(
        '[build]\ndata = "a.tar"\nviews = 3\nkl_target = 1\ncodec = "int8"\nlayer = [4, 5]\nresume = true\n[train]\n'
    )
    result = CliRunner().invoke(toy, ["build", "--views", "7"])
    assert result.exit_code == 0, result.output
    from_file = {"data": "a.tar", "kl_target": 1.0, "codec": "int8", "layers": [4, 5], "resume": True}
    assert json.loads(result.output) == {**from_file, "views": 7, "weights": None}


def test_one_value_is_enough_for_an_option_that_may_come_more_than_once(toy: LazyGroup):
    Path("atcache.toml").write_text('[build]\ndata = "a.tar"\nlayer = 12\n')
    assert json.loads(CliRunner().invoke(toy, ["build"]).output)["layers"] == [12]


def test_config_option_names_another_file(toy: LazyGroup):
    Path("atcache.toml").write_text('[build]\ndata = "a.tar"\n')
    Path("other.toml").write_text('[build]\ndata = "b.tar"\n')
    result = CliRunner().invoke(toy, ["--config", "other.toml", "build"])
    assert json.loads(result.output)["data"] == "b.tar"


def test_required_option_is_asked_for_when_the_file_has_it_not(toy: LazyGroup):
    Path("atcache.toml").write_text("[build]\nviews = 2\n")
    result = CliRunner().invoke(toy, ["build"])
    assert result.exit_code == 2
    assert "Missing option '--data'" in result.stderr


def test_path_of_the_file_that_the_command_line_replaces_need_not_exist(toy: LazyGroup):
    Path("atcache.toml").write_text('[build]\ndata = "a.tar"\nweights = "gone.safetensors"\n')
    assert CliRunner().invoke(toy, ["build", "--weights", "atcache.toml"]).exit_code == 0
    assert "gone.safetensors" in CliRunner().invoke(toy, ["build"]).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[biuld]\n", "atcache.toml: 'biuld' is not a command of atcache; did you mean build?"),
        ("[serve]\n", "atcache.toml: 'serve' is not a command of atcache; expected one of build, train."),
        ("views = 2\n", "atcache.toml: 'views' is not a command of atcache; expected one of build, train."),
        ("build = 2\n", "atcache.toml: 'build' must be a table of options, written [build]."),
        (
            "[build]\nveiws = 2\n",
            "atcache.toml: [build] veiws is not an option of 'atcache build'; did you mean views?",
        ),
        ('[build]\nviews = "2"\n', "atcache.toml: [build] views = '2', but --views takes a whole number."),
        ("[build]\nviews = true\n", "atcache.toml: [build] views = True, but --views takes a whole number."),
        ("[build]\nresume = 1\n", "atcache.toml: [build] resume = 1, but --resume takes true or false."),
        ("[build]\ndata = 1\n", "atcache.toml: [build] data = 1, but --data takes text in quotes."),
        ('[build]\nlayer = [1, "2"]\n', "[build] layer = '2', but --layer takes a whole number."),
        ("[build]\nkl-target = 1\nkl_target = 1\n", "kl_target is given twice, once spelled with '-' and once"),
        ('[build]\ncodec = "int4"\n', "atcache.toml: [build] codec = 'int4' cannot be used: "),
        ("[build]\nviews = 0\n", "atcache.toml: [build] views = 0 cannot be used: 0 is not in the range x>=1."),
        ("[build\n", "atcache.toml is not valid TOML: "),
    ],
)  # fmt: skip
def test_mistake_in_the_file_is_one_sentence_with_file_and_key(toy: LazyGroup, text: str, message: str):
    Path("atcache.toml").write_text(text)
    result = CliRunner().invoke(toy, ["build", "--data", "a.tar"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("build --data a --data b", "takes one value, but is given 2: a, b. Write one pattern for all: '{a,b}'."),
        ("probe r --val-data a --val-data=b", "--val-data takes one value, but is given 2: a, b. Write one pattern"),
        ("verify c --data s3://b/x --data a", "2: s3://b/x, a. Write one pattern for all, such as '{a,b}/*.tar'."),
        ("pack --data a --data b", "--data takes one value, but is given 2: a, b. Give it once."),
        ("build --views 1 --views 2", "--views takes one value, but is given 2: 1, 2. Give it once."),
        ("build --data a.tar b.tar", "b.tar stands alone, and --data takes one pattern. Put the pattern in quotes: "),
        ("eval run --data a.tar b.tar", "b.tar stands alone, and --data takes one pattern. Put the pattern in quotes"),
        ("pretrain --teacher x", "No such option '--teacher'. Did you mean '--model'?"),
        ("build --data a --teachr x", "No such option '--teachr'. Did you mean '--teacher'?"),
        ("info a b", "Got unexpected extra argument (b)"),
    ],
)  # fmt: skip
def test_words_that_would_be_dropped_or_misread_are_refused(words: str, message: str):
    result = CliRunner().invoke(cli, words.split())
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_only_different_values_on_the_command_line_contradict_each_other(toy: LazyGroup):
    Path("atcache.toml").write_text("[build]\nviews = 2\n")
    words = ["build", "--data", "a.tar", "--data", "a.tar", "--views", "3", "--layer", "1", "--layer", "2"]
    result = CliRunner().invoke(toy, [*words, "--resume", "--no-resume"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    assert (values["data"], values["views"], values["layers"], values["resume"]) == ("a.tar", 3, [1, 2], False)


def test_broken_file_does_not_hide_the_help(toy: LazyGroup):
    Path("atcache.toml").write_text("[build\n")
    assert CliRunner().invoke(toy, ["build", "--help"]).exit_code == 0


def test_unreadable_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"gone.toml cannot be read: No such file"):
        read_defaults(tmp_path / "gone.toml", "build", click.Command("build"), all_commands=("build",))
