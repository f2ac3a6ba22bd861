"""Transformations as files: safetensors with a declared architecture. Saved, judged without trust, loaded.

Nothing is ever unpickled. No tensor is read before the header was checked: the file must hold exactly the tensors that its
declared architecture implies. Our own code reads the header, because a library may accept files that are not quite right, and
what is accepted must not depend on that. Then the library opens the file too, because what it refuses cannot be loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from models.transformations import (
    Architecture,
    InvalidArchitecture,
    Transformation,
    build,
    check_tensors,
    describe_architecture,
    optional_tensors,
    parse_architecture,
    side_dimension,
)

FORMAT = "forwardfill.transformation/1"
MAX_HEADER_BYTES = 1 << 20  # the largest architecture of the list needs some 50 KB
READ_BYTES = 1 << 22  # a multiple of every item size
PICKLE_PROTOCOLS = 5  # a pickle starts with 0x80 and its protocol
#: no architecture has a tensor of more axes
MAX_AXES = 4
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TORCH_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class UnsafeArtifact(ValueError):
    """The file is not a well-formed safetensors file of a declared architecture."""


@dataclass(frozen=True, slots=True)
class ArtifactInfo:
    """What a checked file is."""

    #: the declared architecture as plain data
    architecture: dict[str, object]
    kind: str
    source_dimension: int
    target_dimension: int
    #: None where it needs no side-information
    side_dimension: int | None
    has_uncertainty: bool
    #: "float32", "float16", "bfloat16", several joined by "+", or "none" for a file without tensors
    dtype: str
    #: numbers in all tensors
    parameters: int
    #: bytes of the file
    size: int

    def declared(self) -> dict[str, object]:
        """Return what a catalog keeps: the architecture, the side-information it needs, and whether it tells uncertainty."""
        return {**self.architecture, "side_dimension": self.side_dimension, "uncertainty": self.has_uncertainty}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Header:
    architecture: Architecture
    tensors: tuple[_Tensor, ...]
    #: where the data starts
    start: int
    size: int


def save(path: str | Path, module: Transformation, *, dtype: torch.dtype = torch.float32) -> str:
    """Write a transformation as an artifact: first to a file beside `path`, which takes its place only if `check` accepts it.

    Args:
        path: where to write; the folder is made if it is absent.
        module: the transformation.
        dtype: float32, float16 or bfloat16, the type in which tensors are stored.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        UnsafeArtifact: the weights hold a NaN or an infinity, perhaps only after the conversion to `dtype`.
    """
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"an artifact stores float32, float16 or bfloat16, not {dtype}")
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in module.state_dict().items()}
    architecture = json.dumps(describe_architecture(module.architecture), separators=(",", ":"))
    data = _ordered(to_bytes(tensors, metadata={"format": FORMAT, "architecture": architecture}))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def check(path: str | Path) -> ArtifactInfo:
    """Judge a file without trusting it: its header, its tensors against its architecture, and every value.

    Raises:
        UnsafeArtifact: with the reason, for anything that is not a well-formed safetensors file of a declared
            architecture with finite values.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        header = _read_header(path, file)
        for tensor in header.tensors:
            _check_values(file, header.start, tensor)
    return _info(header)


def read_architecture(path: str | Path) -> Architecture:
    """Read the architecture a file declares, checking its header and tensor shapes but not the values.

    Raises:
        UnsafeArtifact: as `check`, except for values.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return _read_header(path, file).architecture


def load(path: str | Path) -> Transformation:
    """Load a transformation after `check`: in eval mode, float32, on the CPU, with no gradient.

    Raises:
        UnsafeArtifact: as `check`.
        OSError: the file cannot be read.
    """
    check(path)
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    architecture = read_architecture(path)
    with torch.device("meta"):  # the weights come from the file: making random ones first would be waste
        module = build(architecture, optional=tensors.keys() & optional_tensors(architecture).keys())
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _ordered(data: bytes) -> bytes:
    """Write the header's keys in one order: the library's own differs from run to run, and equal weights need one digest."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data stays aligned
    return len(header).to_bytes(8, "little") + header + data[end:]


def _read_header(path: str | Path, file: BinaryIO) -> _Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    _refuse_other_formats(start)
    if len(start) < 8:
        raise UnsafeArtifact(f"a safetensors file has at least 8 bytes, this one has {size}")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES and start[0] == 0x80 and start[1] <= PICKLE_PROTOCOLS:
        raise UnsafeArtifact("this is a pickle, not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise UnsafeArtifact(f"the header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise UnsafeArtifact(f"the file is truncated: the header claims {length} bytes, the file has {size}")
    entries = _parse_object("the header", _decoded(file.read(length)))
    architecture = _parse_metadata(entries.pop("__metadata__", None))
    tensors = tuple(_parse_tensor(name, entry) for name, entry in entries.items())
    _check_layout(tensors, size - 8 - length)
    try:
        check_tensors(architecture, {tensor.name: tensor.shape for tensor in tensors})
    except InvalidArchitecture as error:
        raise UnsafeArtifact(str(error)) from error
    _check_opens(path)
    return _Header(architecture, tensors, 8 + length, size)


def _refuse_other_formats(start: bytes) -> None:
    for magic, name in ((b"PK\x03\x04", "a zip archive, as torch.save writes"), (b"\x93NUMPY", "a NumPy file")):
        if start.startswith(magic):
            raise UnsafeArtifact(f"this is {name}, not a safetensors file")


def _decoded(header: bytes) -> str:
    """Read UTF-8 and nothing else: `json.loads` would guess the encoding of bytes."""
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnsafeArtifact(f"the header is not well-formed JSON in UTF-8: {error}") from error


def _check_opens(path: str | Path) -> None:
    """Refuse a file that the library does not open. Sizes are checked before, so that the library never sees hostile ones."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UnsafeArtifact(f"the header is none that the safetensors library reads: {error}") from error


def _parse_object(what: str, text: str) -> dict[str, object]:
    try:
        parsed = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError
        raise UnsafeArtifact(f"{what} is not well-formed JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise UnsafeArtifact(f"{what} is not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that occurs twice: some readers take the first of the two values, others the last."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key is there twice")
    return entries


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _parse_metadata(metadata: object) -> Architecture:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsafeArtifact("the header has no metadata of strings: `format` and `architecture` belong there")
    if metadata.get("format") != FORMAT:
        raise UnsafeArtifact(f"the metadata's format is {metadata.get('format')!r}, it must be {FORMAT!r}")
    if "architecture" not in metadata:
        raise UnsafeArtifact("the metadata declares no architecture")
    try:
        return parse_architecture(_parse_object("the architecture", metadata["architecture"]))
    except InvalidArchitecture as error:
        raise UnsafeArtifact(str(error)) from error


def _parse_tensor(name: str, entry: object) -> _Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnsafeArtifact(f"the tensor {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise UnsafeArtifact(f"the tensor {name!r} is of type {dtype!r}, only {', '.join(ITEM_SIZES)} are allowed")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise UnsafeArtifact(
            f"the tensor {name!r} has a shape or offsets that are not lists of whole numbers, at most {MAX_AXES} of 63 bits"
        )
    tensor = _Tensor(name, dtype, tuple(shape), offsets[0], offsets[1])
    if tensor.end - tensor.begin != prod(tensor.shape) * ITEM_SIZES[dtype]:
        raise UnsafeArtifact(f"the tensor {name!r} has offsets {offsets} that do not fit its shape {shape}")
    return tensor


def _are_sizes(values: object) -> bool:
    """Whether they are a few numbers of 63 bits: the product of all that a header can hold takes seconds, in one call in C."""
    return (
        isinstance(values, list)
        and len(values) <= MAX_AXES
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )


def _check_layout(tensors: tuple[_Tensor, ...], data_bytes: int) -> None:
    position = 0
    for tensor in sorted(tensors, key=lambda each: (each.begin, each.end)):
        if tensor.begin != position:
            raise UnsafeArtifact(
                f"the tensor {tensor.name!r} begins at {tensor.begin}, not at {position}: a gap or overlap"
            )
        position = tensor.end
    if position != data_bytes:
        raise UnsafeArtifact(
            f"the tensors need {position} bytes, the file has {data_bytes}: it is truncated or too long"
        )


def _check_values(file: BinaryIO, start: int, tensor: _Tensor) -> None:
    for values in _read_values(file, start, tensor):
        if not np.isfinite(values).all():
            raise UnsafeArtifact(f"the tensor {tensor.name!r} holds a NaN or an infinity")
        if tensor.name.endswith(".running_var") and (values < 0).any():
            raise UnsafeArtifact(f"the tensor {tensor.name!r} holds a negative variance")


def _read_values(file: BinaryIO, start: int, tensor: _Tensor) -> Iterator[np.ndarray]:
    file.seek(start + tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        data = file.read(min(left, READ_BYTES))
        if not data:
            raise UnsafeArtifact("the file became shorter while it was read")
        left -= len(data)
        if tensor.dtype == "BF16":  # the upper half of a float32
            yield (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            yield np.frombuffer(data, "<f4" if tensor.dtype == "F32" else "<f2")


def _info(header: _Header) -> ArtifactInfo:
    architecture, names = header.architecture, {tensor.name for tensor in header.tensors}
    dtypes = sorted({DTYPE_NAMES[tensor.dtype] for tensor in header.tensors})
    return ArtifactInfo(
        architecture=describe_architecture(architecture),
        kind=architecture.kind,
        source_dimension=architecture.source_dimension,
        target_dimension=architecture.target_dimension,
        side_dimension=side_dimension(architecture),
        has_uncertainty="uncertainty.weight" in names,
        dtype="+".join(dtypes) or "none",
        parameters=sum(prod(tensor.shape) for tensor in header.tensors),
        size=header.size,
    )
