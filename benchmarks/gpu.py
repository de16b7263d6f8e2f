"""Everything that only a GPU can tell, most important first, within a few minutes.

    python benchmarks/gpu.py --minutes 8 --out FOLDER [--only kernels,step]

Each stage is a command of its own with its own time limit, so one that hangs or fails costs no other stage. What it
prints goes to the terminal and to FOLDER/STAGE.txt; FOLDER/summary.json says how each stage ended. A stage gets no more
than what is left of the minutes. If a stage failed or was stopped, the exit status is 1. It runs from a copy of the
repository, beside any torch from 2.6 on: if atcache is not installed from here, it is installed into FOLDER, without
the network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
LEAST_S = 5
"""A stage for which less is left is not begun."""


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str
    most_s: int
    """It is stopped after so many seconds."""
    arguments: Sequence[str]
    """What follows `python`."""
    environment: dict[str, str] = field(default_factory=dict)


def benchmark(name: str, *arguments: str) -> list[str]:
    return [str(BENCHMARKS / name), *arguments]


# The machine's other packages may be older than ours and warn of things that are no faults.
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests")]
ATCACHE = ["-m", "atcache.cli.main"]
WORKERS = str(max(1, (os.cpu_count() or 2) - 1))
# ViT-L with as many components a layer as DINOv2's ViT-S has at KL 0.005, by its share of the width: two thirds.
VIT_L = ["--geometry", "vit-l", "--batch-size", "128", "--precision", "bf16", "--transform-components", "680"]
# All but the first stages work in --out, on what the stage "data" makes there.
STAGES = [
    Stage("tests", 120, PYTEST, {"ATCACHE_TEST_GPU": "1"}),
    Stage("kernels", 60, benchmark("gpu_kernels.py")),
    Stage("step", 90, benchmark("train_step.py", *VIT_L, "--rounds", "3", "--limit-s", "60")),
    Stage("step-compiled", 120, benchmark("train_step.py", *VIT_L, "--rounds", "3", "--limit-s", "60", "--compile")),
    Stage("data", 40, benchmark("gpu_data.py", ".")),
    Stage(
        "build-speed",
        90,
        benchmark(
            "build.py", "speed", "--teacher", "vit_small_patch16_224", "--weights", "weights.safetensors",
            "--data", "photos", "--samples", "2048", "--samples-per-shard", "512", "--batch-size", "128",
            "--codec", "transform", "--rounds", "2", "--limit-s", "40", "--workers", WORKERS,
        ),
    ),
    Stage(
        "cache",
        90,
        [
            *ATCACHE, "build", "--teacher", "vit_small_patch16_224", "--weights", "weights.safetensors",
            "--data", "photos", "--out", "stored.zarr", "--pixels", "store", "--workers", WORKERS,
        ],
    ),
    Stage(
        "train-run",
        90,
        benchmark(
            "train_run.py", "--cache", "stored.zarr", "--mode", "copy", "--mode", "distill",
            "--workers", WORKERS, "--limit-s", "10",
        ),
    ),
    Stage("loader", 20, benchmark("build.py", "loader", "--workers", WORKERS)),
    Stage("kernels-half-width", 45, benchmark("gpu_kernels.py", "--value-dim", "32")),
    Stage("tilings", 150, benchmark("gpu_kernels.py", "--tune")),
]  # fmt: skip


def environment_of(out: Path) -> dict[str, str]:
    """An environment in which `atcache` is this copy of the repository."""
    asked = [sys.executable, "-c", "import atcache.pipelines, atcache; print(atcache.__file__)"]
    found = subprocess.run(asked, capture_output=True, text=True, cwd=out).stdout.strip()
    if found and Path(found).is_relative_to(ROOT):
        return dict(os.environ)
    site = out / "site"
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(ROOT)], check=True)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(stage: Stage, most_s: float, out: Path, environment: dict[str, str]) -> dict[str, object]:
    """Run a stage, show and keep what it prints, and say how it ended."""
    print(f"\n== {stage.name}: python {' '.join(stage.arguments)}", flush=True)
    start_s = time.monotonic()
    log = out / f"{stage.name}.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *stage.arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=out,  # where no folder is called atcache, which Python would take for all of it
            env={**environment, **stage.environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            ended = "finished" if process.wait(most_s) == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {most_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its worker processes too
            process.wait()
    print(log.read_text(errors="replace"), end="")
    seconds = round(time.monotonic() - start_s, 1)
    print(f"== {stage.name}: {ended}, {seconds} s", flush=True)
    return {"stage": stage.name, "command": ["python", *stage.arguments], "ended": ended, "seconds": seconds}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help=f"stages to run, of {', '.join(stage.name for stage in STAGES)}; default all")
    options = parser.parse_args(arguments)
    options.names = [stage.name for stage in STAGES] if options.only is None else options.only.split(",")
    if unknown := set(options.names) - {stage.name for stage in STAGES}:
        parser.error(f"--only {', '.join(sorted(unknown))}: there is no such stage; see --help.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    end_s = time.monotonic() + 60 * options.minutes
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = environment_of(out)
    ends = []
    for stage in STAGES:
        left_s = end_s - time.monotonic()
        if stage.name in options.names and left_s > LEAST_S:
            ends.append(run(stage, min(stage.most_s, left_s), out, environment))
        elif stage.name in options.names:
            ends.append({"stage": stage.name, "ended": "not begun: no time was left"})
        (out / "summary.json").write_text(json.dumps(ends, indent=2) + "\n")
    for end in ends:
        print(f"{end['stage']:20} {end['ended']}")
    if any(end["ended"].startswith(("failed", "stopped")) for end in ends):
        sys.exit(1)


if __name__ == "__main__":
    main()
