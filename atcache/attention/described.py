"""DescribedModel: a model of any make, with what capture must know of it.

timm's ViTs need no description: `blocks.py` reads their attributes. All other models get one from `survey.py`, which
watches one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from atcache.attention.tokens import TokenLayout

AttentionWay = Literal["call", "softmax"]
"""How a model attends: by a call of torch's own attention (`scaled_dot_product_attention`, `nn.MultiheadAttention`), or
by a softmax of logits that it formed itself."""
QueryKey = Callable[..., tuple[Tensor, Tensor]]
"""From an attention module and its inputs to q and k (batch, head, token, head dim): its map is softmax(q k^T)."""


class DescribedModel(nn.Module):
    """A module with the blocks and tokens that its attention has. It runs as the module itself does."""

    def __init__(
        self,
        module: nn.Module,
        *,
        blocks: Sequence[nn.Module],
        tokens: TokenLayout,
        label: str,
        way: AttentionWay = "call",
        query_key: QueryKey | None = None,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
    ) -> None:
        """Describe a module.

        Args:
            module: what runs.
            blocks: submodules of it, each attending once, in the order they run.
            tokens: the tokens of every block.
            label: its name in messages.
            way: how its blocks attend.
            query_key: gives q and k of a block from the block and its inputs; only with the way "softmax". None finds
                them by the product that the logits came from.
            forward: runs the module on normalised images, if calling it with them is not enough.
        """
        super().__init__()
        self.module = module
        self.blocks_in_order = tuple(blocks)  # a tuple, so that they are not registered again
        self.tokens = tokens
        self.label = label
        self.way: AttentionWay = way
        self.query_key = query_key
        self._forward = forward
        self.train(module.training)

    def forward_features(self, images: Tensor) -> Tensor:
        """The first tensor that the module returns for normalised images (batch, 3, height, width)."""
        return run_module(self.module, images, self._forward)


def run_module(module: nn.Module, images: Tensor, forward: Callable[[nn.Module, Tensor], Any] | None) -> Tensor:
    """The first floating-point tensor in what `module` returns, which may be a tuple, a list or a mapping."""
    pending: list[Any] = [module(images) if forward is None else forward(module, images)]
    while pending:
        found = pending.pop(0)
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
        if isinstance(found, tuple | list):
            pending = [*found, *pending]
        elif hasattr(found, "values"):
            pending = [*found.values(), *pending]
    raise TypeError(f"{type(module).__name__} returns no tensor.")
