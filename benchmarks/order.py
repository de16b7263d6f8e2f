"""How well `--shuffle block` mixes, compared with `--shuffle global`, and how long its reads from a disk are.

    python benchmarks/order.py [--samples 200000] [--classes 200] [--batch-size 256]

Samples are sorted by class, the worst case for blocks. `atcache pack` shuffles its tars, and on shuffled tars all
orders mix equally well. For one epoch, it prints the entropy of the classes within a batch; the share of pairs in a
batch that have the same class; the rank correlation between a sample's place in the order and its row; the median
distance, in rows, from one read to the next; and the number of neighbouring rows in one read, if a window is read ahead
in the order of its rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from atcache.choices import SHUFFLES
from atcache.feed.order import SampleOrder


def entropy_bits(label_NB: np.ndarray) -> float:
    """Mean entropy of the classes within a batch."""
    entropies: list[float] = []
    for label_B in label_NB:
        share_C = np.unique(label_B, return_counts=True)[1] / len(label_B)
        entropies.append(float(-(share_C * np.log2(share_C)).sum()))
    return float(np.mean(entropies))


def pairs_of_one_class(label_NB: np.ndarray) -> float:
    """Share of pairs within a batch that have the same class."""
    shares: list[float] = []
    for label_B in label_NB:
        count_C = np.unique(label_B, return_counts=True)[1]
        shares.append(float((count_C * (count_C - 1)).sum() / (len(label_B) * (len(label_B) - 1))))
    return float(np.mean(shares))


def rows_per_read(order: SampleOrder, num_steps: int) -> float:
    """Mean number of neighbouring rows that are read at once."""
    places = list(dict.fromkeys(place for step in range(num_steps) for place in order.windows(step)))
    if not places:
        return 1.0
    runs = samples = 0
    for place in places:
        window_S = order.window_samples(*place)
        samples += len(window_S)
        runs += 1 + int((np.diff(window_S) > 1).sum())
    return samples / runs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=256)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parse(arguments)
    size = options.batch_size
    num_steps = options.samples // size
    label_S = np.arange(options.samples) * options.classes // options.samples
    print(
        "| order | entropy of classes, bits | pairs of one class | rank correlation | rows to next read | rows a read |"
    )
    print("|---|---|---|---|---|---|")
    for name in ("sorted", *SHUFFLES):
        order = None
        if name == "sorted":
            rows = np.arange(options.samples)
        else:
            order = SampleOrder(sample_S=np.arange(options.samples), seed=0, batch_size=size, shuffle=name)
            rows = np.array([sample for step in range(num_steps) for sample, _ in order.batch(step)])
        label_NB = label_S[rows[: num_steps * size]].reshape(num_steps, size)
        correlation = float(np.corrcoef(np.arange(len(rows)), rows)[0, 1])  # both are ranks
        cells = [
            f"{entropy_bits(label_NB):.2f}",
            f"{pairs_of_one_class(label_NB):.4f}",
            f"{correlation:+.3f}",
            f"{np.median(np.abs(np.diff(rows))):.0f}",
            "all" if order is None else f"{rows_per_read(order, num_steps):.0f}",
        ]
        print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    main()
