"""What ends a verb early, and the exit codes."""

EXIT_USER_ERROR = 2
EXIT_STORAGE = 74  # EX_IOERR
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command, started again, goes on
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as of a program that SIGPIPE has ended


class UserError(Exception):
    """A fault of the input, not of the program: a wrong path, key, file or value.

    The console command prints its message as one line and exits with code 2. The message names
    what is wrong, where (file and line, or key), and what to do about it.
    """


class StorageError(UserError):
    """Storage failed one process of several. It may be gone with the next start: no final code."""


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
