"""Codecs by name: from what a user types and from what a cache recorded."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from atcache.codecs.base import Codec
from atcache.codecs.exact import ExactCodec
from atcache.codecs.int8 import Int8Codec
from atcache.codecs.logmap import LogmapCodec
from atcache.codecs.transform.codec import TransformCodec
from atcache.errors import CodecError

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (TransformCodec, ExactCodec, Int8Codec, LogmapCodec)}
"""Every codec this version reads and writes."""


def parse_codec(text: str) -> Codec:
    """The codec a user named, with its fields after a colon.

    >>> parse_codec("exact:dtype=float32")
    ExactCodec(dtype='float32')
    >>> parse_codec("transform:dct=false").dct
    False

    Raises:
        CodecError: there is no such codec, or it has no such field.
    """
    name, _, arguments = text.partition(":")
    fields: dict[str, Any] = {}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = argument.partition("=")
        if not equals:
            raise CodecError(f"codec {text!r}: {argument!r} is not of the form field=value.")
        try:
            fields[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            word = value.strip()
            fields[key.strip()] = {"true": True, "false": False}.get(word.lower(), word)
    return codec_from_json({"name": name.strip(), **fields})


def codec_from_json(fields: dict[str, Any]) -> Codec:
    """The codec `Codec.to_json` came from.

    Raises:
        CodecError: the name or a field is unknown to this version.
    """
    fields = dict(fields)
    name = fields.pop("name", None)
    if name not in CODECS:
        raise CodecError(f"codec {name!r} is unknown to this version of atcache; it knows {', '.join(sorted(CODECS))}.")
    known = [field.name for field in dataclasses.fields(CODECS[name])]
    if unknown := [field for field in fields if field not in known]:
        if not known:
            raise CodecError(f"codec {name!r} takes no settings; leave out {unknown[0]!r}.")
        raise CodecError(f"codec {name!r} has no field {unknown[0]!r}; it has {', '.join(known)}.")
    try:
        return CODECS[name](**fields)
    except TypeError as error:
        raise CodecError(f"codec {name!r} cannot take {fields}: {error}.") from error
