"""What each source of foreign teachers gives, ready to be described and run."""

from __future__ import annotations

from dataclasses import dataclass

from atcache.attention.described import DescribedModel
from atcache.teachers.foreign.names import ForeignName
from atcache.teachers.inputs import InputConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ForeignModel:
    """A foreign model with its trained weights, in eval mode and without gradients."""

    model: DescribedModel
    """The model, with its blocks and tokens."""
    name: ForeignName
    """What it was made from."""
    source: str
    """Where the weights came from."""
    weights_sha256: str
    """sha256 of all that the maps depend on."""
    input: InputConfig
    """The input it expects."""
