"""Names of teachers that timm does not make; each begins with where the model comes from. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from atcache.errors import TeacherError

TRANSFORMERS, OPEN_CLIP, OWN = "transformers:", "open-clip:", "own:"
_PREFIXES = (TRANSFORMERS, OPEN_CLIP, OWN)


@dataclass(frozen=True, slots=True)
class ForeignName:
    """The name of a teacher that timm does not make."""

    text: str
    """Such as "transformers:facebook/dinov2-small", as typed."""
    arguments: dict[str, Any] = field(default_factory=dict[str, Any], hash=False)
    """Always empty: what follows the colon says which model it is."""

    @property
    def architecture(self) -> str:
        """The whole name: there is no tag to take off."""
        return self.text

    def __str__(self) -> str:
        return self.text


def is_foreign(name: object) -> bool:
    """Whether a name says that timm does not make the model.

    >>> is_foreign("transformers:facebook/dinov2-small"), is_foreign("vit_tiny_patch16_224:img_size=32")
    (True, False)
    """
    return str(name).startswith(_PREFIXES)


def refuse_as_student(name: str) -> None:
    """Refuse a name of a foreign model where a timm model is needed: for a student.

    Raises:
        TeacherError: the name is foreign.
    """
    if is_foreign(name):
        raise TeacherError(
            f"model {name!r}: only timm makes students, and this model is not of timm. Give a timm model with the same "
            "heads and tokens as --student (in Python student=)."
        )
