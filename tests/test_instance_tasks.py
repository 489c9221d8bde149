"""Tasks 'errors' and 'attention' on a packed suite, with a model that was not trained."""

import json

import jax
import numpy as np
import pytest
from embedded import make_embedded
from flax import nnx
from pack_data import annotations, image_line, make_media
from PIL import Image
from tiny import tiny_config

from instap_jax import config_check, main, sharding
from instap_jax.errors import UserError
from instap_jax.evaluation import attention_task, encoder, errors_task, gallery
from instap_jax.evaluation.context import Context, Options, parse_suites
from instap_jax.evaluation.errors import CLASSES
from instap_jax.train.objectives import OBJECTIVES


def instap(*args):
    assert main.main([str(arg) for arg in args]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a packed suite of each kind, one without instances, and a tokenizer."""
    sizes = ("--train_videos=8", "--train_images=8", "--suite_size=9", "--val_size=8")
    root = make_embedded(tmp_path_factory.mktemp("made"), *sizes)
    (root / "media").mkdir()
    make_media(root / "media")
    bare = annotations(root / "bare.jsonl", [image_line("a", split="bare", instances=[])])
    instap("pack", f"--annotations={bare}", f"--media={root}/media", f"--out={root}/bare",
           "--short_side=24", "--processes=1")  # fmt: skip
    return root


def make_config(made, part="stage2,all_terms"):
    config = tiny_config(part, **{"tokenizer.path": f"{made}/tokenizer.model", "data.frames": 2})
    if part == "stage1":
        config.teacher.checkpoint = str(made / "teacher")
    return config


def write_config(config, workdir):
    workdir.mkdir(exist_ok=True)
    loaded = config_check.LoadedConfig(config=config, file="test", overrides={})
    config_check.record(loaded, workdir)
    return workdir


@pytest.fixture(scope="module")
def model(made):
    """Structure and random parameters, on the host."""
    module = nnx.eval_shape(lambda: OBJECTIVES["align"].create(make_config(made), nnx.Rngs(0)))
    graphdef, abstract = nnx.split(module)
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)
    return graphdef, jax.tree.map(draw, abstract)


def make_context(made, model, workdir, *, videos="", images="", devices=8, **options):
    """A context whose encoder has the random weights instead of a checkpoint's."""
    config = make_config(made)
    suites = parse_suites(videos, images)
    context = Context(write_config(config, workdir), suites, Options(batch_size=8, **options))
    context.mesh = mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    params = jax.device_put(model[1], sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        context.encoder = encoder.make_encoder(config, mesh, model[0], params, step=0)
    return context


def run(task, context):
    with jax.set_mesh(context.mesh):
        return task.measure(context)


def test_errors_of_a_suite(made, model, tmp_path):
    context = make_context(made, model, tmp_path / "a", videos=f"{made}/packed:video_1k")
    (measured,) = run(errors_task, context)
    found = context.features(context.suites[0])
    for direction, (queries, candidates) in {
        "t2v": (found.instance_text, found.instance),
        "v2t": (found.instance, found.instance_text),
    }.items():
        scores = queries.astype(np.float64) @ candidates.T.astype(np.float64)
        rank = (scores >= np.diag(scores)[:, None]).sum(axis=1)
        metrics = measured.metrics[direction]
        assert metrics["wrong"] == (rank > 1).sum() > 0
        assert metrics["queries"] == len(found.instance)
        assert sum(metrics[name]["count"] for name in CLASSES) == metrics["wrong"]
    cases = gallery.read_cases(context.workdir, "errors")
    assert cases and {case.group for case in cases} <= set(CLASSES)
    captions = {" ".join(one.captions) for one in found.instance_facts}
    for case in cases:
        direction, right, wrong, why = case.texts.values()
        assert {right, wrong} <= captions and right != wrong and why
        for name in case.pictures.values():
            with Image.open(context.workdir / "eval" / "errors" / name) as picture:
                assert picture.height == 128 and picture.width > 300  # two frames
    before = {p.name: p.read_bytes() for p in (context.workdir / "eval" / "errors").iterdir()}
    run(errors_task, context)
    after = {p.name: p.read_bytes() for p in (context.workdir / "eval" / "errors").iterdir()}
    assert before == after


def test_attention_is_the_same_on_one_and_eight_devices(made, model, tmp_path):
    suites = {"videos": f"{made}/packed:video_1k", "attention_cases": 2}
    contexts = [
        make_context(made, model, tmp_path / str(devices), devices=devices, **suites)
        for devices in (8, 1)
    ]
    first, second = (run(attention_task, context) for context in contexts)
    assert [one.protocol.scoring for one in first] == list(attention_task.SCORING.values())
    for one, other in zip(first, second, strict=True):
        assert one.counts == other.counts and one.counts["samples"] == 9
        for name, value in one.metrics.items():
            if name != "unsmoothed":
                assert value == pytest.approx(other.metrics[name], abs=0.02), name
    # The floor comes from the annotation alone: area of the boxes where they are present.
    source = errors_task.open_source(f"{made}/packed", "video_1k", contexts[0].suites[0].kind)
    instances = errors_task.read_instances(source, 2)
    areas = [one.area for one in instances if one.seen]
    assert len(areas) == len(instances)
    assert first[0].metrics["area"] == pytest.approx(100 * np.mean(areas), rel=1e-4)
    cases = gallery.read_cases(contexts[0].workdir, "attention")
    assert [case.key for case in cases] == [
        case.key for case in gallery.read_cases(contexts[1].workdir, "attention")
    ]
    assert len(cases) == 2
    for case in cases:
        assert list(case.pictures) == ["the instance", *attention_task.SCORING.values()]
        record, place = map(int, case.key.split("/"))
        assert case.texts["sentence"] == " ".join(source[record].instance_captions[place])


def test_match_maps_only_where_matching_was_trained(made):
    config = make_config(made)
    assert attention_task.map_methods(config) == ["similarity", "match"]
    config.align.vtm = 0.0  # (9) alone trains the head on single crop tokens
    assert attention_task.map_methods(config) == ["similarity"]


def test_suite_without_instances_is_one_line(made, model, tmp_path):
    context = make_context(made, model, tmp_path / "a", images=f"{made}/bare:bare")
    for task in (errors_task, attention_task):
        with pytest.raises(UserError, match="suite bare"):
            run(task, context)
        assert not (context.workdir / "eval").exists()


def test_run_without_a_text_tower_is_one_line(made, tmp_path, capsys):
    workdir = write_config(make_config(made, "stage1"), tmp_path / "student")
    for task in ("errors", "attention"):
        args = [f"--workdir={workdir}", f"--task={task}", f"--videos={made}/packed:video_1k"]
        assert main.main(["evaluate", *args, "--batch_size=8"]) == 2
        error = capsys.readouterr().err
        assert f"task {task} needs a run of stage 'align'" in error and error.count("\n") == 1
    assert json.loads((workdir / "config.json").read_text())["config"]["stage"] == "distill"
