"""Where the source image is in a view: points carried through crop, resize, window, flip and RandAugment's movements.

Points are (x, y) in pixels; the first pixel's centre is (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from atcache.views.apply import checked_parameters
from atcache.views.policy import PARAMETER_NAMES, ViewPolicy
from atcache.views.randaugment import moved_points
from atcache.views.rendering import stored_mix

Box = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Placement:
    """Where one sample's source image is in one of its views.

    Example:
        placement = atcache.pictures.placement(cache, sample=3, view=1)
        left, top = placement.outline_42[0]  # of the part of the image that the view shows
    """

    source_height: int
    """Height of the source image, in pixels."""
    source_width: int
    view_height: int
    """Height of the view, in pixels."""
    view_width: int
    window_23: np.ndarray
    """Maps a point (x, y, 1) of the source image to the view, before any operation of RandAugment."""
    moves_23: tuple[np.ndarray, ...]
    """What each operation of RandAugment does to a point (x, y, 1) of the view, in order."""
    hidden: tuple[Box, ...]
    """Boxes of the view that do not show the sample: the erased one, and the one that CutMix pasted."""
    share: float
    """Share of the sample in each pixel that shows it: less than 1 if Mixup blended another sample in."""

    @classmethod
    def of(cls, policy: ViewPolicy, parameters_P: np.ndarray, source_height: int, source_width: int) -> Placement:
        """The placement that a view's stored parameters describe.

        Args:
            policy: how the view was drawn.
            parameters_P: its stored parameters, all of them.
            source_height: height of the source image, in pixels.
            source_width: its width.

        Raises:
            CorruptCacheError: the parameters do not fit the image or the policy.
        """
        height, width = policy.image_height, policy.image_width
        own_P = parameters_P[: len(PARAMETER_NAMES)]
        values = checked_parameters(own_P, source_height, source_width, policy)
        mix = stored_mix(policy, parameters_P)
        top, left, crop_height, crop_width, resize_height, resize_width, window_top, window_left, flip = values[:9]
        scale_x, scale_y = resize_width / crop_width, resize_height / crop_height
        window_23 = np.array([[scale_x, 0, -left * scale_x - window_left], [0, scale_y, -top * scale_y - window_top]])
        if flip:
            window_23[0] = [-scale_x, 0, width - window_23[0, 2]]
        moves = [
            moved_points(values[place], float(parameters_P[place + 1]), height, width)
            for place in (PARAMETER_NAMES.index("operation_1"), PARAMETER_NAMES.index("operation_2"))
        ]
        boxes: tuple[Box, Box] = ((values[13], values[14], values[15], values[16]), (*mix[2:6],))
        return cls(
            source_height=source_height,
            source_width=source_width,
            view_height=height,
            view_width=width,
            window_23=window_23,
            moves_23=tuple(_inverse(move_23) for move_23 in moves if not np.array_equal(move_23, np.eye(2, 3))),
            hidden=tuple(box for box in boxes if box[2]),
            share=1.0 if mix.height else mix.share,
        )

    @property
    def outline_42(self) -> np.ndarray:
        """The corners (x, y) of the part of the source image that the view shows, clockwise from the top left."""
        back_23 = _inverse(self.window_23)  # a flip exchanges corners
        corners_42 = np.array(
            [[0, 0], [self.view_width, 0], [self.view_width, self.view_height], [0, self.view_height]]
        )
        (x1, y1), (x2, y2) = (_moved(back_23, corners_42).min(axis=0), _moved(back_23, corners_42).max(axis=0))
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])

    def to_view(self, points_N2: np.ndarray) -> np.ndarray:
        """Where points (x, y) of the source image are in the view: float64 (..., 2), NaN where it does not show them.

        Args:
            points_N2: any shape (..., 2).
        """
        points_N2 = _moved(self.window_23, points_N2)
        seen_N = self._is_inside(points_N2)
        for move_23 in self.moves_23:  # each operation cuts off what it moves out of the image
            points_N2 = _moved(move_23, points_N2)
            seen_N &= self._is_inside(points_N2)
        for top, left, height, width in self.hidden:
            x_N, y_N = points_N2[..., 0], points_N2[..., 1]
            seen_N &= ~((x_N >= left) & (x_N < left + width) & (y_N >= top) & (y_N < top + height))
        return np.where(seen_N[..., None], points_N2, np.nan)

    def to_source(self, points_N2: np.ndarray) -> np.ndarray:
        """Where points (x, y) of the view come from in the source image, float64 (..., 2), be they shown or hidden.

        Args:
            points_N2: any shape (..., 2).
        """
        for matrix_23 in reversed((self.window_23, *self.moves_23)):
            points_N2 = _moved(_inverse(matrix_23), points_N2)
        return points_N2

    def _is_inside(self, points_N2: np.ndarray) -> np.ndarray:
        x_N, y_N = points_N2[..., 0], points_N2[..., 1]
        return (x_N >= 0) & (x_N < self.view_width) & (y_N >= 0) & (y_N < self.view_height)


def _moved(matrix_23: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
    return points_N2 @ matrix_23[:, :2].T + matrix_23[:, 2]


def _inverse(matrix_23: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.vstack([matrix_23, [0.0, 0.0, 1.0]]))[:2]
