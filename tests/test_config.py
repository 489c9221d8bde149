import json
from pathlib import Path

import pytest
from tiny import CONFIGS, load_config

from instap_jax import config_check, main
from instap_jax.ablations import ABLATIONS
from instap_jax.config import default
from instap_jax.config_check import LoadedConfig
from instap_jax.errors import UserError

SHIPPED = [
    ("stage1_l16",),
    ("stage2_l16",),
    ("ground_l16",),
    ("classify_l16", str(Path(__file__).parent / "classes.txt")),
    *[("tiny", part) for part in ("teacher", "stage1", "stage2", "ground", "classify")],
    *[("stage2_l16", name) for name in ABLATIONS],
    *[("tiny", f"stage2,{name}") for name in ABLATIONS],
]


def run(capsys, *args: str) -> tuple[int, str]:
    code = main.main(args)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", SHIPPED, ids=":".join)
def test_shipped_configs_are_valid(name):
    config_check.check(load_config(*name))


def test_every_config_file_is_listed():
    assert {path.stem for path in CONFIGS.glob("*.py")} == {name[0] for name in SHIPPED}


@pytest.mark.parametrize("name", SHIPPED, ids=":".join)
def test_config_docstrings_give_command_hardware_and_expectation(name):
    text = (CONFIGS / f"{name[0]}.py").read_text()
    for word in ("Command:", "Hardware:", "Expected:"):
        assert word in text


def test_paper_numbers_of_stage_1():
    c = load_config("stage1_l16")
    assert (c.vision.width, c.vision.depth, c.vision.heads, c.vision.patch) == (1024, 24, 16, 16)
    assert (c.teacher.patch, c.teacher.image_size, c.teacher.projection) == (14, 196, 768)
    assert (c.data.frames, c.vision.image_size, c.distill.mask_ratio) == (8, 224, 0.8)
    assert (c.optimizer.learning_rate, tuple(c.optimizer.betas)) == (1.5e-4, (0.9, 0.95))
    assert (c.optimizer.weight_decay, c.vision.drop_path, c.distill.layers) == (0.05, 0.2, 6)
    # 800 epochs of 1.5 M clips, 40 of them warm-up
    assert c.steps * c.data.batch_size == pytest.approx(800 * 1.5e6, rel=1e-3)
    assert c.optimizer.warmup_steps / c.steps == pytest.approx(40 / 800, rel=1e-3)


def test_paper_numbers_of_stage_2():
    c = load_config("stage2_l16")
    assert (c.text.width, c.text.depth, c.text.fusion_layers, c.text.vocab_size) == (
        1024, 24, 5, 30522,
    )  # fmt: skip
    assert (c.data.frames, c.tokenizer.length, c.align.projection) == (16, 32, 768)
    assert (c.optimizer.learning_rate, tuple(c.optimizer.betas)) == (1e-4, (0.9, 0.999))
    assert c.optimizer.min_learning_rate == pytest.approx(0.01 * c.optimizer.learning_rate)
    assert c.optimizer.weight_decay == 0.02
    assert c.steps / c.optimizer.warmup_steps == pytest.approx(15, rel=1e-3)
    align = c.align
    assert [align[k] for k in ("rec", "vtc", "vtm", "mlm")] == [1, 1, 1, 1]
    assert [align[k] for k in ("instance", "inst_vtc", "inst_vtm", "inst_mlm")] == [0.1, 1, 1, 1]
    assert (align.mask_ratio_video, align.mask_ratio_image, align.mlm_ratio) == (0.8, 0.5, 0.5)
    assert (align.own_temperature, align.alpha, align.cross_attention_depth) == (True, 0, 1)


def test_table_5_ends_in_the_papers_method():
    last = load_config("stage2_l16", "table5_trajectories")
    assert last == load_config("stage2_l16")


@pytest.mark.parametrize("part", ["stage2,umt", "stage1,umt_g"])
def test_unknown_ablation_is_refused(part):
    with pytest.raises(ValueError, match="ablation"):
        load_config("tiny", part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align.rec": -1.0}, "align.rec=-1.0 must not be negative"),
        ({"align.mask_ratio_image": 1.0}, "align.mask_ratio_image=1.0 must be in [0, 1)"),
        ({f"align.{k}": 0.0 for k in ("rec", "vtc", "vtm", "mlm", "instance")}, "weight 0"),
        ({"align.vtc": 0.0, "align.global_instances": True}, "adds pairs to align.vtc"),
        ({"align.mlm_ratio": 0.0}, "must be in (0, 1]"),
        ({"align.alpha": 2.0}, "must be in [0, 1]"),
        ({"align.crop_size": 100}, "no multiple of vision.patch"),
        ({"align.cross_attention_heads": 7}, "do not divide vision.width"),
        ({"compute.attention": "splash"}, "compute.attention"),
        ({"text.fusion_layers": 24}, "must be 1 to text.depth - 1 = 23"),
        ({"data.caption_sampling": "last"}, "none of epoch, first"),
        ({"distill.mask_score": "rnd"}, "none of cls, received, random"),
    ],
)
def test_wrong_values_of_stage_2_are_named(changes, message):
    config = load_config("stage2_l16")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match="config: ") as error:
        config_check.check(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "distil"}, "did you mean 'distill'"),
        ({"seed": 1 << 32}, "seed=4294967296 must be below 2^32"),
        ({"vision.image_size": 225}, "no multiple of its patch"),
        ({"vision.heads": 7}, "no multiple of its heads"),
        ({"teacher.image_size": 182}, "patches a side"),
        ({"distill.mask_ratio": 1.0}, "must be in [0, 1)"),
        ({"distill.layers": 25}, "more than the depth"),
        ({"data.batch_size": 0}, "data.batch_size=0 must be positive"),
        ({"optimizer.warmup_steps": 1000}, "must be below steps"),
        ({"optimizer.learning_rate": 5e-6}, "min_learning_rate=1e-05 is above the peak"),
        ({"compute.dtype": "float16"}, "none of bfloat16, float32"),
        ({"data.device_prefetch": -1}, "must not be negative"),
        ({"data.group_size": 0}, "data.group_size=0 must be positive"),
        ({"stop_at": 0}, "stop_at=0 must be positive"),
        ({"optimizer.clip_norm": -1.0}, "must be positive"),
        ({"data.canvas": (64,)}, "must be two values"),
        ({"data.canvas": (64, "a")}, "must be two values"),
        ({"distributed.step_timeout": 10**11}, "step_timeout must be 31622400 s"),
        ({"data.view_area": (0.9, 0.5)}, "rising"),
        ({"optimizer.betas": (0.9, 1.0)}, "optimizer.betas"),
        ({"mesh.fsdp": 0}, "mesh.fsdp=0 must be positive, or -1"),
        ({"vision.drop_path": 1.5}, "must be in [0, 1)"),
        ({"stage": "teacher", "tokenizer.length": 513}, "more than text.max_length"),
    ],
)
def test_wrong_values_are_named(changes, message):
    config = default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match="config: ") as error:
        config_check.check(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("suites", "twice"),
    [
        ({"evaluation.videos": "p:val", "evaluation.images": "p:val"}, "images: p:val"),
        ({"evaluation.videos": "p:a-val, q:a_val=2"}, "videos: q:a_val=2"),
    ],
)
def test_suites_of_one_split_name_are_refused(suites, twice):
    """Their metrics would have one name; what is trained on does not count."""
    config = load_config("tiny", "stage2")
    config.update_from_flattened_dict(suites | {"evaluation.every": 2, "data.videos": "o:val"})
    with pytest.raises(UserError, match=f"evaluation.{twice}: another suite is called") as error:
        config_check.check(config)
    assert "pack one of the two under another split name" in str(error.value)
    assert "\n" not in str(error.value)
    config.update_from_flattened_dict({"evaluation.videos": "p:train", "evaluation.images": "p:v"})
    config.update_from_flattened_dict({"data.videos": "o:train", "data.images": "o:train"})
    config_check.check(config)


def test_unknown_and_missing_keys_are_named():
    config = default()
    with config.unlocked():
        config.data.frame = 3
        del config.seed
    with pytest.raises(UserError) as error:
        config_check.check(config)
    assert "unknown key 'data.frame' (did you mean 'data.frames'?)" in str(error.value)
    assert "missing key 'seed'" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.data.batch_siz=3", "did you mean 'batch_size'"),
        ("--config.nothing.here=3", "config has no key nothing"),
        ("--config.data.batch_size=many", "batch_size=many"),
        ("--config.stage=distil", "did you mean 'distill'"),
        ("--confg.seed=3", "Unknown command line flag 'confg.seed'"),
        ("extra", "unexpected argument 'extra'"),
    ],
)
def test_typos_end_in_one_line_and_exit_code_2(capsys, tmp_path, override, message):
    workdir = tmp_path / "run"
    config = f"--config={CONFIGS / 'stage1_l16.py'}"
    code, text = run(capsys, "train", config, f"--workdir={workdir}", override)
    assert code == 2
    assert message in text
    assert text.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    "path", ["missing.py", "tiny.py:nothing", "tiny.py", "classify_l16.py", "classify_l16.py:/none"]
)
def test_wrong_config_file_is_one_line(capsys, tmp_path, path):
    code, text = run(capsys, "train", f"--config={CONFIGS / path}", f"--workdir={tmp_path}/run")
    assert (code, text.count("\n")) == (2, 1)
    assert Path(path.split(":")[0]).name in text


def test_missing_flags(capsys):
    assert run(capsys, "train", "--workdir=x")[0] == 2
    code, text = run(capsys, "train", f"--config={CONFIGS / 'stage1_l16.py'}")
    assert (code, "workdir" in text) == (2, True)


def loaded(**changes) -> LoadedConfig:
    config = load_config("tiny", "stage1")
    config.update_from_flattened_dict(changes)
    return LoadedConfig(config=config, file="configs/tiny.py:stage1", overrides=changes)


def test_record_and_read_back(tmp_path):
    workdir = tmp_path / "a" / "run"
    first = loaded(**{"data.batch_size": 16, "optimizer.clip_norm": 1.0})
    config_check.record(first, workdir)
    content = json.loads((workdir / "config.json").read_text())
    assert content["overrides"] == ["data.batch_size=16", "optimizer.clip_norm=1.0"]
    assert content["changed"]["data.batch_size"] == [64, 16]
    assert config_check.read(workdir) == first.config
    config_check.record(first, workdir)  # the same again: the run goes on


def test_workdir_of_another_config_is_refused(tmp_path):
    config_check.record(loaded(), tmp_path)
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    with pytest.raises(UserError, match=r"vision.depth \(4 there, 3 now\)"):
        config_check.record(loaded(**{"vision.depth": 3}), tmp_path)
    # what changes no step's result may differ
    config_check.record(loaded(**{"log.every": 3, "data.workers": 2, "stop_at": 5}), tmp_path)


def test_fields_younger_than_a_run_have_their_default(tmp_path):
    config_check.record(loaded(**{"vision.depth": 3}), tmp_path)
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["align"], content["config"]["seed"]
    path.write_text(json.dumps(content))
    assert config_check.read(tmp_path) == loaded(**{"vision.depth": 3}).config
    with pytest.raises(UserError, match=r"seed \(0 there, 1 now\)"):
        config_check.record(loaded(**{"vision.depth": 3, "seed": 1}), tmp_path)
    config_check.record(loaded(**{"vision.depth": 3}), tmp_path)
    content["config"]["algin"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="another version: unknown key 'algin'"):
        config_check.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}', "{}", "\xff"])
def test_damaged_config_json_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    with pytest.raises(UserError, match="of a run"):
        config_check.read(tmp_path)
    with pytest.raises(UserError, match="of a run"):
        config_check.record(loaded(), tmp_path)


def test_config_json_with_wrong_types_is_one_line(tmp_path):
    config_check.record(loaded(), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for key, value in (("steps", "many"), ("data", 3)):
        path.write_text(json.dumps(content | {"config": content["config"] | {key: value}}))
        with pytest.raises(UserError, match="config"):
            config_check.read(tmp_path)


def test_run_without_a_checkpoint_takes_the_new_config(tmp_path):
    config_check.record(loaded(), tmp_path)
    config_check.record(loaded(**{"vision.depth": 3}), tmp_path)
    assert config_check.read(tmp_path).vision.depth == 3


def test_a_config_that_did_not_get_written_is_no_ones_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(config_check.os, "replace", full)
        with pytest.raises(UserError, match="No space left"):
            config_check.record(loaded(), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.partial").touch()  # of a process that was killed
    config_check.record(loaded(), tmp_path)


def test_object_store_workdir_is_refused():
    with pytest.raises(UserError, match="local or mounted"):
        config_check.local_workdir("gs://bucket/run")


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty and not a run"):
        config_check.record(loaded(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        config_check.record(loaded(), tmp_path / "file" / "run")
