"""What looking at one sample, layer, head or query costs: bytes counted at a real server, multiplications by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from made_records import made_attributes
from made_store import plain_index
from torch.utils.flop_counter import FlopCounterMode

import atcache
from atcache.attention.factors import LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.tokens import TokenLayout
from atcache.codecs.registry import parse_codec
from atcache.files.remote.block_cache import BLOCK_NBYTES
from atcache.store.layout import Status, StoreLayout
from atcache.store.writer import TaskWriter, create_cache, encode_view, finish_cache
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy

NUM_SAMPLES, NUM_LAYERS, NUM_HEADS, NUM_TOKENS, HEAD_DIM = 12, 6, 4, 65, 64
CODES = "attention/codes/c/0/0/0/0/0"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A cache of one shard, of factors that cannot be compressed; two layers in a chunk."""
    path, codec = tmp_path_factory.mktemp("wide") / "wide.zarr", parse_codec("exact")
    geometry = FactorGeometry(
        layers=tuple(range(NUM_LAYERS)),
        heads=tuple(range(NUM_HEADS)),
        num_model_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        tokens=TokenLayout(num_prefix_tokens=1, grid_height=8, grid_width=8),
        scale=HEAD_DIM**-0.5,
    )
    coder = codec.coder(geometry, {})
    layout = StoreLayout(
        num_views=1,
        num_samples=NUM_SAMPLES,
        num_layers=NUM_LAYERS,
        num_tokens=NUM_TOKENS,
        num_components=coder.num_components,
        codes_dtype=str(coder.codes_dtype).removeprefix("torch."),
        samples_per_shard=NUM_SAMPLES,
        layers_per_chunk=2,
        parameter_names=PARAMETER_NAMES,
    )
    index = plain_index(NUM_SAMPLES)
    policy = ViewPolicy(name="crop-flip", image_height=64, image_width=64)
    create_cache(path, layout, made_attributes(layout, index, geometry, policy, codec.to_json()), index, {})
    (task,) = layout.tasks()
    writer, generator = TaskWriter(path, layout, task), torch.Generator().manual_seed(0)
    shape = (1, NUM_HEADS, NUM_TOKENS, HEAD_DIM)
    for sample in range(NUM_SAMPLES):
        q_and_k = [[torch.randn(shape, generator=generator) for _ in range(2)] for _ in range(NUM_LAYERS)]
        codes_BLTC = coder.encode([LayerFactors(q_BHTD=q, k_BHTD=k, scale=geometry.scale) for q, k in q_and_k])
        parameters_P = np.zeros(len(PARAMETER_NAMES), np.float32)
        chunks = encode_view(layout, codes_BLTC[0].numpy())
        writer.add(sample, status=Status.STORED, pixel_hash=1, parameters_P=parameters_P, chunks=chunks)
    writer.commit({"row_kl_nats": 0.0})
    finish_cache(path)
    return path


@pytest.fixture
def url(server, path):
    server.folder = path.parent
    return f"{server.url}/{path.name}"


@pytest.fixture
def sample_nbytes(path):
    """Bytes of one sample's codes: all have the same, for noise cannot be compressed."""
    return (path / CODES).stat().st_size / NUM_SAMPLES


def nbytes_fetched(server, work) -> int:
    before = server.num_bytes
    work()
    return server.num_bytes - before


def test_a_sample_and_a_layer_fetch_their_own_chunks(url, server, sample_nbytes):
    attention = xr.open_dataset(url)["attention"]
    attention[0, 0, 0].load()  # reads the shard's index and the statuses, which are kept
    # Servers are asked for blocks: at each end of what is wanted there may be one that is wanted in part.
    most_more = 2 * BLOCK_NBYTES
    whole = nbytes_fetched(server, attention[0, 5].load)
    assert sample_nbytes * 0.95 < whole < sample_nbytes * 1.05 + most_more
    pair = nbytes_fetched(server, attention[0, 8].sel(layer=3, head=1, query=0).load)
    assert sample_nbytes / 3 * 0.95 < pair < sample_nbytes / 3 * 1.05 + most_more < sample_nbytes
    assert nbytes_fetched(server, attention[0, 8].sel(layer=2).load) == 0, "it is in the same chunk"


def test_arrays_of_dask_and_of_xarray_with_chunks_fetch_as_little(url, server, sample_nbytes):
    cache, chunked = atcache.open(url), xr.open_dataset(url, chunks={})["attention"]
    cache.maps(0)[0, 0].compute(scheduler="sync")
    most = sample_nbytes / 3 * 1.05 + 2 * BLOCK_NBYTES
    assert 0 < nbytes_fetched(server, cache.maps(0)[0, 5].compute) < most
    assert 0 < nbytes_fetched(server, cache.to_xarray(layer=4).isel(view=0, sample=7, head=2).compute) < most
    chunked[0, 0, 0].compute()
    assert 0 < nbytes_fetched(server, chunked.isel(view=0, sample=10, layer=1, query=3).compute) < most


def test_only_the_heads_and_rows_that_are_picked_are_computed(path):
    cache, attention = atcache.open(path), xr.open_dataset(path)["attention"]
    row = 2 * NUM_TOKENS * HEAD_DIM  # multiplications and additions of one row of a map

    def operations(work) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    assert operations(attention[0, 3, 4, 2, 7].load) == row
    assert operations(attention[0, 4, 1, [0, 3]].load) == row * 2 * NUM_TOKENS
    assert operations(attention[0, [1, 5], [0, 5], 1, [8, 2, 3]].load) == row * 2 * 2 * 3
    maps = cache.maps(2)
    assert operations(lambda: maps[0, 3, 1, 5].compute(scheduler="sync")) == row
    assert operations(lambda: maps[0, 2:4, :, 0, 1:].compute(scheduler="sync")) == row * 2 * NUM_HEADS
    assert operations(lambda: maps[0][[7, 1]][:, 3][:, :2].compute(scheduler="sync")) == row * 2 * 2
    labelled = cache.to_xarray()
    picked = labelled.isel(view=0, sample=[9, 2]).sel(layer=3).sel(query=0)
    assert operations(lambda: picked.compute(scheduler="sync")) == row * 2 * NUM_HEADS


def test_what_is_picked_is_that_part_of_the_whole(path):
    cache = atcache.open(path)
    decoded = cache.coder.decode(torch.from_numpy(cache.reader.read_codes(0, 3)[None]))
    whole_LHQK = np.stack([decoded.layer(position).maps()[0].numpy() for position in range(NUM_LAYERS)])
    attn_LHQK = xr.open_dataset(path)["attention"][0, 3]
    np.testing.assert_allclose(attn_LHQK.values, whole_LHQK, atol=1e-6)
    picked = attn_LHQK[[5, 0]][:, 1, ::-16, [64, 0]]
    np.testing.assert_allclose(picked.values, whole_LHQK[[5, 0]][:, 1, ::-16][..., [64, 0]], atol=1e-6)
