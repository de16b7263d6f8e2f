"""`transform`: each layer's input is predicted from the layer below, and the rest is rounded in a calibrated basis.

What is coded is not q and k but what they are made of: the input x of a layer's attention. It has half as many numbers,
and each layer's is much like that of the layer below. For small errors the KL of a row is a quadratic form of the error
of x. In a basis where that form is the identity every step costs the same KL, whatever layer and component it is in;
and of all such bases the one whose components are uncorrelated over images and tokens needs the fewest bits (the
Karhunen-Loeve transform). `fit` finds it. The rest is a 2-D DCT over the patch grid, since neighbouring patches are
alike, and rounding. q and k follow from the decoded x by the teacher's own weights, which the state holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from atcache.attention.factors import LayerAttention
from atcache.attention.geometry import FactorGeometry
from atcache.attention.projection import InputRecipe
from atcache.codecs.base import Codec, FitProgress, State
from atcache.codecs.transform.coder import TransformCoder
from atcache.codecs.transform.fit import TransformFit
from atcache.errors import CodecError

DEFAULT_TARGET_KL = 0.005
"""Nats a row; `benchmarks/fidelity.py` measures what copy students lose at this and other targets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformCodec(Codec):
    """As few bytes as a target allows: a mean row KL, or bytes a view. The step is searched for on held-back views.

    `predict` and `dct` turn parts of the transform off, so that their use can be measured
    (`benchmarks/rate_distortion.py`). Both save bytes.
    """

    name: ClassVar[str] = "transform"
    codes_inputs: ClassVar[bool] = True
    target_kl: float = DEFAULT_TARGET_KL
    """Mean row KL of decoded maps, in nats, on held-back views."""
    target_nbytes: int | None = None
    """Bytes of a view's codes, compressed. If given, it is met instead of `target_kl`."""
    predict: bool = True
    """Predict each layer from the decoded one below."""
    dct: bool = True
    """Transform each component over the patch grid."""

    def __post_init__(self) -> None:
        if not 0 < self.target_kl < 10:
            raise CodecError(f"codec transform: target_kl={self.target_kl!r}, expected nats above 0, such as 0.005.")
        if self.target_nbytes is not None and self.target_nbytes < 1:
            raise CodecError(f"codec transform: target_nbytes={self.target_nbytes!r}, expected at least 1.")
        for name, value in (("predict", self.predict), ("dct", self.dct)):
            if value not in (True, False):  # text such as "false" counts as true and would decode to other maps
                raise CodecError(f"codec transform: {name}={value!r}, expected True or False.")

    def fit(
        self,
        geometry: FactorGeometry,
        batches: Iterable[Sequence[LayerAttention]],
        *,
        held_back: Sequence[LayerAttention] | None = None,
        nbytes_per_view: Callable[[Tensor], float] | None = None,
        recipe: InputRecipe | None = None,
        progress: FitProgress | None = None,
    ) -> State:
        """See `Codec.fit`. At most 8 GiB of inputs are kept in memory; of larger models fewer views are used.

        State, float16, or float32 if the target is too fine for that, where C is the width of a layer's input:

        - `prediction_LCC` (int8): times `prediction_scale_LC` (float32), multiplies the decoded coefficients of the
          layer below.
        - `basis_LJC`: row j is what one step of the layer's component j adds to them.
        - `mean_left_LTR`, `mean_right_LRC`: their product is each position's mean.
        - `shrink_L3` (float32): added to the magnitude of decoded integers of magnitude 1, 2, and 3 or more.
        - `bucket_LBJ` (uint8): how component j of band b is packed; 0 if it is not stored. See `packing`.
        - `metric_LVE`: the lower triangle of the quadratic form of head vector v, for encoding.
        - `projection_...`: how q and k follow from the input, see `HeadProjection`; and `input_call_L` (int32), which
          linear call of the layer's block takes it. Absent if q and k are coded themselves.

        Raises:
            CodecError: the layers are maps, or factors that are not finite.
        """
        return TransformFit(self, geometry, batches, held_back, nbytes_per_view, recipe, progress).run()

    def coder(
        self, geometry: FactorGeometry, state: State, *, bias_LHQK: Tensor | None = None, device: str = "cpu"
    ) -> TransformCoder:
        """See `Codec.coder`."""
        if geometry.v_head_dim or geometry.input_width:
            self.refuse_values("v" if geometry.v_head_dim else "x")
        if not geometry.keeps_all_queries:
            self.refuse_rows()
        return TransformCoder(geometry, state, bias_LHQK, device, predict=self.predict, dct=self.dct)
