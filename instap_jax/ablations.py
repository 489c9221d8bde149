"""Baselines and ablations of stage 'align', by name: what each changes in a stage-2 configuration.

`configs/tiny.py:stage2,NAME` and `configs/stage2_l16.py:NAME` apply one; docs/ablations.md lists
them with what the paper measured.
"""

from typing import Any

from ml_collections import ConfigDict

_STILL = {"align.still_boxes": True}
_SAMPLING = {"data.caption_sampling": "epoch"}
_NO_SAMPLING = _STILL | {"data.caption_sampling": "first"}
_SAME_WEIGHT = _NO_SAMPLING | {"align.instance": 1.0}

ABLATIONS: dict[str, dict[str, Any]] = {
    # Table 1: InstAP is the configuration itself. Table 4: 'umt_g' is its row without L_inst.
    "umt_g": {"align.instance": 0.0},
    "umt_gi": {"align.instance": 0.0, "align.global_instances": True},
    # Table 5, every row on top of the one before; the last is the paper's method.
    "table5_instances": _SAME_WEIGHT | {"align.own_temperature": False},
    "table5_temperature": _SAME_WEIGHT,
    "table5_lambda": _NO_SAMPLING | {"align.instance": 0.1},
    "table5_sampling": _STILL | _SAMPLING | {"align.instance": 0.1},
    "table5_trajectories": _SAMPLING | {"align.instance": 0.1},
    # One change each.
    "shared_temperature": {"align.own_temperature": False},
    "lambda_1": {"align.instance": 1.0},
    "whole_captions": {"data.caption_sampling": "first"},
    "sentences": _SAMPLING,
    "still_boxes": _STILL,
    "sigmoid": {"contrastive.loss": "sigmoid"},
    "siblings": {"align.alpha": 1.0},
    "scene_sentences": {"align.global_instances": True},
    "no_cross_attention": {"align.cross_attention": False},
    "scene_anchor": {"align.scene_anchor": True},
    "size_code": {"align.size_code": True},
    "motion_code": {"align.motion_code": True},
    "box_codes": {"align.scene_anchor": True, "align.size_code": True, "align.motion_code": True},
    "loose_crops": {"align.crop_context": 1.5},
    "small_start": {"align.cross_attention_scale": 0.1},
    "crops_masked": {"align.crop_mask_ratio": 0.5},
    "topk_masks": {"distill.mask_choice": "topk"},
    "random_masks": {"distill.mask_score": "random"},
    "unmasked": {"align.mask_ratio_video": 0.0, "align.mask_ratio_image": 0.0},
    "contrast_only": {
        "align.rec": 0.0,
        "align.vtm": 0.0,
        "align.mlm": 0.0,
        "align.inst_vtm": 0.0,
        "align.inst_mlm": 0.0,
    },
    "all_terms": {
        "align.rec": 1.0,
        "align.vtm": 1.0,
        "align.mlm": 1.0,
        "align.inst_vtm": 1.0,
        "align.inst_mlm": 1.0,
    },
}


def ablate(config: ConfigDict, name: str) -> None:
    """Changes a stage-2 configuration into the named baseline or ablation; '' leaves it alone.

    Raises:
      ValueError: no such name.
    """
    if not name:
        return
    if name not in ABLATIONS:
        raise ValueError(f"no ablation {name!r}; there are {', '.join(ABLATIONS)}")
    config.update_from_flattened_dict(ABLATIONS[name])
