"""A model of ours and its export side by side, without files: for parity tests."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import config_check
from instap_jax.data.tokenizer import train_sentencepiece
from instap_jax.evaluation import aligned
from instap_jax.interop import instap, keys
from instap_jax.interop.export import describe
from instap_jax.interop.torch_model import InstAP as TorchInstAP
from instap_jax.models.instap import InstAP
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import OBJECTIVES
from instap_jax.types import Batch

torch.set_num_threads(1)


def to_torch(state: Any) -> dict[str, torch.Tensor]:
    """Parameters, or gradients, as the tensors of the export."""
    arrays = {name: np.asarray(leaf) for name, leaf in keys.leaves(state).items()}
    tensors = {}
    for row in instap.table({name: a.shape for name, a in arrays.items()}).rows:
        array = arrays[row.ours] if row.layer is None else arrays[row.ours][row.layer]
        for key, tensor in row.to_theirs(array).items():
            tensors[key] = torch.from_numpy(np.array(tensor, order="C"))
    return tensors


def random_params(abstract: nnx.State, seed: int = 0) -> nnx.State:
    """Random values everywhere, so that no bias, norm or scalar is at a value that hides it."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        value = rng.normal(0, 0.15, leaf.shape).astype(np.float32)
        if "scale" in name:
            value += 1
        return np.abs(value) + np.float32(0.05) if "temperature" in name else value

    return jax.tree_util.tree_map_with_path(draw, abstract)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same parameters in JAX and in PyTorch."""

    config: ConfigDict
    graphdef: nnx.GraphDef
    params: nnx.State

    @functools.cached_property
    def ours(self) -> InstAP:
        return nnx.merge(self.graphdef, self.params)

    @functools.cached_property
    def theirs(self) -> TorchInstAP:
        model = TorchInstAP(describe(self.config, 0))
        model.load_state_dict(to_torch(self.params), strict=True)
        return model.eval()


def make_pair(config: ConfigDict, params: nnx.State | None = None) -> Pair:
    """Of random parameters, or of these."""
    create = functools.partial(OBJECTIVES["align"].create, config)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return Pair(config, graphdef, random_params(abstract) if params is None else params)


def embed(pair: Pair, batch: Batch) -> dict[str, np.ndarray]:
    """What evaluation computes of one group of a batch, and the matching of its pairs."""

    @jax.jit
    def run(params, batch):
        model = nnx.merge(pair.graphdef, params)
        tokens = aligned.see_scenes(pair.config, model, batch)
        instances = aligned.embed_instances(pair.config, model, batch, tokens)
        return {
            "video": aligned.embed_scenes(model, tokens),
            "instance": instances.embedding,
            "text": aligned.embed_texts(model, batch["text"][0]),
            "match": aligned.match(model, batch["text"][0], tokens),
            "instance match": aligned.match(
                model, batch["instance_text"][0], instances.crop[:, None]
            ),
        }

    return jax.device_get(run(pair.params, batch))


def embed_with_torch(pair: Pair, batch: Batch) -> dict[str, np.ndarray]:
    """The same, from the pictures without their canvas."""
    model = pair.theirs
    model.config["trained"]["terms"] = ["vtm", "inst_vtm"]  # as if: random heads agree, too
    canvas = batch["frames"].shape[3:5]
    sizes = np.rint(batch["extent"][0] * canvas).astype(int)
    frames = [f[:, :h, :w] for f, (h, w) in zip(batch["frames"][0], sizes)]
    clips, order = range(len(frames)), batch["parent"][0]
    members = [np.flatnonzero(order == i) for i in clips]
    boxes, present, ids = (
        [batch[name][0][m] for m in members] for name in ("boxes", "present", "instance_text")
    )
    back = np.argsort(np.concatenate(members))
    with torch.inference_mode():
        return {
            "video": model.encode_video(frames).numpy(),
            "instance": torch.cat(model.encode_instances(frames, boxes, present)).numpy()[back],
            "text": model.encode_text(batch["text"][0]).numpy(),
            "match": model.match(frames, batch["text"][0]).numpy(),
            "instance match": torch.cat(model.match_instances(frames, boxes, ids, present)).numpy()[
                back
            ],
        }


def write_run(workdir: Path, config: ConfigDict, params: nnx.State) -> Path:
    """A workdir with one checkpoint, as the loop or an import leaves it."""
    config_check.record(config_check.LoadedConfig(config=config, file="", overrides={}), workdir)
    meta = {"stage": config.stage, "inputs": inputs.identify(config)}
    checkpoint.write_params(str(workdir), params, meta=meta)
    return workdir


def write_words(directory: Path, config: ConfigDict) -> None:
    """A sentencepiece vocabulary, which the configuration then names."""
    path = directory / "words.model"
    path.write_bytes(train_sentencepiece(["a red ball rolls to the left of a blue box"] * 3, 300))
    config.tokenizer.update(kind="sentencepiece", path=str(path))
