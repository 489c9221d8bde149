"""Runs the commands of a launcher, or, for --dry-run, prints exactly what it would run."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

ABSENT = "absent"  # what `look` says of a thing that is not there


def _print(line: str) -> None:
    print(line, flush=True)


@dataclasses.dataclass(frozen=True)
class Shell:
    """`dry_run`: every command is printed, as it can be pasted, and none is run."""

    dry_run: bool
    _streams: list[subprocess.Popen] = dataclasses.field(default_factory=list, init=False)

    def run(self, words: Sequence[str], *, stdin: str | None = None) -> int:
        """Runs a command with our terminal; its exit code (0 in a dry run)."""
        self._show(words, stdin)
        if self.dry_run:
            return 0
        return subprocess.run(_found(words), input=stdin, text=True).returncode

    def check(self, words: Sequence[str], *, stdin: str | None = None) -> None:
        """Runs a command that must succeed.

        Raises:
          SystemExit: with one line and the command's exit code.
        """
        code = self.run(words, stdin=stdin)
        if code:
            print(f"launch: {words[0]} failed with exit code {code}", file=sys.stderr)
            raise SystemExit(code)

    def output(self, words: Sequence[str]) -> str:
        """The standard output of a command, '' where it fails (and in a dry run)."""
        if self.dry_run:
            self._show(words, None)
            return ""
        done = subprocess.run(_found(words), stdout=subprocess.PIPE, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    def look(self, words: Sequence[str], *, absent: str) -> str | None:
        """What a query about one thing prints.

        ABSENT where it fails with `absent` among its words: there is no such thing. None where it
        fails otherwise, which says nothing about the thing; the reason has then been shown.
        """
        if self.dry_run:
            self._show(words, None)
            return ""
        done = subprocess.run(_found(words), capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
        if absent in done.stderr:
            return ABSENT
        print(done.stderr, end="", file=sys.stderr, flush=True)
        return None

    def stream(
        self, commands: Sequence[Sequence[str]], line: Callable[[str], None] = _print
    ) -> int:
        """Runs commands at once, hands every line of their output on, and returns the exit code of
        the first, in order, that failed; 0 where none did.

        The terminal's Ctrl-C does not reach them: it is the launcher's to end them in order.
        """
        for words in commands:
            self._show(words, None)
        if self.dry_run:
            return 0
        ours, theirs = os.pipe()
        options = {"stdout": theirs, "stderr": subprocess.STDOUT, "start_new_session": True}
        processes = [subprocess.Popen(_found(words), **options) for words in commands]
        self._streams[:] = processes
        os.close(theirs)
        try:
            with open(ours, encoding="utf-8", errors="replace") as output:
                for text in output:
                    line(text.rstrip("\n"))
        except KeyboardInterrupt:  # of a launcher without Signals
            self.end()
            raise
        return next((code for code in [one.wait() for one in processes] if code), 0)

    def end(self) -> None:
        """Ends what `stream` runs, and what that has started, which holds its output."""
        for process in self._streams:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)

    def start(self, commands: Sequence[Sequence[str]]) -> None:
        """Starts commands and does not wait for them."""
        for words in commands:
            self._show(words, None)
            subprocess.Popen(_found(words), stdin=subprocess.DEVNULL, start_new_session=True)

    def _show(self, words: Sequence[str], stdin: str | None) -> None:
        print(("" if self.dry_run else "+ ") + shlex.join(words) + _here(stdin), flush=True)


def _found(words: Sequence[str]) -> Sequence[str]:
    if shutil.which(words[0]) is None:
        print(f"launch: {words[0]}: no such command; install it first", file=sys.stderr)
        raise SystemExit(2)  # another start would not find it either
    return words


def _here(stdin: str | None) -> str:
    return "" if stdin is None else f" <<'END'\n{stdin.rstrip()}\nEND"
