"""TPU topologies by name, and what is known of their chips; no TPU needed, only `libtpu`.

A topology is written as the TPU compiler does, 'v5e:16x16' (chips along each axis of a slice), or
as Google Cloud sells it: 'v5litepod-256', 'v6e-256', 'v5p-128'. Cloud counts chips of v5e and v6e,
but TensorCores, of which a chip has two, of v4 and v5p: 'v5p-128' is 64 chips.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from instap_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation of TPU.

    Attributes:
      hbm: bytes that a program may use, by the compiler's own out-of-memory message.
      clock: cycles a second of the TensorCore: peak FLOP/s over the FLOPs a cycle of its MXUs.
      hbm_speed: bytes a second (Cloud's documentation).
      ici: bytes a second that all its inter-chip links can send together (Cloud's documentation).
      most: chips of the largest slice.
      cores: TensorCores that Cloud's names count for one chip.
      axes: 2 or 3, of the torus.
      options: of `get_topology_desc`.
    """

    hbm: int
    clock: float
    hbm_speed: float
    ici: float
    most: int
    cores: int = 1
    axes: int = 2
    options: tuple[tuple[str, str], ...] = ()


_GIB = 1 << 30
CHIPS = {
    "v4": Chip(
        hbm=int(30.75 * _GIB),
        clock=1.05e9,
        hbm_speed=1228e9,
        ici=300e9,
        most=4096,
        cores=2,
        axes=3,
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip(hbm=int(15.75 * _GIB), clock=1.5e9, hbm_speed=819e9, ici=200e9, most=256),
    "v5p": Chip(
        hbm=int(95.73 * _GIB),
        clock=1.75e9,
        hbm_speed=2765e9,
        ici=600e9,
        most=8960,
        cores=2,
        axes=3,
    ),
    "v6e": Chip(hbm=int(31.24 * _GIB), clock=1.75e9, hbm_speed=1640e9, ici=448e9, most=256),
}

# Shapes of Cloud's slices, by their number of chips.
_SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
_CLOUD_PREFIX = {"v5litepod": "v5e"}
# libtpu would ask the Cloud's metadata server where it is, and refuse a second process.
_ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # The compiler's threads have 64 KiB of stack, which its cost model of fused products overflows
    # (libtpu 0.0.42.1, stage 2's images on a v5p): the process dies of SIGSEGV.
    "LIBTPU_INIT_ARGS": "--fibers_default_thread_stack_size=1048576",
}
_HOST = (2, 2, 1)  # chips of a host along each axis, the most there are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice of TPU chips, or several joined by the data-center network.

    Attributes:
      generation: key of `CHIPS`.
      shape: chips along each axis of a slice.
      slices: how many.
    """

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Of all slices; a chip is one device."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """As the compiler writes a slice: 'v5e:16x16'."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def label(self) -> str:
        return self.name + (f" x {self.slices} slices" if self.slices > 1 else "")


def parse(text: str, slices: int = 1) -> Topology:
    """Reads 'v5e:16x16' or a Cloud name such as 'v5litepod-256'.

    Raises:
      UserError: for a name that is not known, with the list of those that are.
    """
    shaped = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.strip().lower())
    if shaped and shaped[1] in CHIPS:
        shape = tuple(int(size) for size in shaped[2].split("x"))
        chip = CHIPS[shaped[1]]
        if len(shape) == chip.axes and 0 < math.prod(shape) <= chip.most:
            return Topology(generation=shaped[1], shape=shape, slices=slices)
    name = cloud_names().get(text.strip().lower())
    if name is None:
        raise UserError(
            f"--topology={text} is not known; write TYPE:SHAPE, as in v5e:16x16 or v5p:4x4x4, or "
            f"a Cloud name: {', '.join(_cloud_list())}"
        )
    return parse(name, slices)


def cloud_names() -> dict[str, str]:
    """Cloud's name of a slice -> ours, as {'v5litepod-16': 'v5e:4x4', ...}."""
    names = {}
    for generation, chip in CHIPS.items():
        prefixes = [generation, *(p for p, g in _CLOUD_PREFIX.items() if g == generation)]
        for shape in _SHAPES[chip.axes]:
            chips = math.prod(map(int, shape.split("x")))
            for prefix in prefixes:
                names[f"{prefix}-{chips * chip.cores}"] = f"{generation}:{shape}"
    return names


def _cloud_list() -> list[str]:
    """'v5e-1|4|8|...' for every prefix."""
    sizes: dict[str, list[str]] = {}
    for name in cloud_names():
        prefix, size = name.split("-")
        sizes.setdefault(prefix, []).append(size)
    return [f"{prefix}-{'|'.join(found)}" for prefix, found in sizes.items()]


def compiler_version() -> str:
    """Version of the installed TPU compiler.

    Raises:
      UserError: it, or what hands kernels to it, is not installed.
    """
    try:
        importlib.metadata.version("flatbuffers")  # of jax.export
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "the TPU compiler is not installed; install it, no TPU is needed: "
            "pip install -e '.[compile]' (or pip install libtpu flatbuffers)"
        ) from error


def devices(topology: Topology) -> list:
    """Abstract devices of the topology, for a mesh to compile for; they compute nothing.

    Raises:
      UserError: no compiler, or it refuses the shape.
    """
    compiler_version()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = dict(topology.chip.options)
    if math.prod(topology.shape) < math.prod(_HOST):
        options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except Exception as error:  # the compiler's own errors have no common class
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the TPU compiler refuses --topology={topology.name}: {reason}") from error
    return list(described.devices)


@contextlib.contextmanager
def compiler_environment() -> Iterator[None]:
    """To compile in. The TPU compiler ends the process at a flag of another platform in XLA_FLAGS,
    and JAX's own cache writes programs for absent devices but cannot read them back."""
    jax.devices("cpu")  # made while XLA_FLAGS says how many
    flags = os.environ.pop("XLA_FLAGS", None)
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags
