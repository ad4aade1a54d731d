"""Compare the vectors of one text in both roles, to learn whether a server honours roles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SAME_COSINE = 0.999
"""Least cosine of two vectors of the same text. Number types and batches change it less, and the
prefixes of a role change it more, as the text of the probe is one character."""


def have_same_text(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Return whether two vectors are of the same text, prefix included.

    >>> have_same_text(np.float32([1, 0]), np.float32([1, 0.01]))
    True
    >>> have_same_text(np.float32([1, 0]), np.float32([1, 0.2]))
    False
    """
    lengths = _length(one) * _length(other)
    return bool(np.vdot(one.astype(float), other.astype(float)) >= _SAME_COSINE * lengths)


def have_same_scale(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Return whether two vectors agree in length; bytes of another number type would not.

    >>> have_same_scale(np.float32([3, 4]), np.float32([4, 3]))
    True
    >>> have_same_scale(np.float32([3, 4]), np.float32([3, 4]).byteswap())
    False
    """
    return one.shape == other.shape and 0.5 < (_length(one) + 1e-9) / (_length(other) + 1e-9) < 2


def _length(vector: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(vector.astype(float)))
