"""Names of teachers that timm does not make; each begins with where the model comes from. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from atcache.errors import TeacherError

TRANSFORMERS, OPEN_CLIP, OWN = "transformers:", "open-clip:", "own:"
_PREFIXES = (TRANSFORMERS, OPEN_CLIP, OWN)
CONFIG_VALUES = ("hidden_act", "layer_norm_eps", "num_attention_heads", "rope_parameters", "rope_theta")
"""What maps depend on in the config.json of a transformers model, beside what the names and shapes of weights show."""


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


def hash_note(name: str) -> str:
    """A sentence that says what else than weights a teacher's hash is of, after a space; nothing if it is of no more.

    For messages about two hashes that differ.
    """
    if not name.startswith(TRANSFORMERS):
        return ""
    return (
        f" The hash is of the weights and of {', '.join(CONFIG_VALUES)} in config.json. Earlier versions of atcache "
        "hashed no config: their caches continue only where these values are the usual ones of the model's family."
    )
