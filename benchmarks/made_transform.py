"""A `transform` coder with as many components as a real teacher needs, and codes as they are stored: for speed only.

Random teachers need other numbers of components than trained ones, and where the codec has them decides what decoding
costs. Here they are given. How they spread over the bands of frequency, and how many bits their cells have, is
DINOv2-S's at a KL of 0.005: its 12 layers have 117 to 353 components of 384, in the mean 278.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atcache.attention.geometry import FactorGeometry
from atcache.attention.projection import InputRecipe
from atcache.codecs.transform.codec import TransformCodec
from atcache.codecs.transform.coder import TransformCoder, projection_state
from atcache.codecs.transform.grid_dct import GridDCT

_SHARE_OF_BANDS = (0.59, 1.0, 1.0, 1.0, 0.97, 0.88, 0.79, 0.73)
"""Components that are stored in each band, of those of the layer; prefix tokens are the first band."""
_SHARE_OF_KINDS = (0.21, 0.38, 0.41)
"""Cells of 8, 4 and 2 bits."""
_BUCKET_OF_KINDS = (60, 130, 220)
_MEAN_OF_KINDS = (4.0, 0.6, 0.15)
_MEAN_RANK = 64


def made_coder(
    geometry: FactorGeometry, recipe: InputRecipe, num_components: int, num_views: int, device: str
) -> tuple[TransformCoder, Tensor]:
    """A coder whose layers have this many components each, of random directions, and the codes of some views."""
    drawn = torch.Generator().manual_seed(0)
    tokens, num_layers = geometry.tokens, len(geometry.layers)
    width = recipe.projections[0].weight_NC.shape[1]
    bands = GridDCT(tokens, torch.device("cpu")).bands
    bucket_BJ = _buckets(len(bands), num_components)
    num_vectors = len(geometry.heads) + geometry.num_kv_heads
    triangle = torch.eye(geometry.head_dim)[tuple(torch.tril_indices(geometry.head_dim, geometry.head_dim))]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn) / shape[-1] ** 0.5

    projections = projection_state(recipe.projections)
    assert projections is not None, "all layers of these teachers are alike"
    state = {
        "prediction_LCC": normal(num_layers, width, width),
        "prediction_scale_LC": torch.ones(num_layers, width),
        "basis_LJC": normal(num_layers, num_components, width),
        "mean_left_LTR": normal(num_layers, tokens.num_tokens, _MEAN_RANK),
        "mean_right_LRC": normal(num_layers, _MEAN_RANK, width),
        "shrink_L3": torch.full((num_layers, 3), -0.05),
        "bucket_LBJ": bucket_BJ.expand(num_layers, -1, -1).clone(),
        "metric_LVE": triangle.expand(num_layers, num_vectors, -1).clone(),
        "input_call_L": torch.tensor(recipe.input_calls, dtype=torch.int32),
        **projections,
    }
    coder = TransformCodec().coder(geometry, state, device=device)
    bucket_TJ = bucket_BJ.repeat_interleave(torch.tensor([band.stop - band.start for band in bands]), dim=0)
    layers = [_integers(bucket_TJ, num_views, drawn).to(device) for _ in range(num_layers)]
    return coder, coder.packing.pack(layers).unsqueeze(2)


def _buckets(num_bands: int, num_components: int) -> Tensor:
    bucket_BJ = torch.zeros(num_bands, num_components, dtype=torch.uint8)
    for band, share in enumerate(_SHARE_OF_BANDS[-num_bands:]):
        count, done = max(1, round(share * num_components)), 0.0
        for part, bucket in zip(_SHARE_OF_KINDS, _BUCKET_OF_KINDS, strict=True):
            bucket_BJ[band, round(done * count) : round((done + part) * count)] = bucket
            done += part
    return bucket_BJ


def _integers(bucket_TJ: Tensor, num_views: int, drawn: torch.Generator) -> Tensor:
    """Integers of the sizes that each kind of cell is for; few of them escape."""
    mean_TJ = torch.zeros(bucket_TJ.shape)
    for bucket, mean in zip(_BUCKET_OF_KINDS, _MEAN_OF_KINDS, strict=True):
        mean_TJ[bucket_TJ == bucket] = mean
    size_BTJ = torch.empty(num_views, *mean_TJ.shape).exponential_(generator=drawn) * mean_TJ
    sign_BTJ = torch.randint(0, 2, size_BTJ.shape, generator=drawn) * 2 - 1
    return ((size_BTJ + 0.4).floor() * sign_BTJ).to(torch.int32)
