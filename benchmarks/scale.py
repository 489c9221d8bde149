"""The table of docs/scale.md: the L/16 stages compiled for TPU slices of 16 to 256 chips.

    python benchmarks/scale.py [--rows=REGEX] [--list] [--table]

Every row is one `instap compile` in a process of its own, so that its memory is its own; rows are
done one after another. Figures are kept by compiled program (`--cache`): stopped, the same command
goes on, and after a change of the model it compiles what changed. `--table` prints the Markdown
table of the rows in `--results` and compiles nothing; the others say 'not yet run'.
"""

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_GIB = 1 << 30


# (a slice, how many of them), from 16 to 256 chips.
_SLICES = (
    ("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 1), ("v5e:8x16", 2),
    ("v5p:2x2x4", 1), ("v5p:4x4x4", 1), ("v5p:4x8x8", 1), ("v5p:4x4x8", 2),
    ("v6e:4x4", 1), ("v6e:8x8", 1), ("v6e:16x16", 1), ("v6e:8x16", 2),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a stage, per-chip batch and mesh on a topology."""

    stage: str
    topology: str
    chips: int
    per_chip: int
    slices: int = 1
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        slices = f"x{self.slices}" if self.slices > 1 else ""
        return f"{self.stage}-{self.topology.replace(':', '-')}{slices}-b{self.per_chip}"

    def command(self, out: Path, cache: str) -> list[str]:
        """Arguments of the console command."""
        return [
            "compile",
            f"--config={_ROOT}/configs/{self.stage}_l16.py",
            f"--topology={self.topology}",
            f"--slices={self.slices}",
            f"--json={out}",
            f"--cache={cache}",
            f"--config.data.batch_size={self.per_chip * self.chips}",
            *self.options,
        ]


def rows() -> list[Row]:
    """The whole table. Parameters are split over 16 chips and repeated over the rest."""
    found = []
    for topology, slices in _SLICES:
        generation, shape = topology.split(":")
        chips = slices * math.prod(map(int, shape.split("x")))
        mesh = (f"--config.mesh.replica={chips // 16}", "--config.mesh.fsdp=16")
        # 4,096 samples of stage 2 on v5e-256 and on v5p-128, which is 64 chips.
        samples = 64 if generation == "v5p" else 16
        group = f"--config.data.group_size={min(samples, 32)}"
        common = {"topology": topology, "chips": chips, "slices": slices}
        found.append(Row(stage="stage1", per_chip=64, options=mesh, **common))
        found.append(Row(stage="stage2", per_chip=samples, options=(*mesh, group), **common))
    return found


def run(row: Row, results: Path, cache: str) -> None:
    """Compiles a row, or finds its program compiled; keeps what the command said too."""
    out = results / f"{row.name}.json"
    command = [sys.executable, "-m", "instap_jax", *row.command(out, cache)]
    print(f"{row.name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    (results / f"{row.name}.log").write_text(done.stdout + done.stderr)
    print("\n".join((done.stdout + done.stderr).splitlines()[-3:]), file=sys.stderr, flush=True)


_HEAD = (
    "stage, batch of", "topology", "chips", "samples a chip", "HBM GiB, peak of", "spare",
    "TFLOPs a chip", "ICI GB", "DCN GB", "host GB/s", "estimate ms (kernels)",
    "utilisation, ICI hidden / not", "compile s", "RSS GB",
)  # fmt: skip


def table(results: Path) -> str:
    lines = [_line(_HEAD), _line("---" for _ in _HEAD)]
    for row in rows():
        path = results / f"{row.name}.json"
        report = json.loads(path.read_text()) if path.exists() else None
        where = f"{row.topology}" + (f" x {row.slices}" if row.slices > 1 else "")
        start = (where, str(row.chips), str(row.per_chip))
        if report is None:
            lines.append(_line((f"{row.stage}", *start, "not yet run", *[""] * 9)))
            continue
        for step in report["steps"]:
            lines.append(_line((f"{row.stage}, {step['kind']}", *start, *_cells(step))))
    return "\n".join(lines)


def _cells(step: dict) -> tuple[str, ...]:
    hbm, limit = step["hbm"]["peak"] / _GIB, step["limit"] / _GIB
    memory = (
        f"{hbm:.1f} of {limit:.1f}",
        f"{step['spare']:.0%}",
        f"{step['model_flops'] / 1e12:.1f}",
    )
    built = (f"{step['lower_seconds'] + step['seconds']:.0f}", f"{step['rss'] / 1e9:.1f}")
    if not step["fits"]:
        return (*memory, "", "", "", "out of memory", "", *built)
    estimate = f"{1e3 * step['compute_seconds']:,.0f} ({1e3 * step['kernel_seconds']:,.0f})"
    shares = f"{step['utilisation_hidden']:.0%} / {step['utilisation_exposed']:.0%}"
    traffic = (f"{step['ici_bytes'] / 1e9:.2f}", f"{step['dcn_bytes'] / 1e9:.2f}")
    traffic += (f"{step['host_bytes_per_second'] / 1e9:.1f}",)
    return (*memory, *traffic, estimate, shares, *built)


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="regular expression of the names of rows")
    parser.add_argument("--list", action="store_true", help="names and commands of the rows")
    parser.add_argument("--table", action="store_true", help="print the table; compile nothing")
    parser.add_argument("--results", type=Path, default=Path("runs/scale"))
    parser.add_argument("--cache", default="~/.cache/instap_jax/compile")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in rows() if re.search(args.rows, row.name)]
    if args.list:
        for row in chosen:
            words = row.command(args.results / f"{row.name}.json", args.cache)
            print(f"{row.name}: instap {' '.join(words)}")
        return
    if not args.table:
        for row in chosen:
            run(row, args.results.absolute(), args.cache)
    print(table(args.results))


if __name__ == "__main__":
    main()
