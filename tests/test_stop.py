"""Signals while Python does not run, a step that hangs, and the words that start a pod."""

import signal
import subprocess
import sys
import time

import jax
import pytest

from instap_jax import distributed
from instap_jax.config import default
from instap_jax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError
from instap_jax.train.peers import Agreement
from instap_jax.train.stop import Ask, StopRequest

# Like a compilation: minutes in which no handler of Python's runs, and no signal ends it.
BUSY = """
import hashlib
from instap_jax.train.stop import StopRequest
with StopRequest(hold={hold}) as stop:
    {before}
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def busy(*, hold: bool, before: str = "") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(hold=hold, before=before)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "busy\n"
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_a_signal_ends_at_once_what_has_nothing_to_save(number, code):
    process = busy(hold=False)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors == f"\n{number.name}: nothing to save yet\n"


def test_the_first_signal_waits_and_the_second_does_not():
    process = busy(hold=True)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert "SIGTERM: stopping at the end of the step" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)  # to its group as well, say
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == EXIT_PREEMPTED
    process.stdout.close()
    process.stderr.close()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.asked is Ask.PREEMPTED
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


def test_a_single_process_agrees_with_itself_at_once():
    agreement = Agreement(jax.make_mesh((8,), ("fsdp",)))
    assert [agreement.exchange(ask, [ask, 7]) for ask in Ask] == [(ask, [ask, 7]) for ask in Ask]


HANG = """
import time
from instap_jax.train.peers import Watchdog
with Watchdog(0.5) as watchdog:
    for _ in range(8):
        time.sleep(0.1)
        watchdog.step()
    print("steps done", flush=True)
    time.sleep(60)
"""


def test_a_step_that_hangs_ends_and_says_where():
    run = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (1, "steps done\n")
    assert "Timeout" in run.stderr and 'File "<string>", line 9' in run.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", "2", ""), "JAX_PROCESS_ID: set all three or none"),
        (("host", "2", "0"), "HOST:PORT and two whole numbers"),
        (("host:1", "two", "0"), "HOST:PORT and two whole numbers"),
        (("host:1", "2", "2"), "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"),
    ],
)
def test_wrong_variables_are_one_line(monkeypatch, values, message):
    for name, value in zip(distributed.VARIABLES, values):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.initialize(default().distributed)


def test_what_process_0_meets_is_raised():
    def fail():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        distributed.first(fail)
    done = []
    distributed.first(lambda: done.append(1))
    assert done == [1]


def test_what_must_end_first_is_ended_first():
    process = busy(hold=False, before="stop.at_once = lambda: print('ended', flush=True)")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert printed == "ended\n" and process.returncode == EXIT_INTERRUPTED
