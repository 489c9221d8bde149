"""The one exception type that stands for a fault the user can mend, and the exit codes."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A fault of the input, not of the program: a wrong path, key, file or value.

    The console command prints its message as one line and exits with code 2. The message names
    what is wrong, where (file and line, or key), and what to do about it.
    """
