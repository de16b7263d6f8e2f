"""The errors that atcache raises for a user's mistake or for damaged data.

Each class is also the built-in error that a caller expects, so `except ValueError` works. A message is written for a
person: it says what is wrong, which value, what was expected and what to do. Any other exception is a bug.
"""

from __future__ import annotations


class AtcacheError(Exception):
    """Base class of all errors whose message is written for the user."""

    # KeyError would print the repr of the message, and OSError an errno. Users should read the sentence itself.
    __str__ = Exception.__str__


class ConfigError(AtcacheError, ValueError):
    """An option has a value that cannot be used."""


class SourceError(AtcacheError, ValueError):
    """The images or labels are missing or damaged."""


class BadImageError(SourceError):
    """One image cannot be decoded. The message names its tar and key."""


class TeacherError(AtcacheError, ValueError):
    """A model or its weights cannot be loaded, or they do not suit the task."""


class UnsupportedAttentionError(TeacherError):
    """The model's attention is not a token x token softmax of q and k, so it cannot be captured or replaced."""


class AttentionShapeError(AtcacheError, ValueError):
    """An attention tensor does not have the expected shape."""


class CodecError(AtcacheError, ValueError):
    """A codec's settings are not valid, or the codec cannot store these factors."""


class CacheMismatchError(AtcacheError, ValueError):
    """The cache exists, but it was built from other data, with another teacher or with other settings."""


class CorruptCacheError(AtcacheError, ValueError):
    """Stored bytes are not what was written. The message names the file."""


class CacheMissError(AtcacheError, KeyError):
    """There is no such cache, or it does not contain the requested view or sample."""


class DiskFullError(AtcacheError, OSError):
    """The disk is full, or would become full. What was stored before stays valid."""


class NotWritableError(AtcacheError, OSError):
    """A file or folder cannot be written: the disk is read-only or fails, or permission is missing."""


class RemoteError(AtcacheError):
    """A server cannot be read, or a file on it has changed since it was opened. The message names the URL.

    This is not an OSError: code that treats an OSError as a damaged or missing local file must not catch it.
    """


class WorkerLostError(AtcacheError, RuntimeError):
    """A process that makes batches in advance was killed."""
