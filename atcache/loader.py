"""Batches of views for training and validation: batch N is the same whatever was read before it, and by whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from atcache.errors import AtcacheError, ConfigError
from atcache.kept import Kept
from atcache.mixing import NOT_MIXED, Mix, mix_pixels
from atcache.order import SampleOrder
from atcache.rendering import draw_view_mix, replay_view, stored_mix
from atcache.source import Problem, Source
from atcache.stacking import Stack
from atcache.store.reader import CacheReader
from atcache.views import ViewPolicy, apply_view, draw_view
from atcache.worker_batches import read_ahead


class Batch(NamedTuple):
    """What one step takes, in host memory."""

    sample_B: Tensor
    """Rows of the source, int64."""
    pixels_BHWC: Tensor
    """Views, uint8."""
    label_B: Tensor
    """Classes, int64."""
    mix_label_B: Tensor
    """Classes of the samples mixed in, int64; the own one where none is."""
    mix_share_B: Tensor
    """Share of the own image, and so of `label_B`, float32 in 0..1; the rest is `mix_label_B`'s. 1 where not mixed."""
    codes_BLTC: Tensor | None
    """The teacher's codes of these views, int16 where a codec's int32 codes fit; None where they are not wanted."""


class SampleView(NamedTuple):
    """One view of one sample. Not to be written to."""

    pixels_HWC: np.ndarray
    """uint8."""
    codes_LTC: np.ndarray | None
    """None where they are not wanted."""
    mix: Mix = NOT_MIXED
    """What of another sample the pixels show."""


class Views(Protocol):
    """Where a sample's pixels and codes come from. May be forked or pickled to worker processes."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for another run's views to be these, as JSON."""
        ...

    def read(self, sample: int, epoch: int) -> SampleView:
        """The view of `sample` that `epoch` uses."""
        ...

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """Told which samples, ascending, will be read soon; may have the disk read them ahead."""
        ...

    @property
    def codes_may_narrow(self) -> bool:
        """Whether codes are plain numbers, which mean the same in a smaller integer type."""
        ...


class CachedViews:
    """The fixed views of a cache; epoch e uses view e modulo their number.

    Pixels come from the cache where it stores them; else they are replayed from the tars and checked by their hash.

    Args:
        reader: the cache.
        source: the tars; needed where the cache stores no pixels.
        with_codes: whether codes are wanted.
        code_layers: which rows of L of their codes.
        keep_nbytes: memory for views that were read, in each process that reads.
    """

    def __init__(
        self,
        reader: CacheReader,
        source: Source | None,
        *,
        with_codes: bool,
        code_layers: slice = slice(None),
        keep_nbytes: int = 0,
    ) -> None:
        self._reader, self._source = reader, source
        self._with_codes, self._code_layers = with_codes, code_layers
        self._kept = Kept[SampleView](keep_nbytes)
        self._policy = ViewPolicy.from_json(reader.attributes["views"]["policy"])
        self._versions: dict[str, str] = reader.attributes["created_by"]["views"]

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        attributes = self._reader.attributes
        return {
            "source": attributes["source"]["fingerprint"],
            "policy": attributes["views"]["policy"],
            "num_views": attributes["views"]["num_views"],
            "codec": attributes["codec"] if self._with_codes else None,
        }

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`."""
        view = epoch % self._reader.layout.num_views
        return self._kept.get((view, sample), lambda: self._read(view, sample), _count_nbytes)

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`."""
        self._reader.expect(epoch % self._reader.layout.num_views, sample_S)

    @property
    def codes_may_narrow(self) -> bool:
        """See `Views.codes_may_narrow`. Codec exact's codes are the bits of floats."""
        return self._reader.attributes["codec"]["name"] == "transform"

    def _read(self, view: int, sample: int) -> SampleView:
        codes_LTC = self._reader.read_codes(view, sample, self._code_layers) if self._with_codes else None
        mix = NOT_MIXED
        if self._policy.mixing is not None:
            mix = stored_mix(self._policy, self._reader.parameters(view, sample))
        return SampleView(self._read_pixels(view, sample), codes_LTC, mix)

    def _read_pixels(self, view: int, sample: int) -> np.ndarray:
        if self._reader.layout.pixels is not None:
            return self._reader.read_pixels(view, sample)
        assert self._source is not None, "views that are not stored are replayed from a source"
        return replay_view(
            self._source,
            self._policy,
            sample,
            partial(self._reader.parameters, view),
            self._reader.pixel_hash(view, sample),
            self._versions,
        )


class FreshViews:
    """A new random view every epoch, without a cache.

    Args:
        source: the tars.
        policy: how views are drawn; under "eval" all epochs see the same one.
        partner_S: rows that views are mixed with under a policy that mixes, ascending; None for all good ones.
        keep_nbytes: memory for decoded images (for finished views under "eval"), in each process that reads.
    """

    def __init__(
        self, source: Source, policy: ViewPolicy, *, partner_S: np.ndarray | None = None, keep_nbytes: int = 0
    ) -> None:
        self._source, self._policy = source, policy
        self._partner_S = np.flatnonzero(source.index.problem_S == Problem.NONE) if partner_S is None else partner_S
        self._kept_images = Kept[Image.Image](keep_nbytes)
        self._kept_views = Kept[np.ndarray](keep_nbytes)

    @property
    def identity(self) -> dict[str, Any]:
        """See `Views.identity`."""
        return {"source": self._source.index.fingerprint, "policy": self._policy.to_json()}

    def read(self, sample: int, epoch: int) -> SampleView:
        """See `Views.read`."""
        if self._policy.name == "eval":
            view = self._kept_views.get(
                sample, lambda: self._draw(self._source.read_image(sample), sample, 0), lambda pixels: pixels.nbytes
            )
            return SampleView(view, None)
        pixels_HWC = self._draw(self._image(sample), sample, epoch)
        mix = draw_view_mix(self._policy, self._source, sample, epoch, self._partner_S)
        if mix != NOT_MIXED:
            partner = sample + mix.partner
            pixels_HWC = mix_pixels(pixels_HWC, self._draw(self._image(partner), partner, epoch), mix)
        return SampleView(pixels_HWC, None, mix)

    def expect(self, sample_S: np.ndarray, epoch: int) -> None:
        """See `Views.expect`. Does nothing: tars are read as they come."""

    @property
    def codes_may_narrow(self) -> bool:
        """See `Views.codes_may_narrow`; there are no codes."""
        return False

    def _image(self, sample: int) -> Image.Image:
        return self._kept_images.get(sample, lambda: self._source.read_image(sample), _count_image_nbytes)

    def _draw(self, image: Image.Image, sample: int, view: int) -> np.ndarray:
        key = self._source.index.sample_key(sample)
        return apply_view(image, draw_view(self._policy, key, view, image.height, image.width), self._policy)


def _count_nbytes(view: SampleView) -> int:
    return view.pixels_HWC.nbytes + (0 if view.codes_LTC is None else view.codes_LTC.nbytes)


def _count_image_nbytes(image: Image.Image) -> int:
    return image.width * image.height * 4  # Pillow spends four bytes on an RGB pixel


class _Batches(Dataset[Batch]):
    """Number -> batch of (sample, epoch) pairs."""

    def __init__(self, views: Views, label_S: np.ndarray, order: SampleOrder | Sequence[list[tuple[int, int]]]) -> None:
        self._views, self._label_S, self._order = views, label_S, order
        self._expected: list[tuple[int, int]] = []

    def __getitem__(self, number: int) -> Batch:
        order = self._order
        if isinstance(order, SampleOrder):
            self._expect(order, number)
        pairs = order.batch(number) if isinstance(order, SampleOrder) else order[number]
        sample_B = np.array([sample for sample, _ in pairs], np.int64)
        pixels, codes = Stack(len(pairs)), Stack(len(pairs), narrows=self._views.codes_may_narrow)
        mixes: list[Mix] = []
        for sample, epoch in pairs:
            view = self._views.read(sample, epoch)
            pixels.add(view.pixels_HWC)
            if view.codes_LTC is not None:
                codes.add(view.codes_LTC)
            mixes.append(view.mix)
        partner_B = sample_B + np.array([mix.partner for mix in mixes], np.int64)
        pixels_BHWC = pixels.tensor
        assert pixels_BHWC is not None, "a batch has samples"
        return Batch(
            sample_B=torch.from_numpy(sample_B),
            pixels_BHWC=pixels_BHWC,
            label_B=torch.from_numpy(self._label_S[sample_B]),
            mix_label_B=torch.from_numpy(self._label_S[partner_B]),
            mix_share_B=torch.tensor([mix.share for mix in mixes], dtype=torch.float32),
            codes_BLTC=codes.tensor,
        )

    def _expect(self, order: SampleOrder, step: int) -> None:
        """Have this step's windows and the next read ahead, each once."""
        coming = [(epoch, window + ahead) for epoch, window in order.windows(step) for ahead in (0, 1)]
        new = [place for place in dict.fromkeys(coming) if place not in self._expected]
        if new:
            # Aside, since a disk with much to read makes the asking wait.
            Thread(target=self._expect_windows, args=(order, new), name="atcache-expect", daemon=True).start()
        self._expected = coming or self._expected

    def _expect_windows(self, order: SampleOrder, windows: Sequence[tuple[int, int]]) -> None:
        for epoch, window in windows:
            # Reading itself will tell what is wrong.
            with suppress(AtcacheError, OSError):
                if len(sample_S := order.window_samples(epoch, window)):
                    self._views.expect(sample_S, epoch)


def training_batches(
    views: Views, label_S: np.ndarray, order: SampleOrder, *, first_step: int, stop_step: int, workers: int
) -> Iterator[Batch]:
    """The batches of steps first_step .. stop_step - 1, read ahead by `workers` processes (0: in this one)."""
    return _load(_Batches(views, label_S, order), range(first_step, stop_step), workers)


class BatchStream:
    """The batches of a training, which can be left at any batch and taken up there by another process.

    Iterating gives the batches that are left. `state_dict` counts what was handed out, not what was read ahead.

    Args:
        views: where samples are read.
        label_S: class of every row of the source.
        order: which samples a batch has.
        num_steps: batches in all.
        workers: processes that read ahead; 0 for none. Another number continues as well.
    """

    def __init__(
        self, views: Views, label_S: np.ndarray, order: SampleOrder, *, num_steps: int, workers: int = 0
    ) -> None:
        self._views, self._label_S, self._order = views, label_S, order
        self._num_steps, self._workers = num_steps, workers
        self._step = 0

    def __len__(self) -> int:
        return self._num_steps - self._step

    def __iter__(self) -> Iterator[Batch]:
        batches = training_batches(
            self._views,
            self._label_S,
            self._order,
            first_step=self._step,
            stop_step=self._num_steps,
            workers=self._workers,
        )
        for batch in batches:
            self._step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and of what; JSON values."""
        return {"step": self._step, "order": self._order.identity, "views": self._views.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the last batch that was handed out when `state` was taken.

        Raises:
            ConfigError: it is the state of another stream.
        """
        ours = self.state_dict()
        for part in ("order", "views"):
            differences = [name for name, value in ours[part].items() if state[part].get(name) != value]
            if differences or state[part].keys() != ours[part].keys():
                raise ConfigError(
                    f"the state is of another stream of batches: {part} differ in {', '.join(differences) or 'kind'}. "
                    "Make the stream with the samples, seed, batch size, shuffle and views it was made with."
                )
        if not 0 <= state["step"] <= self._num_steps:
            raise ConfigError(f"the state is at step {state['step']}: this stream has {self._num_steps} steps.")
        self._step = int(state["step"])


def validation_batches(
    views: Views, label_S: np.ndarray, sample_S: np.ndarray, *, batch_size: int, workers: int
) -> Iterator[Batch]:
    """All samples of `sample_S` once, in order, in view 0; the last batch may be smaller."""
    starts = range(0, len(sample_S), batch_size)
    pairs = [[(int(sample), 0) for sample in sample_S[start : start + batch_size]] for start in starts]
    return _load(_Batches(views, label_S, pairs), range(len(pairs)), workers)


def _load(batches: _Batches, numbers: range, workers: int) -> Iterator[Batch]:
    return read_ahead(batches, numbers, workers=workers, pin_memory=torch.cuda.is_available())
