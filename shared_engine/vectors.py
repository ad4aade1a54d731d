"""Vectors cut to size, scaled to unit length, and converted to another number type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from shared_engine.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary"]
"""Number types of a vector, as the NIM's `embedding_type` names them."""


def unit(vectors: NDArray[np.float32], dimensions: int | None = None) -> NDArray[np.float32]:
    """Cut vectors (n, d) to their first `dimensions` values, then scale each to unit length.

    Cutting comes first, as a part of a unit vector is not of unit length. Rows with NaN or infinity
    keep them; a zero row stays zero. Computed in float32, in place if nothing is cut.
    """
    import numpy as np

    cut = vectors[:, :dimensions] if dimensions is not None else vectors
    out = np.ascontiguousarray(cut, dtype=np.float32)
    tiny = np.finfo(np.float32).tiny
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", out, out))  # (n,)
        far = ~((norms > 1e-15) & (norms < np.inf))  # the squares over- or underflow float32
        if far.any():
            most = np.abs(out[far]).max(axis=1, keepdims=True, initial=0)  # a vector may be empty
            out[far] /= np.maximum(most, tiny)
            norms[far] = np.sqrt(np.einsum("nd,nd->n", out[far], out[far]))
        out /= np.maximum(norms, tiny)[:, None]
    return out


def quantize(
    vectors: NDArray[np.float32],
    embedding_type: EmbeddingType,
    ranges: NDArray[np.float32] | None = None,
) -> NDArray[Any]:
    """Return vectors (n, d) as another number type; "float" returns them unchanged.

    - "ubinary": one bit per value, set if it is > 0, packed to (n, ceil(d / 8)) uint8.
    - "binary": the same bytes minus 128, as int8.
    - "uint8", "int8": (n, d). With `ranges`, 255 equal steps between the smallest and the largest
      value of a dimension; values outside are clipped. Without, each vector is scaled by its own
      largest magnitude to -127..127 (uint8: plus 128), so that a vector does not depend on the
      others and cosine similarity is kept.

    The bit types and the formula for `ranges` are those of sentence-transformers'
    `quantize_embeddings`, which by default calibrates on the batch itself.

    Args:
        ranges: (2, d), the smallest and the largest value of each dimension over a calibration set.

    Raises:
        ConfigurationError: `embedding_type` is not one of these.
    """
    import numpy as np

    if embedding_type not in (kinds := get_args(EmbeddingType)):
        raise ConfigurationError(f"embedding_type={embedding_type!r}: expected {', '.join(kinds)}")
    if embedding_type == "float":
        return vectors
    if embedding_type in ("binary", "ubinary"):
        levels = np.packbits(vectors > 0, axis=-1)
    elif ranges is not None:
        low, high = ranges.astype(np.float32)
        steps = (vectors - low) / ((high - low) / np.float32(255))
        levels = np.clip(steps, 0, 255).astype(np.uint8)
    else:
        largest = np.maximum(np.abs(vectors).max(axis=-1, keepdims=True), np.float32(1e-12))
        levels = (np.rint(vectors / largest * np.float32(127)) + 128).astype(np.uint8)
    if embedding_type in ("uint8", "ubinary"):
        return levels
    return (levels.astype(np.int16) - 128).astype(np.int8)
