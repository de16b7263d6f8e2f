"""`transform`: factors of all layers in one calibrated basis, in which few components matter, rounded to equal steps.

For small errors the KL of a row is a quadratic form of the errors of q and k. In a basis where that form is the
identity every step costs the same KL, whatever layer, head and component it is in; and of all such bases the one whose
components are uncorrelated over images and tokens needs the fewest bits (the Karhunen-Loeve transform). `fit`
finds it. The rest is rounding, and a 2-D DCT over the patch grid, since neighbouring patches are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from atcache.attention.factors import LayerAttention
from atcache.attention.geometry import FactorGeometry
from atcache.codecs.base import Codec, FitProgress, State
from atcache.codecs.transform.coder import TransformCoder
from atcache.codecs.transform.fit import fit_transform
from atcache.errors import CodecError

DEFAULT_TARGET_KL = 0.005
"""Nats a row; `benchmarks/fidelity.py` measures what copy students lose at this and other targets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformCodec(Codec):
    """As few bytes as a target allows: a mean row KL, or bytes a view. The step is searched for on held-back views.

    `basis`, `positions` and `dct` turn parts of the transform off, so that their use can be measured
    (`benchmarks/rate_distortion.py`). All of them save bytes.
    """

    name: ClassVar[str] = "transform"
    target_kl: float = DEFAULT_TARGET_KL
    """Mean row KL of decoded maps, in nats, on held-back views."""
    target_nbytes: int | None = None
    """Bytes of a view's codes, compressed. If given, it is met instead of `target_kl`."""
    basis: Literal["all", "layer", "head"] = "all"
    """What one basis spans: all layers, since a layer is much like the one before; the q and k of all heads of a layer;
    or each head's q and k by themselves."""
    positions: bool = True
    """Take out each position's mean first: what all images share is kept once, in the state."""
    dct: bool = True
    """Transform each component over the patch grid."""

    def __post_init__(self) -> None:
        if not 0 < self.target_kl < 10:
            raise CodecError(f"codec transform: target_kl={self.target_kl!r}, expected nats above 0, such as 0.005.")
        if self.target_nbytes is not None and self.target_nbytes < 1:
            raise CodecError(f"codec transform: target_nbytes={self.target_nbytes!r}, expected at least 1.")
        if self.basis not in ("all", "layer", "head"):
            raise CodecError(f"codec transform: basis={self.basis!r}, expected all, layer or head.")
        for name, value in (("positions", self.positions), ("dct", self.dct)):
            if value not in (True, False):  # text such as "false" counts as true and would decode to other maps
                raise CodecError(f"codec transform: {name}={value!r}, expected True or False.")

    def fit(
        self,
        geometry: FactorGeometry,
        batches: Iterable[Sequence[LayerAttention]],
        *,
        held_back: Sequence[LayerAttention] | None = None,
        nbytes_per_view: Callable[[Tensor], float] | None = None,
        progress: FitProgress | None = None,
    ) -> State:
        """See `Codec.fit`. State, all float32:

        - `step` (1,): the width of a step.
        - `basis_LJN`: row j of layer l is what one unit of the layer's component j adds to the vectors of q's heads
          then k's, N = head vectors * head dim. Rows of zeros fill up layers with fewer components.
        - `mixing_LJC`: the layer's component j as a sum of the stored components; columns are orthonormal over (l, j).
        - `metric_LVDD`: the quadratic form of head vector v, for encoding.
        - `mean_left_LTR`, `mean_right_LRN`: their product is each position's mean.

        Raises:
            CodecError: the layers are maps, or factors that are not finite.
        """
        return fit_transform(self, geometry, batches, held_back, nbytes_per_view)

    def coder(
        self, geometry: FactorGeometry, state: State, *, bias_LHQK: Tensor | None = None, device: str = "cpu"
    ) -> TransformCoder:
        """See `Codec.coder`."""
        if geometry.v_head_dim:
            self.refuse_values()
        return TransformCoder(geometry, state, bias_LHQK, device, dct=self.dct)
