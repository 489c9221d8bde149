"""Weights of other projects as a directory that training and evaluation take.

Everything is read and checked before anything is written: names both ways, shapes, dtypes, finite
values, tied tensors. The directory appears when it is complete.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import instap_jax
from instap_jax import config_check
from instap_jax.aside import written_aside
from instap_jax.config_check import LoadedConfig
from instap_jax.data.tokenizer import check_vocab_size, load_tokenizer
from instap_jax.errors import UserError
from instap_jax.interop import bert, clip, instap, reading, umt
from instap_jax.interop.keys import Row, Shape, leaves
from instap_jax.interop.plan import Plan
from instap_jax.interop.reading import Weights
from instap_jax.interop.report import Entry, Fate, Report
from instap_jax.progress import Progress
from instap_jax.train import checkpoint, inputs

KINDS: dict[str, Callable[[Weights, ConfigDict | None], Plan]] = {
    "clip": clip.plan,
    "bert": bert.plan,
    "umt": umt.plan,
    "torch": instap.plan,
}
REPORT = "convert_report.json"
NO_VOCABULARY = (
    "the vocabulary, without which no text can be read (evaluate, load, --to=torch): put that of "
    "the weights (BERT's vocab.txt) beside the file and convert again"
)


def convert(kind: str, source: Path, output: Path, loaded: LoadedConfig | None) -> Report:
    """Writes `output`: `config.json`, `checkpoints/0`, `convert_report.json`, and the vocabulary
    that lies beside the source.

    Args:
      kind: in `KINDS`.
      source: a weight file, an index of several, or a directory with one of these.
      output: to be made, or empty.
      loaded: the configuration that the file must fit; None: the default, with the file's sizes.

    Raises:
      UserError: the output holds something; the source is missing, damaged, of another kind, or
        does not fit, by the name of the tensor or field.
    """
    file = reading.locate(source)
    weights = reading.open_weights(file)
    plan = KINDS[kind](weights, loaded.config if loaded else None)
    ignored = _check_names(plan, weights)
    if plan.config.stage == "align":
        _name_vocabulary(plan.config, file)
    unknown = plan.config.stage == "align" and not plan.config.tokenizer.path
    with written_aside(output, "--output") as aside:
        state, entries = _fill(plan, weights)
        report = Report(
            source=str(file.absolute()),
            sha256=reading.digest(weights.files),
            kind=plan.kind,
            stage=plan.config.stage,
            sizes=dict(plan.sizes),
            assumed=plan.assumed,
            missing=(NO_VOCABULARY,) * unknown,
            beside=weights.beside,
            entries=(*entries, *ignored),
        )
        _write(plan, report, state, aside, output, loaded)
    return report


def _check_names(plan: Plan, weights: Weights) -> list[Entry]:
    """Every name known, none missing, every shape right; what is ignored.

    Raises:
      UserError: naming the first tensor that is unknown, missing or misshapen.
    """
    known = plan.table.shapes()
    known |= {name: resize.shape for name, resize in plan.resized.items()}
    entries, unknown = [], []
    for name, shape in weights.shapes.items():
        if name in known:
            continue
        reason = plan.table.reason_to_ignore(name)
        if reason is None:
            unknown.append(name)
        else:
            entries.append(Entry(Fate.IGNORED, name, shape, reason, weights.size(name)))
    if unknown:
        raise UserError(
            f"{weights.path}: {unknown[0]!r} has no place in the layout {plan.kind}{_more(unknown)}"
        )
    optional = plan.table.tied.keys() | plan.table.constants.keys()
    missing = [name for name in known if name not in weights.shapes and name not in optional]
    if missing:
        raise UserError(f"{weights.path}: {missing[0]!r} is missing{_more(missing)}")
    for name, shape in known.items():
        if weights.shapes.get(name, shape) != shape:
            raise UserError(
                f"{weights.path}: {name!r} has shape {weights.shapes[name]}, not {shape}"
            )
    return entries


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _fill(plan: Plan, weights: Weights) -> tuple[nnx.State, list[Entry]]:
    """The parameters, on the host, and what became of each."""
    _check_copies(plan, weights)
    rows: dict[str, list[Row]] = {}
    for row in plan.table.rows:
        rows.setdefault(row.ours, []).append(row)
    abstract = nnx.state(nnx.eval_shape(lambda: plan.create(nnx.Rngs(0))))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves(abstract).items()}
    values, entries = _draw(plan, shapes)
    with Progress("convert", len(rows), unit="arrays") as progress:
        for path, parts in rows.items():
            values[path] = _read(parts, shapes[path], plan, weights)
            entries.append(_entry(parts, values[path], plan))
            progress.update()
    kept = {
        place: variable.replace(values[name])
        for place, variable in nnx.to_flat_state(abstract)
        if (name := ".".join(map(str, place))) in values
    }
    return nnx.from_flat_state(kept), entries


def _read(rows: list[Row], shape: Shape, plan: Plan, weights: Weights) -> np.ndarray:
    """One of our parameters, float32, out of its foreign tensors."""
    array = np.empty(shape, np.float32)
    for row in rows:
        tensors = {name: _tensor(name, plan, weights) for name in row.theirs}
        array[() if row.layer is None else row.layer] = row.to_ours(tensors)
    return array


def _tensor(name: str, plan: Plan, weights: Weights) -> np.ndarray:
    """One foreign tensor, float32, of the table's shape.

    Raises:
      UserError: not floating point, or not finite.
    """
    tensor = _floats(name, weights)
    return plan.resized[name].apply(tensor) if name in plan.resized else tensor


def _floats(name: str, weights: Weights) -> np.ndarray:
    tensor = weights.read(name)
    if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16":
        raise UserError(f"{weights.path}: {name!r} is {tensor.dtype}, not floating point")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and reported so
        tensor = tensor.astype(np.float32, copy=False)
    if not np.isfinite(tensor).all():
        bad = int((~np.isfinite(tensor)).sum())
        raise UserError(f"{weights.path}: {name!r} has {bad} values that are NaN or infinite")
    return tensor


def _check_copies(plan: Plan, weights: Weights) -> None:
    """Tensors that are other names of others, and buffers, are what they must be."""
    for name, origin in plan.table.tied.items():
        if name in weights.shapes and not np.array_equal(
            _floats(name, weights), _floats(origin, weights)
        ):
            raise UserError(
                f"{weights.path}: {name!r} is not equal to {origin!r}, with which the model ties it"
            )
    for name, value in plan.table.constants.items():
        if name in weights.shapes and not np.array_equal(weights.read(name), value):
            raise UserError(f"{weights.path}: {name!r} does not count 0, 1, 2, ...")


def _draw(plan: Plan, shapes: Mapping[str, Shape]) -> tuple[dict[str, np.ndarray], list[Entry]]:
    """Parameters that the layout has no place for, as a run of this seed begins with them."""
    own, seed = plan.table.own, plan.config.seed
    values: dict[str, np.ndarray] = {}
    note = "not in the file; the run that takes this draws it"
    if own and plan.draw:

        def draw() -> dict[str, Any]:
            state = leaves(nnx.state(plan.create(nnx.Rngs(seed))))
            return {name: state[name] for name in own}

        values = jax.device_get(jax.jit(draw)())
        note = f"not in the file; drawn with seed {seed}"
    entries = [Entry(Fate.FRESH, n, shapes[n], note, 4 * int(np.prod(shapes[n]))) for n in own]
    return values, entries


def _entry(rows: list[Row], value: np.ndarray, plan: Plan) -> Entry:
    first, last = rows[0].theirs, rows[-1].theirs
    note = ", ".join(first) + (f" ... {last[-1]}" if len(rows) > 1 else "")
    resized = plan.resized.get(first[0])
    if resized:
        return Entry(
            Fate.INTERPOLATED, rows[0].ours, value.shape, f"{note}: {resized.note}", value.nbytes
        )
    same = rows[0].transform.name == "same"
    fate = Fate.LOADED if same else Fate.RESHAPED
    note = note if same else f"{note}: {rows[0].transform.name}"
    return Entry(fate, rows[0].ours, value.shape, note, value.nbytes)


def _write(
    plan: Plan,
    report: Report,
    state: nnx.State,
    aside: Path,
    output: Path,
    loaded: LoadedConfig | None,
) -> None:
    """Writes to `aside` what is to be found at `output`.

    Raises:
      UserError: when storage fails.
    """
    config = plan.config
    known, vocabulary = inputs.identify(config), config.tokenizer.path
    name = config_check.TOKENIZER_FILES[config.tokenizer.kind]
    if vocabulary:
        config.tokenizer.path = str(output.absolute() / name)
    meta = {
        "stage": config.stage,
        "config": config.to_dict(),
        "inputs": known,
        "version": instap_jax.__version__,
        "converted": {"kind": report.kind, "source": report.source, "sha256": report.sha256},
        # A run that takes this must draw exactly these itself.
        "fresh": [] if plan.draw else list(plan.table.own),
    }
    file, overrides = (loaded.file, loaded.overrides) if loaded else ("", {})
    config_check.record(LoadedConfig(config=config, file=file, overrides=overrides), aside)
    checkpoint.write_params(str(aside), state, meta=meta)
    if vocabulary:
        shutil.copyfile(vocabulary, aside / name)
    report.write(aside / REPORT)


def _name_vocabulary(config: ConfigDict, weights: Path) -> None:
    """Makes the configuration name the tokenizer's file beside the weights, where there is one.

    Raises:
      UserError: it is damaged, has more ids than the weights have embeddings, or is another than
        the one that the configuration names.
    """
    tokenizer = config.tokenizer
    given = load_tokenizer(tokenizer) if tokenizer.path else None
    words = given
    for kind, name in config_check.TOKENIZER_FILES.items():
        beside = weights.with_name(name)
        if not beside.is_file():
            continue
        named = tokenizer.path
        tokenizer.update(kind=kind, path=str(beside))
        words = load_tokenizer(tokenizer)
        if given and given.fingerprint() != words.fingerprint():
            raise UserError(
                f"{beside} is another vocabulary than tokenizer.path={named}; take away the one "
                "that does not belong to the weights"
            )
        break
    if words:
        check_vocab_size(words, config.text.vocab_size, weights=str(weights))
        tokenizer.update(cls_id=words.cls_id, mask_id=words.mask_id)
