"""Random numbers of a view: the raw words of a Philox generator keyed by (seed, sample_key, view)."""

from __future__ import annotations

import hashlib

import numpy as np


def uniforms(seed: int, sample_key: str, view: int, *, purpose: bytes, num_words: int) -> list[float]:
    """Doubles in [0, 1) from raw words of a Philox keyed by seed, key and view; each `purpose` has its own stream."""
    text = f"{seed}/{view}/{sample_key}".encode()
    key = hashlib.blake2b(text, digest_size=16, person=purpose).digest()
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(num_words)
    # The upper 53 bits, as many as a double holds exactly.
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()
