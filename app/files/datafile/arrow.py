"""Read Arrow columns as plain values, in whatever form a writer stored them.

A text may be a string, a large string or a string view. Bytes have the same forms, or a fixed size, or are a list of
numbers below 256. Either may be in a dictionary, in runs, or in an extension type. Only this module maps types to
contents.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Holds = Literal["text", "bytes", "numbers", "booleans", "struct", "other"]


def holds(type_: pa.DataType) -> Holds:
    """Return the kind of a type's values, beneath dictionaries, runs and extensions."""
    types, type_ = pa.types, _beneath(type_)
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "text"
    if types.is_boolean(type_):
        return "booleans"
    if types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_):
        return "numbers"
    if types.is_struct(type_):
        return "struct"
    is_bytes = _is_list(type_) and _beneath(type_.value_type) in (pa.uint8(), pa.int8())
    is_bytes |= types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_)
    return "bytes" if is_bytes or types.is_fixed_size_binary(type_) else "other"


def can_be_dictionary(type_: pa.DataType) -> bool:
    """Return whether a column of the type can be read as a dictionary, with each value unpacked once."""
    return holds(type_) in ("text", "bytes") and not _is_list(_beneath(type_))


def member(type_: pa.DataType, name: str) -> Holds:
    """Return the kind of a struct's member of that name; "other" if it is missing."""
    beneath = _beneath(type_)
    found = [field.type for field in beneath if field.name == name] if pa.types.is_struct(beneath) else []
    return holds(found[0]) if len(found) == 1 else "other"


def checked(array: pa.Array) -> pa.Array:
    """Return the same array after validating its indices, offsets and texts, which a file may hold in invalid form.

    Raises:
        pyarrow.ArrowInvalid: a dictionary index out of range, invalid offsets, texts that are not UTF-8.
    """
    array.validate(full=True)
    return array


def distinct(array: pa.Array) -> tuple[npt.NDArray[np.int64], list[Any]]:
    """Return each row's index into the distinct values of an array without nulls, and these as Python values."""
    array = _stored(array)
    if _is_list(array.type):
        array = pa.array([as_bytes(value) for value in array.to_pylist()], pa.large_binary())
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    values = _stored(encoded.dictionary).to_pylist()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), values


def numeric(array: pa.Array) -> npt.NDArray[Any]:
    """Return numbers or booleans without nulls as a NumPy array; decimals as float64."""
    array = _stored(array)
    if pa.types.is_dictionary(array.type):
        array = _stored(array.dictionary_decode())
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def as_bytes(value: Any) -> bytes | None:
    """Return a Python value of the kind "bytes" as bytes; None for null.

    Raises:
        ValueError, TypeError: a list that holds a null.
    """
    if isinstance(value, list):
        return bytes(number & 255 for number in value)
    return None if value is None else bytes(value)


def as_text(value: Any) -> str | None:
    """Return a value of "text", or of "bytes" as older writers store texts, as text; None for null.

    Raises:
        UnicodeDecodeError: bytes that are not UTF-8.
    """
    if value is None or isinstance(value, str):
        return value
    content = as_bytes(value)
    return None if content is None else content.decode()


def _beneath(type_: pa.DataType) -> pa.DataType:
    while True:
        if isinstance(type_, pa.BaseExtensionType):
            type_ = type_.storage_type
        elif pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
            type_ = type_.value_type
        else:
            return type_


def _stored(array: pa.Array) -> pa.Array:
    """Return the array without extension types, runs and views, which some functions of pyarrow do not support."""
    if isinstance(array, pa.ExtensionArray):
        return _stored(array.storage)
    if pa.types.is_run_end_encoded(array.type):
        return _stored(pc.run_end_decode(array))
    if pa.types.is_string_view(array.type):
        return array.cast(pa.large_string())
    return array.cast(pa.large_binary()) if pa.types.is_binary_view(array.type) else array


def _is_list(type_: pa.DataType) -> bool:
    types = pa.types
    is_view = types.is_list_view(type_) or types.is_large_list_view(type_)
    return bool(is_view or types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_))
