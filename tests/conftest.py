"""Shared by all tests: eight CPU devices, exact matmuls, shapes checked at public boundaries."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Unoptimised code compiles four times faster, and tests compile far more than they compute.
FLAGS = {"xla_force_host_platform_device_count": 8, "xla_backend_optimization_level": 0}
for name, value in FLAGS.items():
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}"

from absl import flags

# grain's worker processes refuse to start before absl has parsed the command line.
flags.FLAGS.mark_as_parsed()
