"""Factors for tests of codecs, made from random numbers."""

from __future__ import annotations

import torch

from atcache.attention.factors import FactorGeometry, LayerFactors
from atcache.codecs.fidelity import row_kl
from atcache.tokens import TokenLayout


def make_geometry(num_heads=3, num_kv_heads=3, head_dim=8, grid=(2, 3), prefix=1, layers=(0, 2)):
    return FactorGeometry(
        layers=layers,
        heads=tuple(range(num_heads)),
        num_model_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tokens=TokenLayout(num_prefix_tokens=prefix, grid_height=grid[0], grid_width=grid[1]),
        scale=head_dim**-0.5,
    )


def make_factors(geometry, batch=2, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = geometry.tokens.num_tokens

    def draw(heads):
        return torch.randn(batch, heads, tokens, geometry.head_dim, generator=generator) * size

    return [
        LayerFactors(q_BHTD=draw(len(geometry.heads)), k_BHTD=draw(geometry.num_kv_heads), scale=geometry.scale)
        for _ in geometry.layers
    ]


def decode(coder, position, codes_BLTC):
    return coder.decode(position, codes_BLTC[:, coder.code_layer(position)])


def mean_row_kl(coder, layers, codes_BLTC):
    """Over all rows of all layers, in nats."""
    kl = [float(row_kl(layer, decode(coder, position, codes_BLTC)).mean()) for position, layer in enumerate(layers)]
    return sum(kl) / len(kl)
