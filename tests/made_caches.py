"""Small caches of made factors: any codec with any geometry, without a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from made_factors import make_factors
from made_store import make_index

from atcache.codecs.registry import parse_codec
from atcache.store.chunks import compress
from atcache.store.layout import GZIP, Status, StoreLayout
from atcache.store.writer import TaskWriter, create_cache, encode_view, finish_cache

EXACT = Path(__file__).parent / "golden" / "format-1" / "exact.zarr" / "zarr.json"
NUM_SAMPLES = 3
FITTED_TO = 24


def write_made_cache(path, codec_text, geometry, *, bias_LHQK=None, compressor=None, finish=True, size=2.0):
    """A cache of three samples in shards of two; what it says of teacher and views is another cache's.

    Without `finish`, its second shard is missing and its build not done.
    """
    codec = parse_codec(codec_text)
    bias = None if bias_LHQK is None else torch.from_numpy(bias_LHQK)
    fitted = [make_factors(geometry, batch=FITTED_TO, seed=1, size=size)]
    held_back = make_factors(geometry, batch=4, seed=2, size=size)
    nbytes_per_view = lambda codes: float(np.mean([len(compress(view, GZIP)) for view in codes.numpy()]))  # noqa: E731
    state = codec.fit(geometry, fitted, held_back=held_back, nbytes_per_view=nbytes_per_view)
    coder = codec.coder(geometry, state, bias_LHQK=bias)
    codes_BLTC = coder.encode(make_factors(geometry, batch=NUM_SAMPLES, seed=3, size=size)).numpy()
    record = json.loads(EXACT.read_text())["attributes"]["atcache"]
    names = tuple(record["layout"]["parameter_names"])
    _, num_layers, num_tokens, num_components = codes_BLTC.shape
    is_packed = codec.name == "transform"
    layout = StoreLayout(
        num_views=1,
        num_samples=NUM_SAMPLES,
        num_layers=num_layers,
        num_tokens=num_tokens,
        num_components=num_components,
        codes_dtype=str(codes_BLTC.dtype),
        samples_per_shard=2,
        layers_per_chunk=1,
        parameter_names=names,
        **({"compressor": compressor or GZIP} if is_packed or compressor else {}),
    )
    attributes = {name: record[name] for name in ("teacher", "views", "selection", "calibration", "created_by")}
    attributes["teacher"]["depth"] = 1 + geometry.layers[-1]
    attributes["calibration"]["v_error"] = 0.0
    attributes |= {"geometry": geometry.to_json(), "codec": codec.to_json()}
    attributes["source"] = {"num_samples": NUM_SAMPLES, "fingerprint": record["source"]["fingerprint"]}
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    create_cache(path, layout, attributes, make_index(NUM_SAMPLES), arrays, bias_LHQK)
    for task in layout.tasks() if finish else layout.tasks()[:1]:
        writer = TaskWriter(path, layout, task)
        for sample in range(task.start, task.stop):
            writer.add(
                sample,
                status=Status.STORED,
                parameters_P=np.zeros(len(names), np.float32),
                pixel_hash=1,
                chunks=encode_view(layout, codes_BLTC[sample]),
            )
        writer.commit({"row_kl_nats": 0.0})
    if finish:
        finish_cache(path)
    return path
