"""A model's tensors <-> Flower's ArrayRecord.

What a reply carries is checked against what it declares before anything of it is parsed.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fl_app.types import FlAppError, Params

_NPY = "numpy.ndarray"
_Order: TypeAlias = Literal["C", "F"]
_C_ORDER: _Order = "C"


class MalformedReplyError(FlAppError):
    """A reply is not what the protocol says; the message says what is wrong with it."""


def encode_params(params: Params) -> ArrayRecord:
    """Return the tensors as Flower arrays, byte for byte as ``ArrayRecord(state_dict)`` gives them.

    About twenty times as fast for small tensors: the NPY header is made once per shape.
    """
    record = ArrayRecord()
    for name, tensor in params.items():
        values = tensor.detach().cpu().numpy()
        transposed = values.flags.f_contiguous and not values.flags.c_contiguous
        dtype = _dtype_name(values.dtype)
        header = _npy_header(dtype, values.shape, fortran_order=transposed)
        record[name] = Array(
            dtype=dtype,
            shape=values.shape,
            stype=_NPY,
            data=header + values.tobytes(order="F" if transposed else "C"),
        )
    return record


def decode_params(record: ArrayRecord) -> Params:
    """Return the tensors of a record.

    Each array must declare truly what it holds: the size of its data is checked against its
    declared shape and type before anything is parsed.

    Raises:
        MalformedReplyError: An array is not a plain numeric NPY array of its declared shape.
    """
    return {name: _decode_array(name, array) for name, array in record.items()}


def _decode_array(name: str, array: Array) -> Tensor:
    shape = tuple(array.shape)
    try:
        header = _npy_header(array.dtype, shape)
        if array.stype != _NPY:
            raise ValueError(f"it is serialised as {array.stype:.40}")
        offset, order = len(header), _C_ORDER
        if not array.data.startswith(header):
            offset, order = _read_npy_header(array)
        dtype = np.dtype(array.dtype)
        if min(shape, default=0) < 0:
            raise ValueError("no size can be negative")
        if len(array.data) - offset != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it holds {len(array.data) - offset} bytes of values")
        flat = np.frombuffer(array.data, dtype=dtype, offset=offset)
        # The copy makes the tensor writable and independent of the message.
        return torch.from_numpy(flat.reshape(shape, order=order).copy(order="C"))
    # NumPy has Python's parser read types and headers, which raises all kinds of things.
    except Exception as error:
        claim = f"{array.dtype:.40}{shape}"
        raise MalformedReplyError(
            f"array {name!r:.80} is not the {claim:.80} it claims to be: {error}"
        ) from error


def _read_npy_header(array: Array) -> tuple[int, _Order]:
    """Return where the values begin and in which order they lie, for a header not as ours.

    Such as of a transposed array, or one padded otherwise by another release of NumPy.

    Raises:
        ValueError: The header is broken, or states another shape or type than the array declares.
    """
    stream = io.BytesIO(array.data)
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"NPY format {version} is not known")
    shape, fortran_order, dtype = read(stream)
    if shape != tuple(array.shape) or dtype != np.dtype(array.dtype):
        raise ValueError(f"it holds {dtype}{shape}")
    return stream.tell(), "F" if fortran_order else "C"


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype[Any]) -> str:
    """Return NumPy's name of a type, such as "float32", which NumPy makes anew at every call."""
    return str(dtype)


@lru_cache(maxsize=1024)
def _npy_header(dtype: str, shape: tuple[int, ...], *, fortran_order: bool = False) -> bytes:
    """Return what NumPy's format puts before the values of an array."""
    described = np.dtype(dtype)
    if described.kind not in "fiub":
        raise ValueError(f"dtype {dtype} is not numeric")
    header = {
        "descr": np.lib.format.dtype_to_descr(described),
        "fortran_order": fortran_order,
        "shape": shape,
    }
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()
