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


_OF_THE_PATH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


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


def passes(error: BaseException) -> bool:
    """Whether it is of storage that may be well at the next start."""
    return isinstance(error, OSError) and error.errno in _PASSES


def cannot(what: str, error: OSError) -> UserError:
    """`what`, and why, as a `StorageError` where it may pass."""
    kind = StorageError if passes(error) else UserError
    return kind(f"{what}: {error.strerror}")


def is_of_the_path(error: BaseException) -> bool:
    """Whether the system says of a path that was named that it may not be used."""
    return (
        isinstance(error, OSError)
        and error.errno in _OF_THE_PATH
        and isinstance(error.filename, str)
    )


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
        BrokenPipeError: EXIT_BROKEN_PIPE,
    }
    if is_of_the_path(error):
        return EXIT_USER_ERROR
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
