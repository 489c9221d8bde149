"""Traces of chosen steps, and a compile cache that a second process finds."""

import multiprocessing
import os
import subprocess
import sys
from concurrent import futures

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from tiny import tiny_config

from instap_jax import config_check
from instap_jax.errors import UserError
from instap_jax.train.profiling import Tracer, use_compile_cache


def traced_steps(tmp_path, steps, numbers):
    """Which of the steps `numbers` a trace of `steps` shows.

    In a process of its own: one that has loaded the TPU compiler, as other tests do, would crash.
    """
    with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(trace, tmp_path, steps, numbers).result()


def trace(tmp_path, steps, numbers):
    double = jax.jit(lambda x: 2 * x)
    with Tracer(steps, tmp_path) as tracer:
        for number in numbers:
            assert tracer.step(number, double, jnp.float32(number)) == 2 * number
    spaces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(spaces) <= 1
    return bool(spaces), sorted({number for path in spaces for number in step_numbers(path)})


def step_numbers(path):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            if event.name == "train":
                yield dict(event.stats)["step_num"]


def test_the_steps_asked_for_are_traced_and_no_others(tmp_path):
    assert traced_steps(tmp_path, "12:13", range(10, 16)) == (True, [12, 13])


def test_a_run_that_ends_or_begins_within_the_steps_has_a_trace(tmp_path):
    assert traced_steps(tmp_path / "ends", "12:100", range(10, 14)) == (True, [12, 13])
    assert traced_steps(tmp_path / "resumed", "2:11", range(10, 14)) == (True, [10, 11])


@pytest.mark.parametrize("steps", [None, "2:3"])
def test_no_trace_where_none_is_asked_for(steps, tmp_path):
    assert traced_steps(tmp_path, steps, range(10, 12)) == (False, [])


@pytest.mark.parametrize("steps", ["5", "5:4", "0:3", "a:b"])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(UserError, match=r"log\.profile"):
        config_check.check(tiny_config("stage1", **{"log.profile": steps}))


PROGRAM = """
import pathlib, sys
import jax, numpy as np
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
from tiny import tiny_config
from instap_jax.train.profiling import use_compile_cache
jax.jit(lambda x: x + 1)(1)  # compiled into another cache before
config = tiny_config("stage1", **{"compute.cache_dir": sys.argv[1]})
mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
assert use_compile_cache(config, pathlib.Path("/none"), mesh) == sys.argv[1]
hits.clear()
jax.jit(lambda x: x @ x.T + 3)(np.ones((4, 4), np.float32))
print(sum(name.endswith("cache_hits") for name in hits))
"""


def hits(directory) -> int:
    environment = os.environ | {
        "PYTHONPATH": os.path.dirname(__file__),
        # What the configuration says goes before it, even when it has been used.
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent.with_name("other")),
    }
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_second_start_finds_what_the_first_compiled(tmp_path):
    cache = tmp_path / "shared" / "cache"
    assert hits(cache) == 0
    entries = [path for path in cache.iterdir() if path.name.endswith("-cache")]
    assert entries
    assert hits(cache) > 0
    for path in entries:  # a process was killed while it wrote
        path.write_bytes(path.read_bytes()[:100])
    assert hits(cache) == 0


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *args: pytest.fail("not to be changed"))
    mesh = Mesh(jax.devices()[:1], ("x",))
    before = jax.config.jax_compilation_cache_dir  # of the tests
    assert use_compile_cache(tiny_config("stage1"), tmp_path, mesh) == before
    with monkeypatch.context() as several:  # a rehearsed pod goes without
        updates = []
        several.setattr(jax, "process_count", lambda: 2)
        several.setattr(jax.config, "update", lambda *args: updates.append(args))
        config = tiny_config("stage1", **{"compute.cache_dir": str(tmp_path / "cache")})
        assert use_compile_cache(config, tmp_path, mesh) is None
        assert updates == [("jax_enable_compilation_cache", False)]
    with pytest.raises(UserError, match=r"cache_dir=.*cannot be made"):
        (tmp_path / "file").touch()
        config = tiny_config("stage1", **{"compute.cache_dir": str(tmp_path / "file" / "x")})
        use_compile_cache(config, tmp_path, mesh)
