"""What open_clip says beside its weights, whose keys and shapes are those of OpenAI's layout.

Its models have heads of other sizes and mostly another activation, which no tensor shows. Fields
and defaults: `CLIPVisionCfg` and `CLIP` of its model.py.
"""

from pathlib import Path
from typing import Any

from instap_jax.errors import UserError
from instap_jax.interop.reading import Weights, read_config
from instap_jax.models import preprocess

FILES = ("open_clip_config.json", "config.json")
# What changes the tokens but no name or shape: as the teacher computes, which is the default there.
COMPUTED = {
    "pool_type": "tok",
    "final_ln_after_pool": False,
    "global_average_pool": False,
    "act_kwargs": None,
    "norm_kwargs": None,
}


def heads(weights: Weights, sizes: dict[str, Any]) -> int | None:
    """Attention heads, as open_clip's file beside the weights says; None where there is none.

    Args:
      sizes: what the tensors determine, all of `teacher` but its heads and picture.

    Raises:
      UserError: the file is damaged, is another model's, or describes what the teacher does not
        compute.
    """
    file, said = _read(weights.path)
    if said is None:
        return None
    model = said.get("model_cfg", said)
    vision = model["vision_cfg"]
    _check_model(file, model, vision, sizes)
    mean, deviation = map(list, preprocess.CLIP)
    if isinstance(pixels := said.get("preprocess_cfg"), dict):
        _check_computed(file, pixels, {"mean": mean, "std": deviation})
    _check_computed(file, vision, COMPUTED)
    if not model.get("quick_gelu"):
        raise UserError(
            f"{file}: quick_gelu is not true, so that the activation is another than the teacher's "
            "quick_gelu; take weights that were trained with it, such as OpenAI's"
        )
    channels = vision.get("head_width", 64)
    if not isinstance(channels, int) or channels < 1 or sizes["teacher.width"] % channels:
        raise UserError(
            f"{file}: head_width is {channels!r}, which does not divide the width "
            f"{sizes['teacher.width']}; take the file that belongs to {weights.path.name}"
        )
    return sizes["teacher.width"] // channels


def _read(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """open_clip's description of a model, with the name of its file."""
    for name in FILES:
        said = read_config(path, name) or {}
        model = said.get("model_cfg", said)
        if isinstance(model, dict) and isinstance(model.get("vision_cfg"), dict):
            return path.parent / name, said
    if (path.parent / FILES[0]).is_file():
        raise UserError(f"{path.parent / FILES[0]}: has no vision_cfg; it is not open_clip's")
    return path.parent, None


def _check_model(file: Path, model: dict, vision: dict, sizes: dict[str, Any]) -> None:
    """The description is that of these weights."""
    width = sizes["teacher.width"]
    wanted = {
        "width": (vision.get("width", 768), width),
        "layers": (vision.get("layers", 12), sizes["teacher.depth"]),
        "patch_size": (vision.get("patch_size", 16), sizes["teacher.patch"]),
        "embed_dim": (model.get("embed_dim"), sizes["teacher.projection"]),
    }
    for field, (said, is_) in wanted.items():
        if said != is_:
            raise UserError(
                f"{file}: {field} is {said!r}, but {is_} in the weights; take the file that "
                "belongs to them"
            )


def _check_computed(file: Path, said: dict[str, Any], wanted: dict[str, Any]) -> None:
    for field, value in wanted.items():
        if (said.get(field) or value) != value:
            raise UserError(
                f"{file}: {field} is {said[field]!r}; the teacher computes with {value!r}: take "
                "other weights"
            )
