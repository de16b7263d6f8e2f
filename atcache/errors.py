"""The errors atcache raises for its users' mistakes and for damaged data.

Each is also the built-in a caller would expect, so `except ValueError` keeps working. The message is for a person:
what, which value, what was expected, what to do. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


class AtcacheError(Exception):
    """Any error whose message is meant for the user."""

    # KeyError prints the repr of its argument and OSError its errno; users are to read the sentence itself.
    __str__ = Exception.__str__


class ConfigError(AtcacheError, ValueError):
    """An option has a value that cannot be used."""


class SourceError(AtcacheError, ValueError):
    """The images or labels cannot be found or are damaged."""


class BadImageError(SourceError):
    """One image cannot be decoded; the message names its tar and key."""


class TeacherError(AtcacheError, ValueError):
    """A model or its weights cannot be had or do not fit."""


class UnsupportedAttentionError(TeacherError):
    """The model's attention is no token x token softmax of q and k, so it cannot be captured or given."""


class AttentionShapeError(AtcacheError, ValueError):
    """A tensor of attention has not the expected axes."""


class CodecError(AtcacheError, ValueError):
    """A codec cannot be made as asked, or cannot hold these factors."""


class CacheMismatchError(AtcacheError, ValueError):
    """A cache exists, but for other data, another teacher or other parameters."""


class CorruptCacheError(AtcacheError, ValueError):
    """Stored bytes are not what was written; the message names the file."""


class CacheMissError(AtcacheError, KeyError):
    """The asked view or sample is not stored in this cache."""


class DiskFullError(AtcacheError, OSError):
    """No space is left, or would be; what was stored before stays valid."""


class RemoteError(AtcacheError):
    """A server cannot be read, or what it has changed meanwhile; the message names the URL.

    No OSError: code that takes one for a damaged or missing local file must let this pass.
    """
