"""A run of stage 'align' for PyTorch: our own module's layout, or UMT's.

Parameters are read from the checkpoint leaf by leaf and written tensor by tensor. Whatever fails,
nothing appears under the output's name: a directory beside it is renamed when all is there.
"""

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import config_check
from instap_jax.aside import written_aside
from instap_jax.errors import UserError
from instap_jax.interop import instap, keys, umt
from instap_jax.interop.report import Entry, Fate, as_json, totals
from instap_jax.interop.safetensors_file import SafetensorsWriter
from instap_jax.models import preprocess
from instap_jax.progress import Progress
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import OBJECTIVES, term_weights

MODULE = "torch_model.py"
REPORT = "convert_report.json"


def export(workdir: Path, out: Path, *, layout: str) -> list[Entry]:
    """Writes the newest checkpoint of a run for PyTorch.

    Args:
      workdir: of a run of stage 'align'.
      out: directory to be made.
      layout: 'torch': `model.safetensors`, `config.json`, the tokenizer's file and
        `torch_model.py`, whose `InstAP.from_pretrained` opens the directory. 'umt': `umt.pth`,
        which loads strictly into UMT's `UMT` module (without its `clip_teacher`),
        `instap_extra.pth`, what UMT has no place for, and `instap_config.json`, by what it was
        trained; needs torch.

    Returns:
      Every tensor written, by its name in the file.

    Raises:
      UserError: no such run, one of another stage, an option of it that PyTorch's side does not
        know, a damaged checkpoint, a parameter that is not finite, an output that exists.
    """
    config = config_check.read(workdir)
    if config.stage != "align":
        raise UserError(
            f"{workdir} is a run of stage {config.stage!r}; exported are those of stage 'align'"
        )
    _refuse_unknown_options(config, workdir)
    step, meta = checkpoint.read_meta(str(workdir))
    inputs.check_tokenizer(config, meta, str(workdir))
    if layout == "torch":
        inputs.run_tokenizer(config, meta, str(workdir))  # a converted run may have none
    stored = checkpoint.StoredParams(str(workdir), step=step)  # training may write a newer one
    create = functools.partial(OBJECTIVES["align"].create, config)
    stored.check(nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))[1])
    with written_aside(out, "--output") as aside:
        written = {"torch": _write_ours, "umt": _write_umt}[layout](stored, aside)
        if layout == "torch":
            _write_json(aside / "config.json", describe(config, step))
            shutil.copyfile(Path(__file__).with_name(MODULE), aside / MODULE)
            name = config_check.TOKENIZER_FILES[config.tokenizer.kind]
            shutil.copyfile(config.tokenizer.path, aside / name)
        else:
            trained = _trained(config, step) | {"text": config.tokenizer.text}
            _write_json(aside / umt.DESCRIPTION, {"trained": trained})
        content = {"source": str(workdir), "step": step, "totals": totals(written)}
        _write_json(aside / REPORT, content | {"entries": as_json(written)})
    return written


def describe(config: ConfigDict, step: int) -> dict:
    """The `config.json` of an export: everything that `torch_model.InstAP` is built from."""
    sections = {
        name: {key: config[name][key] for key in fields} for name, fields in instap.FORWARD.items()
    }
    align = sections["align"]
    align["crop_size"] = align["crop_size"] or config.vision.image_size
    # Where training had no equation (8), an instance's embedding is its crop's (evaluation).
    trained = "inst_vtc" in term_weights(config)
    align["instance_embedding"] = "contextual" if trained else "crop"
    mean, deviation = preprocess.IMAGENET
    tokenizer = {
        "kind": config.tokenizer.kind,
        "file": config_check.TOKENIZER_FILES[config.tokenizer.kind],
        "length": config.tokenizer.length,
        "text": config.tokenizer.text,
    }
    return {
        "format": instap.FORMAT,
        **sections,
        "distill": {"layers": config.distill.layers},
        "teacher": {"projection": config.teacher.projection},
        "tokenizer": tokenizer,
        "preprocessing": {
            "mean": list(mean),
            "std": list(deviation),
            "scale": "pixels / 255",
            "scene": "whole picture to image_size x image_size",
            "instance": "box to crop_size x crop_size",
            "filter": "antialiased bilinear",
        },
        "trained": _trained(config, step),
    }


def _trained(config: ConfigDict, step: int) -> dict:
    """How the parameters came about. `terms`: an import uses no head that none of them trained."""
    return {
        "step": step,
        "frames": config.data.frames,
        "dtype": config.compute.dtype,
        "terms": list(term_weights(config)),
    }


def _refuse_unknown_options(config: ConfigDict, workdir: Path) -> None:
    for section in instap.FORWARD:
        unknown = set(config[section]) - {*instap.FORWARD[section], *instap.TRAINING[section]}
        if unknown:
            raise UserError(
                f"{workdir}: the export does not know what config.{section}.{min(unknown)} does to "
                "the model; teach it to instap_jax/interop/export.py and torch_model.py"
            )


def _write_ours(stored: checkpoint.StoredParams, out: Path) -> list[Entry]:
    table, file = instap.table(stored.shapes), "model.safetensors"
    with SafetensorsWriter(out / file, table.shapes()) as writer:
        return _convert(stored, table.rows, file, writer.write)


def _write_umt(stored: checkpoint.StoredParams, out: Path) -> list[Entry]:
    torch = _torch()
    table = umt.table("align", stored.shapes)
    extra = [row for row in instap.table(stored.shapes).rows if row.ours in table.own]
    written = []
    for file, rows in (("umt.pth", table.rows), ("instap_extra.pth", extra)):
        state = {}

        def put(key: str, array: np.ndarray, state=state) -> None:
            state[key] = torch.from_numpy(np.array(array, order="C"))

        written += _convert(stored, rows, file, put)
        if rows is table.rows:
            for key, origin in table.tied.items():
                state[key] = state[origin]
                note = f"{file}: another name of {origin}"
                written.append(Entry(Fate.LOADED, key, tuple(state[key].shape), note, 0))
            for key, value in table.constants.items():
                state[key] = torch.from_numpy(value)
                note = f"{file}: a buffer of UMT's, no parameter"
                written.append(Entry(Fate.FRESH, key, value.shape, note, value.nbytes))
        torch.save({"model": state}, out / file)
    return written


def _convert(
    stored: checkpoint.StoredParams,
    rows: Sequence[keys.Row],
    file: str,
    write: Callable[[str, np.ndarray], None],
) -> list[Entry]:
    """Reads the parameters of the rows one after the other and writes their foreign tensors."""
    written = []
    with Progress(f"write {file}", len(rows), unit="layers") as progress:
        for name, group in itertools.groupby(rows, key=lambda row: row.ours):
            array = stored.read(name)
            if array.dtype != np.float32 or not np.isfinite(array).all():
                fault = "has values that are not finite"
                if array.dtype != np.float32:
                    fault = f"is {array.dtype}, not float32"
                raise UserError(f"parameter {name} of step {stored.step} {fault}; not exported")
            for row in group:
                tensors = row.to_theirs(array if row.layer is None else array[row.layer])
                for key, tensor in tensors.items():
                    write(key, tensor)
                    written.append(_entry(file, key, tensor, row))
                progress.update()
    return written


def _entry(file: str, key: str, tensor: np.ndarray, row: keys.Row) -> Entry:
    ours = row.ours if row.layer is None else f"{row.ours}[{row.layer}]"
    how = row.transform.name
    fate = Fate.LOADED if how == "same" else Fate.RESHAPED
    return Entry(fate, key, tensor.shape, f"{file}: of {ours}, {how}", tensor.nbytes)


def _torch():
    try:
        import torch
    except ImportError as error:
        raise UserError("--to=umt writes torch's own format: install torch") from error
    return torch


def _write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
