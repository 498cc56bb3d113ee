"""Ridge regression with exact leave-one-out errors for many strengths at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .agreement import Floats


@dataclass(frozen=True)
class Ridge:
    """A table of known numbers, decomposed once.

    Args:
        u: Left singular vectors, shape (rows, r).
        size: Singular values, shape (r,).
        strengths: Of the pull of all weights towards 0, shape (s,).
    """

    u: Floats
    size: Floats
    strengths: Floats

    @classmethod
    def of(cls, table: Floats, strengths: Floats) -> Ridge:
        """Decomposes `table`, shape (rows, columns); `strengths` are relative to its largest singular value squared."""
        u, size, _ = np.linalg.svd(table, full_matrices=False)
        return cls(u, size, strengths * max(float(size[0]) ** 2, 1e-300))

    @property
    def _kept_back(self) -> Floats:
        """Share of the target that is not fitted, for each strength and direction."""
        return np.asarray(self.strengths[:, None] / (self.size**2 + self.strengths[:, None]), dtype=np.float64)

    def left_out(self, target: Floats) -> Floats:
        """Error of each row of the target when it is predicted by a fit on all others, shape (s, rows).

        Written with what is kept back, not with what is fitted: with as many columns as rows both numerator and
        denominator vanish, and their difference from 1 would be rounding errors.
        """
        inside = self.u.T @ target
        outside = target - self.u @ inside
        lever = 1 - (self.u**2).sum(1)
        errors = outside + (self._kept_back * inside) @ self.u.T
        return np.asarray(errors / (np.where(lever > 1e-10, lever, 0.0) + self._kept_back @ (self.u.T**2)))

    def freedom(self, index: int) -> float:
        """How many numbers a fit with the strength of this index takes from the target."""
        return float((1 - self._kept_back[index]).sum())
