"""The cost table: its parts against formulas, against the whole, and what options must do."""

import importlib.util
from pathlib import Path

import pytest
from tiny import load_config

SPEC = importlib.util.spec_from_file_location(
    "cost", Path(__file__).parent.parent / "benchmarks" / "cost.py"
)
cost = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(cost)


@pytest.fixture(scope="module")
def config():
    """All terms, the teacher's masks, 4 layers of width 128; 4 frames of 64 tokens."""
    c = load_config("tiny", "stage2,all_terms")
    c.distill.mask_score = "cls"
    c.align.mask_ratio_video = 0.75
    return c


def test_the_ladder_ends_with_the_whole_objective():
    start = cost.changed(cost.large(), cost.START)
    assert start.to_dict() != cost.large().to_dict()
    for changes in cost.LADDER.values():
        start = cost.changed(start, changes)
    assert start.to_dict() == cost.large().to_dict()


def test_parts_equal_formulas_and_make_up_the_whole(config):
    parts = list(cost.part_costs(config, frames=4).values())
    teacher, scene, crop, attention, text, fuse_scene, fuse_crop, fuse_one, words = parts
    # 12 d^2 weights a layer and two products of attention, on 64 tokens, which are also all the
    # patches that are embedded: a quarter of four frames, or a crop of 4 x 4 patches in four.
    width, layers, tokens = 128, 4, 64
    encoder = layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    encoder += 2 * tokens * (3 * 8 * 8) * width
    assert (scene, crop) == (encoder, encoder)
    # Two instances a sample; matching fuses three pairs of each sample and of each instance.
    whole = teacher + scene + 2 * (crop + attention) + (2 + 2 * 2) * text + (3 + 1) * fuse_scene
    whole += 2 * (3 * fuse_one + fuse_crop) + 3 * words
    found = cost.step_flops(config, size=4, frames=4, backward=False)
    # What is left: views and crops cut out, heads, projections, contrasts.
    assert whole < found < 1.12 * whole


def test_backward_rematerialisation_and_crops_cost_what_they_should(config):
    def flops(backward=True, remat="all", **changes):
        changed = cost.changed(config, changes)
        return cost.step_flops(changed, size=2, frames=4, backward=backward, remat=remat)

    forward, both = flops(backward=False), flops()
    assert 2 * forward < both < 3 * forward  # the teacher has no backward pass
    assert both + forward / 4 < flops(remat="none") < both + forward
    # A quarter of the tokens, and less than a quarter of what their encoding costs is left.
    assert flops(**{"align.crop_size": 16}) < both - forward / 4
