"""One vector as the bytes of a .npy file, the form in which Flower's arrays travel.

Read without numpy's own file parser: a hostile header could make it allocate anything. Only the one
header that `write_vector` writes is accepted.
"""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.errors import ProtocolError


def _header(dtype: str, length: int) -> bytes:
    stream = BytesIO()
    description = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(
        stream, {"descr": description, "fortran_order": False, "shape": (length,)}
    )
    return stream.getvalue()


def write_vector(vector: NDArray[np.generic]) -> bytes:
    """Bytes of a (length,) vector, little-endian."""
    little = np.ascontiguousarray(vector, dtype=vector.dtype.newbyteorder("<"))
    return _header(vector.dtype.name, vector.shape[0]) + little.tobytes()


def read_vector(where: str, data: bytes, *, dtype: str, length: int) -> NDArray[np.generic]:
    """The (length,) vector in these bytes, read-only and not copied.

    Args:
        where: Names the array in errors.
        data: The bytes.
        dtype: Name of its numpy type.
        length: Number of elements.

    Raises:
        ProtocolError: The bytes have another header or length.
    """
    header = _header(dtype, length)
    size = len(header) + np.dtype(dtype).itemsize * length
    if len(data) != size or not data.startswith(header):
        raise ProtocolError(f"{where} must have {size} bytes with their header, got {len(data)}")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=len(header))
