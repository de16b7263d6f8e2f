"""What a build costs: compared with the teacher's plain forward pass, per view as datasets grow, and to open the cache.

    python benchmarks/build.py speed --teacher NAME --data TARS [--weights FILE] [--codec int8 --codec transform]
    python benchmarks/build.py loader
    python benchmarks/build.py growth
    python benchmarks/build.py opening

`speed` runs a build's tasks and what limits them, in turns: the same teacher's plain fused forward pass on images that
are on the device already ("forward"), and rendering in as many processes, which throw the images away ("render"). It
prints their views/s and the build's share of the slower one; also the share of the time in which the device was at work
on a batch. For comparison it runs the loader alone ("loader"), and the forward pass on what it loads ("plain"), with
shares by the clock and in the processor time of all processes. Last comes the time a view takes in each stage, with
nothing else running. Without --weights the weights are random. This is right for speed, but not for fidelity.

`loader` hands over made images only, which shows what that costs beside making them.

`growth` is the store's part of a build, with random codes instead of a teacher, for 1,000 to 100,000 samples. `opening`
opens a cache of 1.3 million samples and 24 layers, in new processes. Seconds vary with the load of the machine; compare
ratios.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from build_growth import measure_growth, measure_opening
from build_speed import SpeedOptions, measure_loader, measure_speed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen measurement and print its rows."""
    options = parse(arguments)
    if options.what == "growth":
        print_rows(measure_growth(options.samples))
    elif options.what == "opening":
        print_rows([measure_opening(options.num_samples)])
    elif options.what == "loader":
        print_rows([measure_loader(options.workers, rounds=options.rounds)])
    else:
        given = {field.name: getattr(options, field.name) for field in fields(SpeedOptions)}
        print_rows(measure_speed(SpeedOptions(**given)))


def print_rows(rows: list[dict[str, object]]) -> None:
    """Print each row as a line of JSON."""
    for row in rows:
        print(json.dumps(row))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--teacher", required=True)
    speed.add_argument("--data", required=True)
    speed.add_argument("--codec", action="append")
    speed.add_argument("--weights", type=Path)
    for field in fields(SpeedOptions):
        if field.name not in ("teacher", "data", "weights", "codec"):
            option, default = f"--{field.name.replace('_', '-')}", field.default
            speed.add_argument(option, type=type(default), default=default, help=f"(default {default})")
    loader = commands.add_parser("loader")
    loader.add_argument("--workers", type=int, default=SpeedOptions.workers)
    loader.add_argument("--rounds", type=int, default=3)
    growth = commands.add_parser("growth")
    growth.add_argument("--samples", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    opening = commands.add_parser("opening")
    opening.add_argument("--num-samples", type=int, default=1_300_000)
    options = parser.parse_args(arguments)
    if options.what == "speed" and options.codec is None:
        options.codec = SpeedOptions.codec
    return options


if __name__ == "__main__":
    main()
