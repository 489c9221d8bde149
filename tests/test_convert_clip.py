"""CLIPs whose weights do not say how they compute: open_clip's, in OpenAI's layout."""

import json

import foreign
import numpy as np
import pytest
import torch
from flax import nnx
from test_convert import clip_config, given, load_teacher

from instap_jax import config_check
from instap_jax.errors import UserError
from instap_jax.interop import clip
from instap_jax.interop.importing import convert
from instap_jax.interop.keys import leaves
from instap_jax.interop.reading import Weights


def shapes_only(tmp_path, width: int, layout: str = "openai") -> Weights:
    """A vision transformer of this width: what a plan sees of a file."""
    with torch.device("meta"):
        model = foreign.clip_model(width=width)
        state = foreign.openai_weights(model) if layout == "openai" else model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Weights(tmp_path / "open_clip_pytorch_model.bin", shapes, read=None)


def describe(directory, content: dict, name: str = "open_clip_config.json"):
    (directory / name).write_text(json.dumps(content))


def refused(directory, message: str, width: int = foreign.WIDTH, layout: str = "openai"):
    with pytest.raises(UserError) as error:
        clip.plan(shapes_only(directory, width, layout), None)
    line = str(error.value)
    assert message in line and "\n" not in line, line


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16)])
def test_what_an_openai_file_does_not_say_is_assumed(tmp_path, width, heads):
    plan = clip.plan(shapes_only(tmp_path, width), None)
    assert "teacher.heads" not in plan.sizes and plan.config.teacher.heads == heads
    assert {f"teacher.heads={heads}", "activation quick_gelu"} < set(plan.assumed)


@pytest.mark.parametrize("layout", ["openai", "hugging face"])
def test_other_widths_need_a_description_or_a_configuration(tmp_path, layout):
    for width in (320, 1280, 1408):
        refused(tmp_path, f"width {width} is none of OpenAI's (768, 1024)", width, layout)
    config = clip_config()
    config.teacher.update(width=320, heads=4, mlp_ratio=2.0)
    plan = clip.plan(shapes_only(tmp_path, 320, layout), config)
    assert plan.assumed == ("teacher.heads=4", "activation quick_gelu")


@pytest.mark.parametrize("form", ["open_clip_config.json", "config.json", "flat", "hugging face"])
def test_heads_are_those_of_the_description(tmp_path, form):
    model = foreign.clip_model(heads=4)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "in").mkdir()
    said = foreign.open_clip_config(head_width=32)
    if form == "flat":  # as in open_clip's model_configs
        describe(tmp_path / "in", said["model_cfg"])
    elif form == "hugging face":  # beside the file in the other layout, as on the hub
        describe(
            tmp_path / "in", json.loads((tmp_path / "hf/config.json").read_text()), "config.json"
        )
    else:
        describe(tmp_path / "in", said, form)
    foreign.save(foreign.openai_weights(model), tmp_path / "in" / "open_clip_model.safetensors")
    report = convert("clip", tmp_path / "in", tmp_path / "out", None)
    assert report.sizes["teacher.heads"] == 4 and report.assumed == ("teacher.image_size=98",)
    convert("clip", tmp_path / "hf", tmp_path / "reference", None)
    directories = (tmp_path / "out", tmp_path / "reference")
    config, expected = (config_check.read(directory).teacher for directory in directories)
    assert config == expected
    ours, theirs = (leaves(nnx.state(load_teacher(directory))) for directory in directories)
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    with pytest.raises(UserError, match=r"teacher\.heads is 4 there, 2 here"):
        convert("clip", tmp_path / "in", tmp_path / "other", given(clip_config()))


CHANGES = {
    "width is 256, but 128 in the weights": {"width": 256},
    "layers is 12, but 3 in the weights": {"layers": 12},
    "patch_size is 14, but 7 in the weights": {"patch_size": 14},
    "head_width is 80, which does not divide the width 128": {"head_width": 80},
    "head_width is '64', which": {"head_width": "64"},
    "pool_type is 'avg'; the teacher computes with 'tok'": {"pool_type": "avg"},
    "final_ln_after_pool is True; the teacher": {"final_ln_after_pool": True},
    "global_average_pool is True; the teacher": {"global_average_pool": True},
    "norm_kwargs is {'eps': 1e-06}; the teacher": {"norm_kwargs": {"eps": 1e-6}},
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_description_of_another_model_is_refused(tmp_path, message):
    describe(tmp_path, foreign.open_clip_config(**CHANGES[message]))
    refused(tmp_path, f"open_clip_config.json: {message}")


def test_other_faults_of_a_description_are_refused(tmp_path):
    said = foreign.open_clip_config()
    describe(tmp_path, said)
    assert clip.plan(shapes_only(tmp_path, foreign.WIDTH), None).config.teacher.heads == 2
    describe(tmp_path, said | {"model_cfg": said["model_cfg"] | {"embed_dim": 512}})
    refused(tmp_path, "embed_dim is 512, but 12 in the weights")
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}  # of LAION's ViT-L/14
    describe(tmp_path, said | {"preprocess_cfg": pixels})
    refused(tmp_path, "mean is [0.5, 0.5, 0.5]; the teacher computes with [0.48145466,")
    pixels["mean"] = said["preprocess_cfg"]["mean"]
    describe(tmp_path, said | {"preprocess_cfg": pixels})
    refused(tmp_path, "std is [0.5, 0.5, 0.5]; the teacher computes with [0.26862954,")
    for content in ({}, {"model_cfg": {"embed_dim": 12}}, {"model_cfg": 3}):
        describe(tmp_path, content)
        refused(tmp_path, "open_clip_config.json: has no vision_cfg")
    (tmp_path / "open_clip_config.json").write_text("{")
    refused(tmp_path, "open_clip_config.json: not JSON")


def test_what_hugging_face_says_of_another_model_is_refused(tmp_path):
    said = foreign.clip_model().config.vision_config.to_dict()
    describe(tmp_path, {"vision_config": said}, "config.json")
    plan = clip.plan(shapes_only(tmp_path, foreign.WIDTH, "hugging face"), None)
    assert plan.config.teacher.heads == 2
    for field, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        describe(tmp_path, {"vision_config": said | {field: value}}, "config.json")
        refused(tmp_path, f"{field} is {value!r}; the teacher", layout="hugging face")


@pytest.mark.parametrize("name", ["open_clip_config.json", "config.json"])
def test_exact_gelu_is_refused(tmp_path, name):
    """As in those of LAION-2B, whose descriptions do not name it: it is open_clip's default."""
    said = foreign.open_clip_config()
    del said["model_cfg"]["quick_gelu"]
    describe(tmp_path, said, name)
    refused(tmp_path, f"{name}: quick_gelu is not true")
    said["model_cfg"]["quick_gelu"] = False
    describe(tmp_path, said, name)
    refused(tmp_path, f"{name}: quick_gelu is not true")
