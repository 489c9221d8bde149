"""Cases with pictures, beside a results file: `DIR/eval/TASK/cases.json` and its JPEG files.

A case is what one measured number looks like. Its texts stay text (the report page escapes and
wraps them); its pictures are strips of frames. The report page reads them back.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instap_jax.errors import UserError
from instap_jax.evaluation.results import DIRECTORY

CASES = "cases.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One example of a suite.

    Attributes:
      suite: name of the evaluation split.
      group: what it is an example of, as 'multi_instance'.
      key: the same for the same query in every run: the report page lines runs up by it.
      texts: label -> text, in the order to be shown.
      pictures: label -> JPEG bytes when written, file name when read back.
      numbers: label -> value, already in the unit that the label names.
    """

    suite: str
    group: str
    key: str
    texts: Mapping[str, str]
    pictures: Mapping[str, Any]
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


def write_cases(workdir: Path, task: str, cases: Sequence[Case]) -> Path:
    """Writes `workdir/eval/TASK/`, replacing what an earlier evaluation left there.

    Raises:
      UserError: the directory cannot be written.
    """
    target = Path(workdir) / DIRECTORY / task
    aside = target.with_name(f".{task}.{os.getpid()}.partial")
    old = target.with_name(f".{task}.{os.getpid()}.old")
    try:
        aside.mkdir(parents=True)
        plain = []
        for number, case in enumerate(cases):
            names = {}
            for place, (label, data) in enumerate(case.pictures.items()):
                names[label] = f"{case.suite}-{case.group}-{number:03d}-{place}.jpg"
                (aside / names[label]).write_bytes(data)
            plain.append(dataclasses.asdict(dataclasses.replace(case, pictures=names)))
        text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
        (aside / CASES).write_text(text + "\n", encoding="utf-8")
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def read_cases(workdir: Path, task: str) -> list[Case]:
    """What `write_cases` left; [] where there is nothing.

    Raises:
      UserError: the file is damaged, or names a picture that is not there.
    """
    path = Path(workdir) / DIRECTORY / task / CASES
    if not path.is_file():
        return []
    try:
        cases = [Case(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
        names = [name for case in cases for name in case.pictures.values()]
        lost = [name for name in names if Path(name).name != name]
        lost += [name for name in names if not (path.parent / name).is_file()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run `instap evaluate` again") from error
    if lost:
        raise UserError(f"{path}: picture {lost[0]!r} is missing; run `instap evaluate` again")
    return cases
