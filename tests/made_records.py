"""What a cache of made attention says of itself: for caches that tests write without a teacher."""

from __future__ import annotations

from typing import Any

from atcache.attention.geometry import FactorGeometry
from atcache.cache.identity import CacheIdentity, Selection
from atcache.cache.record import CacheRecord, CalibrationRecord, CreatedBy
from atcache.images.source import SampleIndex
from atcache.store.layout import StoreLayout
from atcache.teachers.inputs import InputConfig
from atcache.views.apply import library_versions
from atcache.views.policy import ViewPolicy


def made_attributes(
    layout: StoreLayout, index: SampleIndex, geometry: FactorGeometry, policy: ViewPolicy, codec: dict[str, Any]
) -> dict[str, Any]:
    """Attributes for `create_cache`, of a teacher called "random"."""
    identity = CacheIdentity(
        teacher="random",
        weights_sha256="0" * 64,
        input=InputConfig(
            height=policy.image_height,
            width=policy.image_width,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation=policy.interpolation,
            crop_pct=policy.crop_pct,
        ),
        precision="float32",
        fingerprint=index.fingerprint,
        num_samples=layout.num_samples,
        policy=policy,
        num_views=layout.num_views,
        pixels="replay" if layout.pixels is None else "store",
        selection=Selection(layers=geometry.layers, heads=geometry.heads),
        codec=codec,
    )
    record = CacheRecord(
        identity=identity,
        weights_from="random.safetensors",
        licence=None,
        depth=max(geometry.layers) + 1,
        geometry=geometry,
        calibration=CalibrationRecord(row_kl_nats=0.0, injected_error=0.0),
        created_by=CreatedBy(atcache="0", python="3", torch="2", timm="1", device="cpu", views=library_versions()),
    )
    return record.to_json()
