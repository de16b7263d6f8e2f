"""Statistics of maps: what a head attends to, in a few numbers, and how near two sets of maps are to each other.

All functions accept numpy arrays, torch tensors (on any device), and dask arrays (lazily), and return the same kind.
The last two axes are (query, key); any axes may come before them. Views that are not stored are NaN, and give NaN. Maps
may have the rows of some tokens only.

Example:
    cache = atcache.open("in1k.zarr")
    attn_SHQK = cache.maps(layer=0)[0, :100]  # lazy
    entropy_bits_H = atcache.stats.attention_entropy(attn_SHQK).mean(axis=(0, 2)).compute()
    mass_H = atcache.stats.prefix_mass(attn_SHQK, cache.geometry.tokens).mean(axis=(0, 2)).compute()
"""

from __future__ import annotations

from atcache.attention.tokens import TokenLayout as TokenLayout
from atcache.statistics.agreement import (
    cosine_similarity as cosine_similarity,
    js_divergence as js_divergence,
    kl_divergence as kl_divergence,
    largest_overlap as largest_overlap,
    total_variation as total_variation,
)
from atcache.statistics.between_heads import (
    head_cka as head_cka,
    head_divergence as head_divergence,
    head_jensen_shannon as head_jensen_shannon,
)
from atcache.statistics.layers import attention_rollout as attention_rollout
from atcache.statistics.places import (
    mean_attention_distance as mean_attention_distance,
    patch_distances as patch_distances,
    patch_grid as patch_grid,
)
from atcache.statistics.rows import (
    attention_entropy as attention_entropy,
    cls_mass as cls_mass,
    largest_mass as largest_mass,
    prefix_mass as prefix_mass,
    register_mass as register_mass,
    self_mass as self_mass,
)
from atcache.statistics.whole_maps import (
    SinkTokens as SinkTokens,
    effective_rank as effective_rank,
    sink_tokens as sink_tokens,
)
