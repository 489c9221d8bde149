"""The named tables of `instap ablate`: which configurations stand beside each other.

A row is one configuration: the user's, changed by an ablation of `instap_jax.ablations` and by
further overrides. Rows with the same name in different tables are the same runs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from instap_jax.ablations import ABLATIONS
from instap_jax.errors import UserError

REFERENCE = "instap"  # name of the row that changes nothing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
      label: as printed.
      ablation: name in `ABLATIONS`; '' changes nothing.
      overrides: further fields by dotted key, on top of the ablation.
      against: name of the row that this one is compared with; '' the table's reference.
    """

    label: str
    ablation: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    against: str = ""

    @property
    def name(self) -> str:
        """Directory of the row's runs: what it changes and nothing else."""
        parts = [self.ablation or REFERENCE] if self.ablation or not self.overrides else []
        return "+".join(parts + [f"{key}={value}" for key, value in self.overrides.items()])

    def changes(self) -> dict[str, Any]:
        """Dotted key -> value of every field that the row sets."""
        return dict(ABLATIONS[self.ablation] if self.ablation else {}) | dict(self.overrides)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows in the order they are printed, and the name of the one they are compared with."""

    title: str
    rows: tuple[Row, ...]
    reference: str = REFERENCE

    def rival(self, row: Row) -> str:
        """Name of the row that `row` is compared with; '' for the reference itself."""
        name = row.against or self.reference
        return "" if name == row.name else name


_INSTAP = Row(label="InstAP")


def _single_changes(*rows: Row) -> tuple[Row, ...]:
    return (_INSTAP, *rows)


TABLES: dict[str, Table] = {
    "table1": Table(
        title="Table 1: one objective or another on the same data",
        rows=(
            Row(label="UMT (g)", ablation="umt_g"),
            Row(label="UMT (g+i)", ablation="umt_gi"),
            _INSTAP,
        ),
    ),
    "table4": Table(
        title="Table 4: without and with L_inst",
        rows=(Row(label="without L_inst", ablation="umt_g"), Row(label="with L_inst")),
        reference="umt_g",
    ),
    "table5": Table(
        title="Table 5: every row on top of the one above, and compared with it",
        rows=(
            Row(label="baseline with L_inst", ablation="table5_instances"),
            Row(
                label="+ own temperature",
                ablation="table5_temperature",
                against="table5_instances",
            ),
            Row(label="+ lambda_inst 0.1", ablation="table5_lambda", against="table5_temperature"),
            Row(
                label="+ caption sub-sampling", ablation="table5_sampling", against="table5_lambda"
            ),
            Row(label="+ trajectories", ablation="table5_trajectories", against="table5_sampling"),
        ),
        reference="table5_instances",
    ),
    "choices": Table(
        title="The paper's choices, one at a time",
        rows=_single_changes(
            Row(label="no cross-attention", ablation="no_cross_attention"),
            Row(label="still boxes", ablation="still_boxes"),
            Row(label="shared temperature", ablation="shared_temperature"),
            Row(label="caption sub-sampling", ablation="sentences"),
            Row(label="lambda_inst 0.1", overrides={"align.instance": 0.1}),
        ),
    ),
    "ours": Table(
        title="Further single changes to InstAP",
        rows=_single_changes(
            Row(label="instance sentences of the scene too", ablation="scene_sentences"),
            Row(label="siblings as negatives", ablation="siblings"),
            Row(label="half of the crop masked", ablation="crops_masked"),
            Row(label="captions from their start", ablation="whole_captions"),
            Row(label="scene unmasked", ablation="unmasked"),
            Row(label="sigmoid loss", ablation="sigmoid"),
        ),
    ),
    "context": Table(
        title="What instances see of their scene",
        rows=_single_changes(
            Row(label="no cross-attention", ablation="no_cross_attention"),
            Row(label="scene-anchored crops", ablation="scene_anchor"),
            Row(label="box size code", ablation="size_code"),
            Row(label="motion code", ablation="motion_code"),
            Row(label="anchor, size and motion", ablation="box_codes"),
            Row(label="looser crops", ablation="loose_crops"),
            Row(label="small start of XAttn", ablation="small_start"),
        ),
    ),
    "frames": Table(
        title="Frames of a clip",
        rows=_single_changes(
            Row(label="1 frame", overrides={"data.frames": 1}),
            Row(label="2 frames", overrides={"data.frames": 2}),
            Row(label="8 frames", overrides={"data.frames": 8}),
        ),
    ),
}


def find_table(name: str) -> Table:
    """The named table.

    Raises:
      UserError: no such table.
    """
    if name not in TABLES:
        raise UserError(f"--table={name}: tables are {', '.join(TABLES)}")
    return TABLES[name]
