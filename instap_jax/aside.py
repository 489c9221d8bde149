"""Output directories that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from instap_jax.errors import UserError


@contextlib.contextmanager
def written_aside(out: Path, flag: str) -> Iterator[Path]:
    """A sibling of `out` to write to, which becomes `out` at the end, or vanishes on any failure.

    Args:
      flag: that names `out`, for messages.

    Raises:
      UserError: `out` exists and is not an empty directory, cannot be replaced, or storage fails.
    """
    target = Path(os.path.realpath(out))  # a link stays one
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{flag}={out}: exists and is not an empty directory; name another")
    if target == Path.cwd() or os.path.ismount(target):  # found now, not when all is done
        raise UserError(f"{flag}={out}: cannot be replaced; name a directory in it")
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, target)
    except OSError as error:
        raise UserError(f"{flag}={out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
