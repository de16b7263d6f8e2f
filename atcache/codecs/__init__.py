"""Codecs: factors to integers of fixed shape and back. One codec a file; no codec knows Zarr."""

from atcache.codecs.base import Codec, Coder, State
from atcache.codecs.registry import CODECS, codec_from_json, parse_codec

__all__ = ["CODECS", "Codec", "Coder", "State", "codec_from_json", "parse_codec"]
