"""The tasks of `instap evaluate`, by name.

A task is a function `measure(context) -> list[Measurement]` in a module of its own; it goes over
`context.suites` itself. To add one: the function, a line in `TASKS`, and for each flag it needs a
field of `context.Options` and a definition in `commands/evaluate.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from instap_jax.errors import UserError
from instap_jax.evaluation import (
    attention_task,
    choice_task,
    classification,
    errors_task,
    grounding,
    probe_task,
    retrieval_task,
)
from instap_jax.evaluation.context import Context, Options, Suite
from instap_jax.evaluation.results import Measurement, format_table, write_result

TASKS: dict[str, Callable[[Context], list[Measurement]]] = {
    "retrieval": retrieval_task.measure,
    "probe": probe_task.measure,
    "choice": choice_task.measure,
    "grounding": grounding.measure,
    "classification": classification.measure,
    "errors": errors_task.measure,
    "attention": attention_task.measure,
}


def evaluate(
    workdir: Path, tasks: Sequence[str], suites: Sequence[Suite], options: Options
) -> None:
    """Runs the tasks in order, prints their tables, writes `workdir/eval/TASK.json` of each.

    Args:
      workdir: of a trained run.
      tasks: names in `TASKS`.

    Raises:
      UserError: unknown task, no suite, or a suite that cannot be measured whole.
    """
    unknown = sorted(set(tasks) - TASKS.keys())
    if unknown or not tasks:
        raise UserError(f"--task={','.join(tasks)}: tasks are {', '.join(TASKS)}")
    if not suites:
        raise UserError("no suite: give --videos=DIR:SPLIT or --images=DIR:SPLIT")
    context = Context(workdir, suites, options)
    for task in tasks:
        with jax.set_mesh(context.mesh):
            measurements = TASKS[task](context)
            checkpoint_hash = context.encoder.fingerprint
        if jax.process_index() == 0:
            print(format_table(task, measurements), end="\n\n")
            config = context.config.to_dict()
            write_result(
                workdir, task, measurements, config=config, checkpoint_hash=checkpoint_hash
            )
