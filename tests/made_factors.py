"""Factors for tests of codecs, made from random numbers."""

from __future__ import annotations

import torch

from atcache.attention.factors import LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.tokens import TokenLayout
from atcache.codecs.fidelity import row_kl
from atcache.students.pairing import Pairing


def make_geometry(num_heads=3, num_kv_heads=3, head_dim=8, grid=(2, 3), prefix=1, layers=(0, 2), v_head_dim=0):
    return FactorGeometry(
        layers=layers,
        heads=tuple(range(num_heads)),
        num_model_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        tokens=TokenLayout(num_prefix_tokens=prefix, grid_height=grid[0], grid_width=grid[1]),
        scale=head_dim**-0.5,
        v_head_dim=v_head_dim,
    )


def equal_pairing(geometry, layers=None, heads=None, what="map") -> Pairing:
    """Each layer and head to its like in a student of the teacher's shape; all that the geometry has for None."""
    return Pairing(
        layers=tuple((layer, layer) for layer in (geometry.layers if layers is None else layers)),
        heads=tuple((head, head) for head in (geometry.heads if heads is None else heads)),
        num_student_heads=geometry.num_model_heads,
        what=what,
    )


def make_factors(geometry, batch=2, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = geometry.tokens.num_tokens

    def draw(heads, width):
        return torch.randn(batch, heads, tokens, width, generator=generator) * size

    num_kv_heads, width, v_width = geometry.num_kv_heads, geometry.head_dim, geometry.v_head_dim
    return [
        LayerFactors(
            q_BHTD=draw(len(geometry.heads), width),
            k_BHTD=draw(num_kv_heads, width),
            scale=geometry.scale,
            v_BHTD=draw(num_kv_heads, v_width) if v_width else None,
        )
        for _ in geometry.layers
    ]


def decode(coder, position, codes_BLTC):
    return coder.decode(codes_BLTC).layer(position)


def mean_row_kl(coder, layers, codes_BLTC):
    """Over all rows of all layers, in nats."""
    kl = [float(row_kl(layer, decode(coder, position, codes_BLTC)).mean()) for position, layer in enumerate(layers)]
    return sum(kl) / len(kl)
