"""The `atcache` command: finds the sub-command that is wanted and imports only that one.

Only here do errors become messages. A user's mistake, or a place that cannot be read or written, prints one sentence
and exits with code 1. An interruption prints that nothing is lost. A bug of ours keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import select
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import click

from atcache import __version__
from atcache.errors import AtcacheError
from atcache.machine import limit_threads

from ..pipelines.pages.plain import plain
from .defaults import DEFAULT_FILE, read_defaults
from .paths import EXISTING_FILE
from .typed import refuse_misread

# Errors that are due to a path or to the machine, not to our code: no permission, a file in place of a folder, a long
# name, no space, too many open files.
_PATH_ERRORS = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.EFBIG,
        errno.EIO,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ESTALE,
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LazyCommand:
    """Where a sub-command is, and its line in the list of commands; known without importing it."""

    module: str
    """Full name of the module."""
    attribute: str
    """Name of the click command in it."""
    summary: str
    """The first line of its help."""

    def load(self) -> click.Command:
        """The command itself; imports its module and whatever that needs."""
        return getattr(importlib.import_module(self.module), self.attribute)


def _command(name: str, summary: str, *, attribute: str | None = None) -> LazyCommand:
    attribute = attribute or name
    return LazyCommand(module=f"atcache.cli.{attribute}", attribute=attribute, summary=summary)


# `atcache --help` prints these lines; a test checks that each is the first line of its command's docstring.
COMMANDS: dict[str, LazyCommand] = {
    "plan": _command("plan", "Say what a cache would cost, and whether it would pay off."),
    "probe": _command("probe", "Measure in minutes whether a teacher's attention helps on your images."),
    "build": _command("build", "Run the teacher once over a dataset and keep its attention in a cache."),
    "merge": _command("merge", "Join caches of parts of a dataset, made on different machines."),
    "push": _command("push", "Publish a cache: send it to a dataset repository of a Hugging Face hub."),
    "pull": _command("pull", "Fetch a cache from a hub or another server, or a part of it."),
    "train": _command("train", "Train a student from a cache, or from scratch."),
    "eval": _command("eval", "Measure the accuracy and calibration of finished runs.", attribute="evaluate"),
    "report": _command("report", "Write a page about a finished run: curves, accuracy, maps and mistakes."),
    "maps": _command("maps", "Store the attention of a trained student in a cache of its own."),
    "pretrain": _command("pretrain", "Pre-train a teacher as a masked autoencoder, without labels."),
    "pack": _command("pack", "Pack folders of images into WebDataset tars."),
    "info": _command("info", "Show what a cache holds, and what is missing."),
    "stats": _command("stats", "Show what each layer and head attends to, in a few numbers."),
    "compare": _command("compare", "Say how near the maps of two caches are to each other."),
    "show": _command("show", "Draw the maps of one view: over it, carried back to the clean image, side by side."),
    "view": _command("view", "Look at maps in the browser, without model and GPU."),
    "verify": _command("verify", "Check that a cache is whole and, given its teacher, that it is faithful."),
    "demo": _command("demo", "Show attention transfer end to end on a small dataset, without a download."),
}


class Stopped(click.ClickException):
    """The user interrupted a command."""

    exit_code = 130

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(self.format_message(), file=file, err=file is None)


class LazyGroup(click.Group):
    """A group whose sub-commands are imported when they are run, with defaults from a TOML file."""

    def __init__(self, *, lazy_commands: Mapping[str, LazyCommand], **settings: Any) -> None:  # noqa: ANN401 (click's own)
        super().__init__(**settings)
        self.lazy_commands = lazy_commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy_commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self.lazy_commands.get(cmd_name)
        return found and found.load()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in self.lazy_commands.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.lazy_commands and not args[0].startswith("-"):
            nearest = get_close_matches(args[0], self.lazy_commands, n=1)
            hint = f"Did you mean {nearest[0]}?" if nearest else f"There are {', '.join(self.lazy_commands)}."
            ctx.fail(f"No such command '{args[0]}'. {hint}")
        name, command, rest = super().resolve_command(ctx, args)
        # The help must work even if the file of defaults is broken.
        if name is not None and command is not None and not {"-h", "--help"}.intersection(rest):
            if not ctx.resilient_parsing:
                refuse_misread(command, click.Context(command, parent=ctx, info_name=name), rest)
            ctx.default_map = {name: self._defaults(ctx, name, command)}
        return name, command, rest

    def _defaults(self, ctx: click.Context, name: str, command: click.Command) -> dict[str, Any]:
        config: Path | None = ctx.params.get("config")
        if config is None and not Path(DEFAULT_FILE).exists():
            return {}
        return read_defaults(config or Path(DEFAULT_FILE), name, command, all_commands=tuple(self.lazy_commands))

    def invoke(self, ctx: click.Context) -> object:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except AtcacheError as error:
            raise click.ClickException(plain(str(error))) from error
        except KeyboardInterrupt as error:
            raise Stopped("Stopped. What was stored stays; type the same command again to continue.") from error
        except BrokenPipeError as error:
            # click ends quietly on these. That is right if the reader of our output has gone (`| head`), but a worker's
            # broken pipe is a failure and must be seen.
            if not _stdout_reader_has_gone():
                raise RuntimeError("a pipe to another process broke") from error
            raise
        except OSError as error:
            if error.errno not in _PATH_ERRORS:
                raise
            place = "the output or a file" if error.filename is None else str(error.filename)
            raise click.ClickException(
                f"{place} cannot be read or written: {error.strerror}. Give another path, or free space and check its "
                "permissions and the limit of open files. What was stored stays."
            ) from error
        return result


def _stdout_reader_has_gone() -> bool:
    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
    except OSError:  # stdout is not a file
        return False
    return any(event & select.POLLERR for _, event in watch.poll(0))


@click.command(cls=LazyGroup, lazy_commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="atcache")
@click.option(
    "--config",
    type=EXISTING_FILE,
    help=f"TOML file with defaults for any option of any command.  [default: {DEFAULT_FILE}, if there is one]",
)
@click.pass_context
def cli(ctx: click.Context, config: Path | None) -> None:
    """Run the teacher once, keep its attention, train students from it.

    Most commands print their result as one line of JSON on stdout; `train --sweep` prints one line for each student.
    The commands info and demo print text. With --json, info prints JSON instead, and demo also writes JSON to a file.
    Progress and notes go to stderr.

    Any option's default can be kept in atcache.toml, in a table named like the command.

    Example:

    \b
        atcache demo
        atcache build --help
    """
    del config  # LazyGroup reads the file, once it knows the command
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("atcache").setLevel(logging.INFO)
    if ctx.invoked_subcommand not in (None, "build", "train"):
        from ..pipelines.running.ranks import Ranks

        Ranks.from_environment().refuse_several(f"`atcache {ctx.invoked_subcommand}`")


def main() -> None:
    """Entry point of the console script."""
    limit_threads(os.environ)
    cli(prog_name="atcache")


if __name__ == "__main__":
    main()
