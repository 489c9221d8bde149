"""Shared by all tests: eight CPU devices, exact matmuls, shapes checked at public boundaries."""

import os
import signal
import sys
from pathlib import Path

# Scripts, not a package: they run where nothing is installed.
sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Unoptimised code compiles many times faster, and tests compile far more than they compute: the
# first flag makes a step of stage 2 compile in a quarter of the time, the second in half of that.
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": "false",
}
for name, value in FLAGS.items():
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}"

# Many tests build the same small programs: compile each once, in whichever process comes first.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".xla_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import pytest  # noqa: E402 - the environment comes first
from absl import flags  # noqa: E402

# grain's worker processes refuse to start before absl has parsed the command line.
flags.FLAGS.mark_as_parsed()

# A runner that was started in the background ignores Ctrl-C, and the processes that tests interrupt
# would inherit that; a handler is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> Path:
    """A directory with a few packed samples of the embedded set and a tokenizer."""
    from embedded import make_embedded

    return make_embedded(
        tmp_path_factory.mktemp("small"), "--train_videos=8", "--train_images=8", "--suite_size=8",
        "--val_size=12", "--width=64", "--height=48", "--frames=8", "--processes=1",
    )  # fmt: skip
