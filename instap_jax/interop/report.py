"""What a conversion did with every tensor, as a table and as JSON."""

import dataclasses
import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Fate(enum.Enum):
    """What became of a tensor."""

    LOADED = "loaded"  # the numbers as they lie there
    RESHAPED = "reshaped"  # the same numbers: transposed, split or joined
    INTERPOLATED = "interpolated"  # other numbers: a table for another size
    FRESH = "fresh"  # not in the source
    IGNORED = "ignored"  # in the source, of no use here


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters, or an ignored foreign tensor.

    Attributes:
      name: our dotted path; for an ignored tensor its foreign key.
      shape: as it is in the checkpoint written; for an ignored tensor as in the source.
      note: how it was made, or why it was ignored.
      size: bytes, in the checkpoint (float32) or in the source.
    """

    fate: Fate
    name: str
    shape: tuple[int, ...]
    note: str
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Attributes:
    source: path of the file; sha256: of its bytes.
    kind: 'clip', 'bert' or 'umt', and which of its layouts.
    stage: of the directory written.
    sizes: configuration fields that the file determined, with their values.
    assumed: what the file does not say, and was taken for granted.
    missing: what the directory lacks, and how to mend that.
    beside: what else the file held, that is not weights.
    """

    source: str
    sha256: str
    kind: str
    stage: str
    sizes: dict[str, Any]
    assumed: tuple[str, ...]
    missing: tuple[str, ...]
    beside: tuple[str, ...]
    entries: tuple[Entry, ...]

    def totals(self) -> dict[str, dict[str, int]]:
        """Fate -> {'arrays', 'bytes'}."""
        return totals(self.entries)

    def text(self) -> str:
        """The table, and every tensor that is not simply there; kinds of tensors in one line."""
        lines = [f"{self.kind} -> stage {self.stage!r}", *table(self.entries)]
        lines += [f"from the file: {', '.join(f'{k}={v}' for k, v in self.sizes.items())}"]
        lines += [f"assumed: {what}" for what in self.assumed]
        lines += [f"missing: {what}" for what in self.missing]
        if self.beside:
            lines.append(f"not weights: {', '.join(self.beside)}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Everything, as JSON."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["totals"] = self.totals()
        content["entries"] = as_json(self.entries)
        path.write_text(json.dumps(content, indent=1) + "\n")


def totals(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """Fate -> {'arrays', 'bytes'}."""
    return {
        fate.value: {
            "arrays": sum(entry.fate is fate for entry in entries),
            "bytes": sum(entry.size for entry in entries if entry.fate is fate),
        }
        for fate in Fate
    }


def table(entries: Sequence[Entry]) -> list[str]:
    """Lines of the totals, and of every tensor that is not simply there."""
    lines = [f"{'':<14}{'arrays':>8}{'bytes':>16}"]
    lines += [
        f"{fate:<14}{total['arrays']:>8}{total['bytes']:>16,}"
        for fate, total in totals(entries).items()
    ]
    for fate in (Fate.INTERPOLATED, Fate.FRESH, Fate.IGNORED):
        notes: dict[str, list[str]] = {}
        for entry in entries:
            if entry.fate is fate:
                notes.setdefault(entry.note, []).append(entry.name)
        for note, names in notes.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{fate.value}: {names[0]}{more}: {note}")
    return lines


def as_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Everything of the entries."""
    return [dataclasses.asdict(entry) | {"fate": entry.fate.value} for entry in entries]
