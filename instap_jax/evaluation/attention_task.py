"""Task 'attention': maps of every instance's sentence in its scene, and whether they hit the box.

The question is the paper's claim: does a model trained with instances attend to the one that the
sentence names, where a model trained on whole scenes does not? Runs are compared by `pointing`,
each against the same floors.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import sharding
from instap_jax.data.records import RecordSource, open_source
from instap_jax.errors import UserError
from instap_jax.evaluation import aligned, attention_maps
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.encoder import Encoder
from instap_jax.evaluation.features import refuse_faults, suite_batches, whole_caption
from instap_jax.evaluation.gallery import Case, write_cases
from instap_jax.evaluation.pointing import Pointing, join, pointing, summarise
from instap_jax.evaluation.results import Measurement
from instap_jax.evaluation.strips import read_frames, strip
from instap_jax.models import boxes as box
from instap_jax.models.instap import InstAP
from instap_jax.models.placement import flat
from instap_jax.progress import Progress
from instap_jax.train.objectives import term_weights
from instap_jax.types import Batch, Kind

SIMILARITY, MATCH = "similarity", "match"
SCORING = {
    SIMILARITY: "Grad-CAM of the cosine with the scene",
    MATCH: "gradient x cross-attention of the match logit",
}
_MAPS = {
    SIMILARITY: attention_maps.similarity_maps,
    MATCH: attention_maps.match_maps,
}

_SMOOTHED = " smoothed"
_SAMPLES = ("sample_valid", "fault", "record")
_READ = (
    *_SAMPLES, "frames", "extent", "boxes", "present", "parent", "instance_valid", "instance_text",
)  # fmt: skip

Maps = Callable[[Any, Batch], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shown:
    """An instance to be drawn: `place` of its record. maps: float32 [t, r, c] by method, filtered.
    mass (by method), area: percent."""

    record: int
    place: int
    boxes: np.ndarray
    present: np.ndarray
    maps: dict[str, np.ndarray]
    mass: dict[str, float]
    area: float


def measure(context: Context) -> list[Measurement]:
    """Pointing scores of every suite's instances, and overlays of some of them.

    Raises:
      UserError: the run has no text tower of its own, or a suite has no instances.
    """
    if context.config.stage != "align":
        raise UserError(
            f"task attention needs a run of stage 'align': stage {context.config.stage!r} has no "
            "text tower that its visual tokens were aligned with"
        )
    make = make_maps(context.encoder)
    measured, cases = [], []
    for suite in context.suites:
        found, shown = _measure_suite(context, suite, make)
        measured += found
        cases += shown
    if jax.process_index() == 0:
        write_cases(context.workdir, "attention", cases)
    return measured


def map_methods(config: ConfigDict) -> list[str]:
    """The maps that a run of stage 'align' has; of the match logit only where (3) trained it."""
    return [SIMILARITY, MATCH] if "vtm" in term_weights(config) else [SIMILARITY]


def make_maps(encoder: Encoder) -> Maps:
    """The jitted function that maps a batch of g groups with n instances each.

    Returns:
      (params, batch) -> {method: float32 [g * n, t, r, c], 'METHOD smoothed': the same after the
      rank Gaussian filter, 'inside': covered share of every patch, 'boxes', 'present', 'valid',
      'sample': the record of every instance; and of the samples 'sample_valid', 'fault',
      'record'}, flat over the groups, known on every host.
    """
    config = encoder.config

    def maps(params: Any, batch: Batch) -> dict[str, jax.Array]:
        model: InstAP = nnx.merge(encoder.graphdef, params["model"])
        tokens = aligned.see_scenes(config, model, batch)
        tokens = tokens.reshape((*batch["frames"].shape[:2], *tokens.shape[1:]))
        boxes, texts = batch["boxes"], (batch["instance_text"], batch["parent"])
        side = config.vision.image_size // config.vision.patch
        out = {
            "inside": box.patch_cover(boxes, side),
            "boxes": boxes,
            "present": batch["present"],
            "valid": batch["instance_valid"],
            "sample": jnp.take_along_axis(batch["record"], batch["parent"], axis=1),
        }
        out |= {name: batch[name] for name in _SAMPLES}
        for method in map_methods(config):
            # Group by group: no scene leaves its device.
            found = jax.vmap(functools.partial(_MAPS[method], model))(tokens, *texts)
            out[method] = found.reshape((*boxes.shape[:3], side, side))
            out[f"{method}{_SMOOTHED}"] = attention_maps.rank_gaussian_filter(out[method])
        return jax.tree.map(flat, out)

    return jax.jit(maps, out_shardings=sharding.replicated(encoder.mesh))


def _measure_suite(
    context: Context, suite: Suite, make: Maps
) -> tuple[list[Measurement], list[Case]]:
    encoder, methods = context.encoder, map_methods(context.config)
    source = open_source(suite.directory, suite.split, suite.kind)
    if not len(source):
        raise UserError(f"{suite.directory}:{suite.split} has no {suite.kind} samples")
    frames = context.options.frames or context.preset.frames or encoder.config.data.frames
    frames = frames if suite.kind is Kind.VIDEO else 1
    wanted = choose_records(len(source), context.options.attention_cases)
    scores: dict[str, list[Pointing]] = collections.defaultdict(list)
    samples: list[np.ndarray] = []
    shown: list[_Shown] = []
    with Progress(f"attention {suite.split}", len(source)) as progress:
        for out in _maps_of_batches(context, source, frames, make):
            sample = out["sample"]
            where = out["inside"], out["boxes"], out["present"], sample
            names = [*methods, *(f"{method}{_SMOOTHED}" for method in methods)]
            now = {name: pointing(out[name], *where) for name in names}
            for name, one in now.items():
                scores[name].append(one)
            samples.append(sample)
            shown += [
                _to_show(out, now, record, methods) for record in sorted(wanted & set(sample))
            ]
            progress.update(int(out["records"]))
    sample = np.concatenate([*samples, np.zeros(0, int)])
    if not len(sample):
        raise UserError(f"suite {suite.split} has no instances: there is nothing to point at")
    joined = {name: join(parts) for name, parts in scores.items()}
    measured = [_measurement(context, suite, m, joined, sample, frames) for m in methods]
    return measured, [_case(suite, source, one, frames) for one in shown]


def _maps_of_batches(
    context: Context, source: RecordSource, frames: int, make: Maps
) -> Iterator[dict[str, np.ndarray]]:
    """What `make` returns of every batch, of its valid instances; 'records': samples in it."""
    encoder, options = context.encoder, context.options
    workers = encoder.config.data.workers if options.workers is None else options.workers
    for step in suite_batches(encoder, source, frames, options.batch_size, workers):
        batch = {name: sharding.place_rows(step.batch[name], encoder.mesh) for name in _READ}
        out = jax.device_get(make(encoder.params, batch))
        refuse_faults(out, source)
        valid, records = out.pop("valid"), out.pop("sample_valid").sum()
        per_instance = {name: array[valid] for name, array in out.items() if name not in _SAMPLES}
        yield per_instance | {"records": records}


def choose_records(records: int, cases: int) -> set[int]:
    """Samples of which one instance is shown: the same in every run, drawn with a fixed seed."""
    return set(np.random.default_rng([0]).permutation(records)[:cases].tolist())


def _to_show(
    out: dict[str, np.ndarray], scores: dict[str, Pointing], record: int, methods: list[str]
) -> _Shown:
    rows = np.flatnonzero(out["sample"] == record)
    place = int(np.random.default_rng([1, record]).integers(len(rows)))
    row = rows[place]
    smoothed = {method: f"{method}{_SMOOTHED}" for method in methods}
    return _Shown(
        record=record,
        place=place,
        boxes=out["boxes"][row],
        present=out["present"][row],
        maps={method: out[name][row] for method, name in smoothed.items()},
        mass={method: 100 * float(scores[name].mass[row]) for method, name in smoothed.items()},
        area=100 * float(scores[methods[0]].area[row]),
    )


def _measurement(
    context: Context,
    suite: Suite,
    method: str,
    scores: dict[str, Pointing],
    record: np.ndarray,
    frames: int,
) -> Measurement:
    raw = summarise(scores[method], record)
    length = context.encoder.config.tokenizer.length
    return Measurement(
        protocol=context.protocol(
            suite,
            unit="instances in their whole scene",
            scoring=SCORING[method],
            frames=frames,
            notes=f"query: the instance's caption, cut to {length} tokens; whole picture; rank "
            "Gaussian filter 3 x 3; of the uniform frames those with the instance",
        ),
        metrics=summarise(scores[f"{method}{_SMOOTHED}"], record)
        | {"unsmoothed": {name: raw[name] for name in ("mass", "hit")}},
        counts={"instances": len(record), "samples": len(np.unique(record))},
    )


def _case(suite: Suite, source: RecordSource, one: _Shown, frames: int) -> Case:
    pictures = read_frames(source, one.record, frames)
    caption = whole_caption(source[one.record].instance_captions[one.place])
    strips = {"the instance": strip(pictures, one.boxes, one.present)}
    for method, maps in one.maps.items():
        heat = maps / max(float(maps.max()), 1e-12)
        strips[SCORING[method]] = strip(pictures, one.boxes, one.present, heat=heat)
    return Case(
        suite=suite.split,
        group="overlay",
        key=f"{one.record}/{one.place}",
        texts={"sentence": caption},
        pictures=strips,
        numbers={SCORING[method]: round(mass, 1) for method, mass in one.mass.items()}
        | {"area": round(one.area, 1)},
    )
