"""A profile of some steps, for XProf, and the compile cache that a restart finds again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax.errors import cannot

PROFILE_DIRECTORY = "profile"
CACHE_DIRECTORY = "xla_cache"


class Tracer:
    """Context that traces the steps named by `config.log.profile` into `WORKDIR/profile`.

    Process 0 alone writes: the hosts of a pod do the same, and one trace has all its devices.

    Args:
      steps: 'A:B', first and last step; None: no trace.
    """

    def __init__(self, steps: str | None, workdir: Path):
        self._first, self._last = map(int, steps.split(":")) if steps else (0, -1)
        self._directory = workdir / PROFILE_DIRECTORY
        self._tracing = False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *exc) -> None:
        self._stop()  # a run may end before the last of the steps

    def step(self, number: int, call: Callable[..., Any], *args) -> Any:
        """Returns `call(*args)`, which is step `number`; traced if it is one of those asked for."""
        if not self._first <= number <= self._last or jax.process_index():
            return call(*args)
        if not self._tracing:
            options = jax.profiler.ProfileOptions()
            # Python's own calls would fill the trace; what the devices do is asked for.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = call(*args)
        if number == self._last:
            jax.block_until_ready(result)  # the device works behind: else its part is cut off
            self._stop()
        return result

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            print(f"profile: {self._directory}; look at it with `xprof --logdir`, or TensorBoard")


def use_compile_cache(config: ConfigDict, workdir: Path, mesh: Mesh) -> str | None:
    """Sets where JAX keeps compiled programs; must come before the first one. Returns the place.

    In order: `config.compute.cache_dir`, what JAX was told before (JAX_COMPILATION_CACHE_DIR), and
    on accelerators `WORKDIR/xla_cache`. On CPUs there is no default: their programs may not run on
    a host with another processor. Safe with several processes: JAX lets process 0 alone write, and
    an entry that cannot be read is compiled again.

    Several CPU processes, the rehearsal of a pod, go without: the entries of process 0 are found by
    no other, which are then so far behind that process 0 gives up its first collective (30 s).

    Raises:
      UserError: the directory cannot be made.
    """
    before = jax.config.jax_compilation_cache_dir
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if on_cpu and jax.process_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    directory = config.compute.cache_dir or before
    if not directory and not on_cpu:
        directory = str(workdir / CACHE_DIRECTORY)
    if not directory or directory == before:
        return directory
    try:
        if "://" not in directory:
            os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise cannot(f"config.compute.cache_dir={directory}: cannot be made", error) from error
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()  # goes on with the one before else, if that was in use
    return directory
