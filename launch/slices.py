"""Cloud TPU slices by their Cloud names, and what each platform calls them.

`v5litepod-256` and `v6e-256` count chips; `v4-512` and `v5p-512` count cores, two a chip.
Sources: Google Cloud, "TPU configurations" and "Plan TPUs in GKE".
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A TPU version: cores counted in the Cloud name, software and node labels."""

    cores_per_chip: int
    runtime: str  # image of a TPU VM
    gke: str  # cloud.google.com/gke-tpu-accelerator
    largest: int  # chips of a slice
    flat: bool  # 2D torus: hosts of slices of up to 8 chips have them all


_KINDS = {
    "v4": _Kind(2, "tpu-ubuntu2204-base", "tpu-v4-podslice", 4096, False),
    "v5litepod": _Kind(1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 256, True),
    "v5p": _Kind(2, "v2-alpha-tpuv5", "tpu-v5p-slice", 6144, False),
    "v6e": _Kind(1, "v2-alpha-tpuv6e", "tpu-v6e-slice", 256, True),
}
_ALIASES = {"v5e": "v5litepod"}
_CHIPS_PER_HOST = 4
_CUBE = 64  # chips of a 3D torus' building block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice.

    Attributes:
      name: as Cloud TPU knows it, `v5litepod-256`.
      topology: `16x16`, `4x4x8`.
      hosts: virtual machines of Cloud TPU, and processes.
      runtime: software version of its virtual machines.
      gke: value of the node label cloud.google.com/gke-tpu-accelerator.
    """

    name: str
    chips: int
    topology: str
    hosts: int
    runtime: str
    gke: str

    @property
    def gke_hosts(self) -> int:
        """Machines of its node pool: xpk takes those of 4 chips for slices of 8 chips, too."""
        return max(1, self.chips // _CHIPS_PER_HOST)


def slice_of(name: str) -> Slice:
    """The slice of a Cloud name.

    Raises:
      ValueError: with one line that says what is expected.
    """
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name)
    kind_name = _ALIASES.get(match[1], match[1]) if match else ""
    if kind_name not in _KINDS:
        raise ValueError(
            f"accelerator {name!r} is not VERSION-SIZE with one of {', '.join(_KINDS)}; "
            "for example v5litepod-256, v5p-128, v6e-256"
        )
    kind, size = _KINDS[kind_name], int(match[2])
    chips = size // kind.cores_per_chip
    if size % kind.cores_per_chip or not _exists(chips, kind):
        raise ValueError(f"accelerator {name!r}: {kind_name} has slices of {_sizes(kind)}")
    return Slice(
        name=f"{kind_name}-{size}",
        chips=chips,
        topology=_flat(chips) if kind.flat else _cube(chips),
        hosts=1 if kind.flat and chips <= 8 else chips // _CHIPS_PER_HOST,
        runtime=kind.runtime,
        gke=kind.gke,
    )


def _exists(chips: int, kind: _Kind) -> bool:
    if kind.flat:
        return chips in (1, *_powers(4, kind.largest))
    cubes = chips % _CUBE == 0 and chips <= kind.largest
    return chips in _powers(4, _CUBE) or (cubes and chips > 0)


def _sizes(kind: _Kind) -> str:
    """In the words of the Cloud names, which count cores."""
    cores = kind.cores_per_chip
    if kind.flat:
        return ", ".join(map(str, (1, *_powers(4, kind.largest))))
    small = ", ".join(str(cores * chips) for chips in _powers(4, _CUBE))
    return f"{small} and multiples of {cores * _CUBE} up to {cores * kind.largest}"


def _powers(first: int, last: int) -> list[int]:
    return [2**n for n in range(first.bit_length() - 1, last.bit_length())]


def _flat(chips: int) -> str:
    short = 2 ** (int(math.log2(chips)) // 2)
    return f"{short}x{chips // short}"


def _cube(chips: int) -> str:
    """The smallest slices are parts of a cube of 4x4x4; larger ones are made of cubes, with sides
    as equal as can be, the smallest first."""
    if chips < _CUBE:
        return {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"}[chips]
    cubes = chips // _CUBE
    sides = (
        (a, b, cubes // (a * b))
        for a in range(1, cubes + 1)
        if cubes % a == 0
        for b in range(a, cubes // a + 1)
        if (cubes // a) % b == 0 and cubes // (a * b) >= b
    )
    return "x".join(str(4 * side) for side in min(sides, key=sum))
