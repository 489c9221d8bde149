"""What ends a verb early, and the exit codes."""

import errno

EXIT_USER_ERROR = 2
EXIT_STORAGE = 74  # EX_IOERR
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command, started again, goes on
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as of a program that SIGPIPE has ended


# What the system says of storage that does not answer, and may at another time.
_PASSES = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ECONNRESET, errno.EAGAIN,
)  # fmt: skip


class UserError(Exception):
    """A fault of the input, not of the program: a wrong path, key, file or value.

    The console command prints its message as one line and exits with code 2 (`exit_code` has the
    others). The message names what is wrong, where (file and line, or key), and what to do about
    it.
    """


class StorageError(UserError):
    """Storage failed, and the next start may find it well: its code (74) is not a final one."""


class AgreedFault(UserError):
    """A fault that every process of a run meets at the same step, so that none is waited for in
    vain."""


def cannot(what: str, error: OSError) -> UserError:
    """`what`, and why, as a `StorageError` where it may pass."""
    kind = StorageError if error.errno in _PASSES else UserError
    return kind(f"{what}: {error.strerror}")


class UnreadableSample(UserError):
    """A sample of a suite cannot be read, so the suite is not measured."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the run between two steps, in all its processes, and it is saved."""


class Preempted(Stopped):
    """Likewise, by SIGTERM: the machine is about to be taken away."""


def exit_code(error: BaseException) -> int:
    """The exit code of a verb that `error` ended."""
    codes = {
        StorageError: EXIT_STORAGE,
        UserError: EXIT_USER_ERROR,
        Preempted: EXIT_PREEMPTED,
        KeyboardInterrupt: EXIT_INTERRUPTED,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
