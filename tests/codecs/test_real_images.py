"""The default codec meets its target on real images of which none was in a calibration set."""

from __future__ import annotations

import numpy as np

import atcache
from atcache.codecs.registry import parse_codec
from atcache.pipelines.fidelity import TIMES_THE_TARGET

TARGET_KL = 0.005
"""Nats: what `atcache build` asks of its codec if it is told nothing."""


def test_maps_of_images_that_no_codec_was_fitted_to_meet_the_default_target(tiny_cache, digits_tars):
    # The codec is fitted to digits of two tars, and codes those of the third as it is.
    fitted = tiny_cache(codec=None, data=f"{digits_tars[0].parent}/{{{digits_tars[0].name},{digits_tars[1].name}}}")
    third = str(digits_tars[2])
    coded = atcache.open(tiny_cache(codec=None, codec_from=fitted, data=third))
    exact = atcache.open(tiny_cache(codec="exact:dtype=float32", data=third))
    assert coded.codec == atcache.open(fitted).codec == parse_codec("transform")
    assert coded.codec.target_kl == TARGET_KL
    keys = [set(cache.samples.sample_key.values.tolist()) for cache in (atcache.open(fitted), coded, exact)]
    assert keys[1] == keys[2]
    assert not keys[0] & keys[1]
    kl_nats = []
    for layer in exact.geometry.layers:
        attn, decoded = (cache.maps(layer).compute().astype(np.float64) for cache in (exact, coded))
        np.testing.assert_allclose(decoded.sum(axis=-1), 1, rtol=1e-5)
        kl_nats.append((attn * np.log(attn / decoded)).sum(axis=-1).mean())
    # Within what a build does not warn of, as 32 images say little of 16 others. Far less would be wasted bytes.
    assert 0.3 * TARGET_KL < np.mean(kl_nats) < TIMES_THE_TARGET * TARGET_KL
