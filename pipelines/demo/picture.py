"""A picture of some cached maps over their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import atcache
from atcache.files.durable import disk_errors_explained
from atcache.views.rendering import STORED


def draw_maps(cache_path: Path, out: Path, *, num_samples: int = 6, data: str | None = None) -> None:
    """Draw, for a few samples, the image and where each head of the first and last layer looks.

    A map shows the attention that patches receive from the class token or, without one, from all patches on average. It
    is stretched over the image.

    Args:
        cache_path: a complete cache.
        out: the PNG to write.
        num_samples: rows of the picture, spread over the cache.
        data: where the cache's tars are now, if they were moved.
    """
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cache = atcache.open(cache_path, data=data)
    tokens, layers = cache.geometry.tokens, cache.geometry.layers
    shown = [(position, layers[position]) for position in sorted({0, len(layers) - 1})]
    num_heads = len(cache.geometry.heads)
    usable = np.flatnonzero(cache.samples.status.to_numpy()[0] == STORED)
    samples = usable[np.linspace(0, len(usable) - 1, min(num_samples, len(usable))).astype(int)]
    num_columns = 1 + len(shown) * num_heads
    figure = Figure(figsize=(1.3 * num_columns, 1.45 * len(samples)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(samples), num_columns, squeeze=False)
    for row, sample in enumerate(samples):
        view = cache.view(int(sample))
        axes[row, 0].imshow(view.image)
        axes[row, 0].set_title(f"class {view.label}" if row else f"image\nclass {view.label}", fontsize=8)
        column = 1
        for position, layer in shown:
            for head, attn_QK in zip(cache.geometry.heads, view.maps_LHQK[position], strict=True):
                from_Q = attn_QK[0] if tokens.num_prefix_tokens else attn_QK.mean(axis=0)
                patches_HW = from_Q[tokens.num_prefix_tokens :].reshape(tokens.grid_height, tokens.grid_width)
                extent = (-0.5, view.image.shape[1] - 0.5, view.image.shape[0] - 0.5, -0.5)
                axes[row, column].imshow(view.image, extent=extent)
                axes[row, column].imshow(patches_HW, extent=extent, cmap="inferno", alpha=0.65, interpolation="nearest")
                if row == 0:
                    axes[row, column].set_title(f"layer {layer}\nhead {head}", fontsize=8)
                column += 1
    for axis in axes.flat:
        axis.set_axis_off()
    with disk_errors_explained(out):
        figure.savefig(out, dpi=110)
