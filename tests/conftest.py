"""Shared by all tests: eight CPU devices, exact matmuls, shapes checked at public boundaries."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

from absl import flags

# grain's worker processes refuse to start before absl has parsed the command line.
flags.FLAGS.mark_as_parsed()
