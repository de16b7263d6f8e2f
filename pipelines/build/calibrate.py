"""Before the long run: fit the codec on some views, check the teacher on them, measure what a view will cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from atcache.attention.capture import FactorCapture, check_capture
from atcache.attention.factors import INPUTS, LayerAttention
from atcache.attention.finite import NotFiniteError, positions
from atcache.attention.geometry import FactorGeometry
from atcache.cache.record import LayerCard
from atcache.choices import Queries
from atcache.codecs.base import Codec, Coder, FitProgress, State
from atcache.errors import CodecError, ConfigError
from atcache.images.source import SampleIndex, Source
from atcache.students.teacher_side import CachedFactors
from atcache.teachers.devices import autocast
from atcache.teachers.run import TeacherRun
from atcache.views.policy import ViewPolicy
from atcache.views.rendering import STORED, Renderer

from ..fidelity import injected_error, injected_errors, layer_row_kl, layer_v_error, layer_x_error
from .decode_cost import DecodeCost, measure_decode_cost
from .given_views import ReplayedViews
from .sizes import codes_nbytes, layer_nbytes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationViews:
    """Rendered views, in the order of their samples."""

    pixels_NHWC: Tensor
    """uint8."""
    parameters_NP: np.ndarray
    """The parameters drawn for each view, float32."""
    names: tuple[str, ...]
    """The tar and key of each."""
    parameter_names: tuple[str, ...]
    """What the columns of `parameters_NP` mean."""
    render_s: float
    """Seconds a view takes to load in one process."""


def render_calibration_views(
    index: SampleIndex,
    policy: ViewPolicy,
    num_samples: int,
    *,
    skip_bad: bool,
    replayed: ReplayedViews | None = None,
) -> CalibrationViews:
    """View 0 of `num_samples` good samples, or of all if there are fewer.

    Args:
        index: the samples.
        policy: how views are drawn.
        num_samples: samples wanted.
        skip_bad: leave out images that turn out to be undecodable.
        replayed: the views of another cache, to be taken instead of drawn ones.

    Raises:
        BadImageError: an image cannot be decoded, and `skip_bad` is False.
        ConfigError: not a single image can be decoded.
    """
    good = np.flatnonzero(index.problem_S == 0)
    chosen = good[np.unique(np.linspace(0, len(good) - 1, min(len(good), num_samples)).astype(int))]
    # Blocks are not known yet, so views are mixed with those of any sample. That is as good to calibrate on.
    source = Source(index)
    renderer = replayed or Renderer(source, policy, skip_bad=skip_bad)
    names: list[str] = []
    seconds: list[float] = []
    pixels: list[np.ndarray] = []
    parameters: list[np.ndarray] = []
    for sample in chosen.tolist():
        start_s = time.perf_counter()
        view = renderer.render(sample, 0)
        if view.status == STORED:
            seconds.append(time.perf_counter() - start_s)
            pixels.append(view.pixels_HWC)
            names.append(source.where(sample))
            parameters.append(view.parameters_P)
    if not pixels:
        folder = index.tars[0].parent if index.tars else "the data"
        raise ConfigError(f"{folder}: none of {len(chosen)} calibration images can be read. Check the data.")
    return CalibrationViews(
        pixels_NHWC=torch.from_numpy(np.stack(pixels)),
        parameters_NP=np.stack(parameters),
        names=tuple(names),
        parameter_names=policy.parameter_names,
        render_s=statistics.fmean(seconds[1:] or seconds),  # the first one also imports the decoder
    )


_CHECKED_VIEWS = 4  # few, because whole maps are formed for these
_HELD_BACK_SHARE = 8
"""One view in this many is held back from fitting: fidelity is measured on it."""
_MAX_HELD_BACK = 32
_HELD_BACK_NBYTES = 2**30
"""The most attention of held-back views, which is in memory all at once. If views have many tokens, few fit."""
_INJECTED_VIEWS = 8
_LAYER_VIEWS = 2  # few, because each layer costs a forward of the teacher
_MEASURED_VIEWS = 64
"""Views beside the held-back ones that show how codes compress, and how fast the teacher and the codec are."""
_CODES_NBYTES = 2**28
"""The most codes that are kept to measure how they compress."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """What was learnt from the calibration views."""

    geometry: FactorGeometry
    state: State
    """The codec's fitted arrays."""
    bias_LHQK: Tensor | None
    coder: Coder
    codes_BLTC: Tensor
    """Codes of calibration views, held-back ones first, to measure how they compress."""
    pixels_BHWC: Tensor
    """The same views, uint8."""
    num_held_back: int
    """Views that fidelity was measured on."""
    row_kl_nats: float
    """Mean KL(A || decoded A) over rows, heads and layers of the held-back views."""
    layer_row_kl_nats: tuple[float, ...]
    """The same for each kept layer."""
    injected_error: float
    """Relative error of the teacher's final features when it attends with decoded factors."""
    layer_v_error: tuple[float, ...] | None
    """Relative error of each kept layer's decoded v, |decoded - v| / |v|; None if v is not stored."""
    layer_x_error: tuple[float, ...] | None
    """The same for what attention and MLP get."""
    teacher_views_per_s: float
    """Speed of capture and encoding, without loading images."""
    decode_cost: DecodeCost
    """What decoding costs beside the teacher."""

    @property
    def v_error(self) -> float | None:
        """The mean of `layer_v_error`."""
        return None if self.layer_v_error is None else float(np.mean(self.layer_v_error))

    @property
    def x_error(self) -> float | None:
        """The mean of `layer_x_error`."""
        return None if self.layer_x_error is None else float(np.mean(self.layer_x_error))

    @property
    def state_nbytes(self) -> int:
        """Bytes of the fitted arrays, before the store compresses them. A cache holds them once."""
        return sum(array.numel() * array.element_size() for array in self.state.values())


def calibrate(
    run: TeacherRun,
    codec: Codec,
    pixels_NHWC: Tensor,
    *,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    batch_size: int,
    state: State | None = None,
    queries: Queries = "all",
    with_values: bool = False,
    with_block_inputs: bool = False,
    name_of: Callable[[int], str] | None = None,
    progress: FitProgress | None = None,
) -> Calibration:
    """Check the teacher's attention, fit the codec, and measure fidelity and speed on views held back from it.

    Args:
        run: the teacher.
        codec: the codec to fit.
        pixels_NHWC: calibration views, uint8. Every eighth is held back, or fewer if their attention is large. A
            single view is both fitted to and measured on.
        layers: block indices to keep; None for all.
        heads: head indices to keep; None for all.
        batch_size: views in a forward.
        state: the codec's fitted arrays from an earlier call; None fits it now.
        queries: the tokens whose rows of the maps are kept.
        with_values: whether v is stored too.
        with_block_inputs: whether what attention and MLP get is stored too.
        name_of: what the user calls the view at a position, for messages.
        progress: called often with a stage and the share of it that is done: "teacher" while the teacher runs,
            "measuring" at the end, and between them the stages of the codec's own `fit`.

    Raises:
        UnsupportedAttentionError: the teacher's attention cannot be captured.
        NotFiniteError: the teacher computes NaN or infinity.
        CodecError: the codec cannot hold it.
    """
    model = run.teacher.model
    report = _no_report if progress is None else progress
    report("teacher", 0.0)
    with autocast(run.device, run.dtype):
        images = run.images(pixels_NHWC[:_CHECKED_VIEWS])
        try:
            check = check_capture(
                model,
                images,
                layers,
                heads,
                queries=queries,
                with_values=with_values,
                with_block_inputs=with_block_inputs,
                with_inputs=codec.codes_inputs,
            )
        except NotFiniteError as error:
            raise NotFiniteError(error.found, name_of) from error
    capture = run.capture(check.geometry, check.input_calls)
    is_held_back_N = choose_held_back(len(pixels_NHWC), attention_nbytes(check.geometry))
    held_back_NHWC = pixels_NHWC[is_held_back_N]
    fitted_NHWC = pixels_NHWC[~is_held_back_N] if len(pixels_NHWC) > 1 else pixels_NHWC
    held_back = run.factors(capture, held_back_NHWC)
    held_back_N = positions(is_held_back_N)
    run.check_finite(capture, held_back, name_of and (lambda view: name_of(held_back_N[view])))
    if state is None:
        with _not_finite_explained(run, capture, pixels_NHWC, batch_size, name_of):
            state = codec.fit(
                check.geometry,
                _Batches(run, capture, fitted_NHWC, batch_size, partial(report, "teacher")),
                held_back=held_back,
                nbytes_per_view=codes_nbytes,
                recipe=check.recipe,
                progress=report,
            )
    report("measuring", 0.0)
    coder = codec.coder(check.geometry, state, bias_LHQK=check.bias_LHQK, device=str(run.device))
    codes_BLTC = coder.encode(held_back)
    layer_kl = layer_row_kl(coder, held_back, codes_BLTC)
    few = slice(0, _INJECTED_VIEWS)
    decoded = CachedFactors(coder, codes_BLTC[few])
    with _not_finite_explained(run, capture, pixels_NHWC, batch_size, name_of):
        more, views_per_s = _time_encoding(run, capture, coder, fitted_NHWC, batch_size, codes_BLTC, report)
    return Calibration(
        geometry=check.geometry,
        state=state,
        bias_LHQK=check.bias_LHQK,
        coder=coder,
        codes_BLTC=torch.cat([codes_BLTC.cpu(), *more]),
        pixels_BHWC=torch.cat([held_back_NHWC, fitted_NHWC[: sum(map(len, more))]]),
        num_held_back=len(held_back_NHWC),
        row_kl_nats=float(np.mean(layer_kl)),
        layer_row_kl_nats=layer_kl,
        injected_error=injected_error(run, held_back_NHWC[few], coder.geometry, decoded),
        layer_v_error=layer_v_error(coder, held_back, codes_BLTC),
        layer_x_error=layer_x_error(coder, held_back, codes_BLTC),
        teacher_views_per_s=views_per_s,
        decode_cost=measure_decode_cost(run, coder, held_back_NHWC, codes_BLTC),
    )


@contextmanager
def _not_finite_explained(
    run: TeacherRun,
    capture: FactorCapture,
    pixels_NHWC: Tensor,
    batch_size: int,
    name_of: Callable[[int], str] | None = None,
) -> Generator[None]:
    """If the codec fails, run the teacher again on the views, to name the image and the layer if it computes NaN.

    Nothing is looked at before, so that the device need not wait for each batch.

    Args:
        run: the teacher.
        capture: what the codec was given.
        pixels_NHWC: the views, uint8.
        batch_size: views in a forward.
        name_of: what the user calls the view at a position of `pixels_NHWC`.

    Raises:
        NotFiniteError: in place of a `CodecError`.
    """
    try:
        yield
    except CodecError:
        for start in range(0, len(pixels_NHWC), batch_size):
            layers = run.factors(capture, pixels_NHWC[start : start + batch_size])
            run.check_finite(capture, layers, name_of and (lambda view, start=start: name_of(start + view)))
        raise


def _no_report(_stage: str, _share: float) -> None:
    """Nobody asked."""


def attention_nbytes(geometry: FactorGeometry) -> int:
    """Bytes that a view's captured attention takes in memory, as float32."""
    if geometry.kind == "maps":
        return 2 * geometry.map_nbytes  # map_nbytes counts float16
    num_values = geometry.num_queries * len(geometry.heads) * geometry.head_dim
    num_values += geometry.tokens.num_tokens * geometry.num_kv_heads * (geometry.head_dim + geometry.v_head_dim)
    num_values += geometry.tokens.num_tokens * len(INPUTS) * geometry.input_width
    return 4 * len(geometry.layers) * num_values


def choose_held_back(num_views: int, view_nbytes: int) -> Tensor:
    """Which calibration views to hold back from fitting: is_held_back_N, bool, at least one, spread evenly.

    Args:
        num_views: calibration views.
        view_nbytes: bytes that the attention of one view takes in memory.
    """
    is_held_back_N = torch.zeros(num_views, dtype=torch.bool)
    candidates_N = torch.arange(num_views)[_HELD_BACK_SHARE // 2 :: _HELD_BACK_SHARE][:_MAX_HELD_BACK]
    most = max(1, _HELD_BACK_NBYTES // view_nbytes)
    is_held_back_N[candidates_N[:: -(-len(candidates_N) // most) or 1]] = True
    if not bool(is_held_back_N.any()):
        is_held_back_N[-1] = True
    return is_held_back_N


class _Batches:
    """The teacher's attention on some views, batch by batch; computed again each time it is iterated.

    `report` is called with the share of the views that is done.
    """

    def __init__(
        self,
        run: TeacherRun,
        capture: FactorCapture,
        pixels_NHWC: Tensor,
        batch_size: int,
        report: Callable[[float], None],
    ) -> None:
        self._run, self._capture, self._report = run, capture, report
        self._parts: tuple[Tensor, ...] = torch.split(pixels_NHWC, batch_size)

    def __iter__(self) -> Iterator[list[LayerAttention]]:
        for number, part in enumerate(self._parts):
            self._report(number / len(self._parts))
            yield self._run.factors(self._capture, part)
        self._report(1.0)


def _time_encoding(
    run: TeacherRun,
    capture: FactorCapture,
    coder: Coder,
    pixels_NHWC: Tensor,
    batch_size: int,
    first_BLTC: Tensor,
    report: FitProgress,
) -> tuple[list[Tensor], float]:
    """Codes of as many more views as may be kept beside `first_BLTC`, and the views encoded per second."""
    view_nbytes = first_BLTC[:1].numel() * first_BLTC.element_size()
    most = min(_MEASURED_VIEWS, max(1, _CODES_NBYTES // max(1, view_nbytes) - len(first_BLTC)))
    num_views = min(len(pixels_NHWC), most)
    batches = _Batches(run, capture, pixels_NHWC[:num_views], batch_size, partial(report, "measuring"))
    start_s = time.monotonic()
    codes = [coder.encode(layers).cpu() for layers in batches]
    return codes, num_views / max(1e-9, time.monotonic() - start_s)


def layer_cards(run: TeacherRun, calibration: Calibration) -> list[LayerCard]:
    """Size and errors of each layer. Costs a short forward of the teacher for each."""
    coder, geometry = calibration.coder, calibration.geometry
    held_back = slice(0, calibration.num_held_back)
    nbytes_L = layer_nbytes(coder, calibration.codes_BLTC[held_back])
    few = slice(0, min(_LAYER_VIEWS, calibration.num_held_back))
    decoded = CachedFactors(coder, calibration.codes_BLTC[few].to(run.device))
    each_layer = [(layer,) for layer in geometry.layers]
    injected_L = injected_errors(run, calibration.pixels_BHWC[few], geometry.heads, each_layer, decoded)
    return [
        LayerCard(
            layer=layer,
            nbytes=nbytes_L[position],
            row_kl_nats=calibration.layer_row_kl_nats[position],
            injected_error=injected_L[position],
            v_error=None if calibration.layer_v_error is None else calibration.layer_v_error[position],
            x_error=None if calibration.layer_x_error is None else calibration.layer_x_error[position],
        )
        for position, layer in enumerate(geometry.layers)
    ]
