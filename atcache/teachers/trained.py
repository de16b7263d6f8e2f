"""What a cache records of the training that made its teacher's weights, if that was `atcache train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from atcache.choices import Mode
from atcache.fields import JsonFields, Range


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained(JsonFields):
    """The training that made a model's weights."""

    run: str
    """Name of the run's folder."""
    mode: Mode
    num_classes: Annotated[int, Range(at_least=0)]
    """Classes whose labels it learnt; 0 if it learnt from attention alone."""
    sources: tuple[str, ...]
    """Fingerprints of the sample tables, labels included, that it was trained on."""
    subset: Annotated[int, Range(at_least=1)] | None
    """How many of these samples were used; None for all."""
    teacher: str | None
    """The model whose attention it was given; None for scratch and finetune."""
    teacher_weights_sha256: str | None
    """That model's weights."""
    initial_weights_sha256: str | None
    """The weights that it began with; None if they were random."""
