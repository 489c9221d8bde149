"""The processes of the input pipeline: without JAX, and none left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from pipeline_data import config, corpus  # noqa: F401 - fixtures


def test_nothing_of_ours_needs_jax(config):
    code = f"""
import sys
sys.modules["jax"] = None  # importing it fails
from ml_collections import ConfigDict
from absl import flags
flags.FLAGS.mark_as_parsed()
from instap_jax.data import pipeline
from instap_jax.types import Kind
config = ConfigDict({config.to_dict()!r})
loader = pipeline.make_loader(config, kind=Kind.VIDEO, groups=1, group_size=2, rows=[0])
print(next(loader)["frames"].shape)
loader.close()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "(1, 2, 4, 40, 48, 3)", run.stderr


SCRIPT = """
import sys, time
from absl import flags
from ml_collections import ConfigDict
from instap_jax.data import pipeline
from instap_jax.train.stop import StopRequest
from instap_jax.types import Kind

def main(config):
    flags.FLAGS.mark_as_parsed()
    loader = pipeline.make_loader(config, kind=Kind.VIDEO, groups=1, group_size=2, rows=[0])
    print("starting", flush=True)
    with StopRequest() as stop:  # as training does: a bare KeyboardInterrupt may be lost
        while not stop:
            next(loader)
            print("batch", flush=True)
            time.sleep(0.05)
    loader.close()
    sys.exit(130)

if __name__ == "__main__":
    main(ConfigDict({config}))
"""


@pytest.mark.parametrize(
    ("moment", "how", "code"),
    [
        ("batch", signal.SIGINT, 130),
        ("starting", signal.SIGINT, 130),
        ("batch", signal.SIGKILL, -9),
    ],
)
def test_no_process_is_left_behind(config, tmp_path, moment, how, code):
    config.data.workers = 1
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.replace("{config}", repr(config.to_dict())))
    run = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while run.stdout.readline().strip() != moment:
        assert run.poll() is None, run.stderr.read()
    if moment == "starting":
        time.sleep(0.6)  # while the workers import
    children = psutil.Process(run.pid).children(recursive=True)
    if how == signal.SIGINT:
        os.killpg(run.pid, how)  # as a terminal does
    else:
        run.kill()
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code
    assert "Traceback" not in errors and "KeyboardInterrupt" not in errors, errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
