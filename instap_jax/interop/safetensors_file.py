"""Writes a safetensors file tensor by tensor, in any order: its header needs only the shapes.

The format: eight bytes little-endian, the length of the header; the header, JSON, key -> dtype,
shape and place; then the values. Only float32: parameters are that everywhere.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from instap_jax.interop.keys import Shape


class SafetensorsWriter:
    """A file of the given keys and shapes, to be filled with `write`; a context manager.

    Leaving it raises ValueError where a key was not written.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Shape]):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for key, shape in shapes.items():
            start, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
            header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # values begin at a multiple of eight
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._first = self._file.tell()
        self._left = {key: header[key] for key in shapes}

    def write(self, key: str, array: np.ndarray) -> None:
        """Writes one tensor, float32, of the shape announced; each once."""
        place = self._left.pop(key)
        if array.dtype != np.float32 or list(array.shape) != place["shape"]:
            raise ValueError(f"{key}: {array.dtype} {array.shape}, not float32 {place['shape']}")
        self._file.seek(self._first + place["data_offsets"][0])
        self._file.write(np.ascontiguousarray(array).data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, *rest) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{len(self._left)} keys not written, first {next(iter(self._left))}")
