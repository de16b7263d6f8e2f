"""Token layout: which rows and columns of a map are prefix tokens, and which are patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from atcache.errors import ConfigError
from atcache.fields import JsonFields, Range

MOST_VALUES = 2**20
"""More than any count of heads, of tokens or of a head's components comes near."""
MOST_TOKENS = 2**18
"""The most tokens of one map: a grid of 512 x 512. Codecs hold matrices and lists of them."""
_MOST_SIDE = 4096

TokenKind = Literal["cls", "register", "patch"]
"""A class token, another token before the patches, or a patch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout(JsonFields):
    """The order of a ViT's tokens: prefix tokens (CLS, registers) first, then the patches row by row."""

    is_strict: ClassVar[bool] = True
    num_prefix_tokens: Annotated[int, Range(at_least=0, at_most=MOST_TOKENS)]
    """The number of tokens before the first patch; 0 for models that pool their patches."""
    grid_height: Annotated[int, Range(at_least=1, at_most=_MOST_SIDE)]
    """The number of patch rows."""
    grid_width: Annotated[int, Range(at_least=1, at_most=_MOST_SIDE)]
    """The number of patches in a row."""

    def __post_init__(self) -> None:
        if self.num_prefix_tokens < 0 or self.grid_height < 1 or self.grid_width < 1:
            raise ConfigError(
                f"the token layout has {self.num_prefix_tokens} prefix tokens and a grid of {self.grid_height} x "
                f"{self.grid_width}: expected at least 0 prefix tokens and a grid of at least 1 x 1."
            )
        if self.num_tokens > MOST_TOKENS:
            raise ConfigError(
                f"the token layout has {self.num_prefix_tokens} prefix tokens and a grid of {self.grid_height} x "
                f"{self.grid_width}, {self.num_tokens} tokens in all: expected at most {MOST_TOKENS}."
            )

    @property
    def num_patches(self) -> int:
        """The number of patches in the grid.

        >>> TokenLayout(num_prefix_tokens=1, grid_height=14, grid_width=14).num_patches
        196
        """
        return self.grid_height * self.grid_width

    @property
    def num_tokens(self) -> int:
        """Prefix tokens and patches together: the side of a map."""
        return self.num_prefix_tokens + self.num_patches


def token_kinds(tokens: TokenLayout, teacher: str) -> list[TokenKind]:
    """What each token of a teacher is.

    Caches record how many tokens come before the patches, not which. A class token is always the first of them, and
    timm's names say where there is none.

    Args:
        tokens: the teacher's.
        teacher: its name, as the cache records it.

    >>> token_kinds(TokenLayout(num_prefix_tokens=2, grid_height=1, grid_width=1), "vit_base_patch16_dinov3")
    ['cls', 'register', 'patch']
    >>> token_kinds(TokenLayout(num_prefix_tokens=1, grid_height=1, grid_width=1), "vit_little_patch16_reg1_gap_256")
    ['register', 'patch']
    """
    kinds: list[TokenKind] = ["register"] * tokens.num_prefix_tokens
    if kinds and "_gap" not in teacher and "class_token=False" not in teacher:
        kinds[0] = "cls"
    patches: list[TokenKind] = ["patch"] * tokens.num_patches
    return kinds + patches
