"""Tables over seeds: their numbers, what is run and what is not, and one run for real."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from embedded import make_embedded
from made_up_runs import made_up_retrieval
from tiny import load_config

from instap_jax import config_check, main
from instap_jax.commands import ablate
from instap_jax.config_check import LoadedConfig
from instap_jax.evaluation.results import write_result
from instap_jax.study import plot, runner, runs, tables
from instap_jax.study.statistics import T_QUANTILES, estimate, paired_difference
from instap_jax.study.summary import Column, Line, Summary, markdown
from instap_jax.study.tables import TABLES, Row, Table
from instap_jax.train.kinds import kind_of_step
from instap_jax.train.stop import StopRequest

FAKE = Path(__file__).parent / "fake_instap.py"
CONFIG = str(Path(__file__).parent.parent / "configs" / "tiny.py")

# --- numbers ------------------------------------------------------------------------------------


def test_the_quantiles_leave_95_percent_inside():
    """By integrating Student's density, written from its formula."""
    for freedom, quantile in enumerate(T_QUANTILES, start=1):
        x = np.linspace(-quantile, quantile, 40_001)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        density = (
            scale / math.sqrt(freedom * math.pi) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        )
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-5), freedom


def test_interval_of_a_mean():
    values = [71.0, 74.5, 69.5, 73.0]
    mean = sum(values) / 4
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 3)
    found = estimate(values)
    assert (found.mean, found.count) == (pytest.approx(mean), 4)
    assert found.half == pytest.approx(3.18245 * deviation / 2, rel=1e-4)
    assert estimate([5.0]).half is None and not estimate([5.0]).excludes_zero()
    assert estimate([]) is None
    assert estimate(range(40)).half > 0  # beyond the table


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than the rows do, and only common seeds count."""
    theirs = {0: 20.0, 1: 60.0, 2: 90.0, 7: 0.0}
    ours = {2: 93.0, 0: 22.0, 1: 62.5, 9: 500.0}
    found = paired_difference(ours, theirs)
    assert (found.mean, found.count) == (pytest.approx(2.5), 3)
    assert found.half == pytest.approx(4.30265 * 0.5 / math.sqrt(3), rel=1e-4)
    assert found.excludes_zero()
    assert not estimate([ours[s] for s in (0, 1, 2)]).excludes_zero()
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("file", "part"), [("tiny", ("stage2",)), ("stage2_l16", ())])
def test_every_row_fits_the_configurations_it_is_for(name, file, part):
    table = TABLES[name]
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names)
    assert {table.rival(row) for row in table.rows} - {""} <= set(names)
    assert any(not table.rival(row) for row in table.rows)
    loaded = LoadedConfig(config=load_config(file, *part), file=file, overrides={})
    steps = loaded.config.steps
    for row in table.rows:
        run = runs.plan_run(loaded, row, 3, Path("out"), steps=steps, evaluation=None)
        assert run.config.seed == 3 and run.name == f"{row.name}/seed3"
        if row.ablation and not row.overrides:
            named = load_config(file, ",".join((*part, row.ablation)))
            named.seed = 3
            assert run.config.to_dict() == named.to_dict()
        elif not row.changes():
            assert row.name == tables.REFERENCE


def test_a_row_comes_on_top_of_what_is_given_for_all_rows():
    config = load_config("tiny", "stage2")
    config.align.instance = 0.3
    loaded = LoadedConfig(config=config, file="tiny.py", overrides={"align.instance": 0.3})
    plan = {"steps": config.steps, "evaluation": None}
    for row, weight in zip(TABLES["table4"].rows, (0.0, 0.3)):
        run = runs.plan_run(loaded, row, 0, Path("out"), **plan)
        assert run.config.align.instance == weight
        assert f"--config.align.instance={weight}" in run.train_command()
        assert sum("align.instance" in flag for flag in run.train_command()) == 1


# --- what is run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return make_embedded(
        tmp_path_factory.mktemp("packed"), "--train_videos=16", "--train_images=16",
        "--suite_size=8", "--val_size=8",
    )  # fmt: skip


class Desk:
    """Gives `instap ablate` its flags, and knows what it has run."""

    def __init__(self, packed: Path, out: Path):
        self.out, self._packed, self.log = out, packed, out.parent / "calls"
        self.data = f"{packed}/packed:train"
        self._read = 0

    def flags(self, table: str, *more: str) -> list[str]:
        suites = f"--videos={self._packed}/packed:video_1k"
        config = f"--config={CONFIG}:stage2"
        data = f"--config.data.videos={self.data}"
        return ["ablate", config, f"--table={table}", f"--out={self.out}", suites, data, *more]

    def __call__(self, table: str, *more: str) -> int:
        return main.main(self.flags(table, "--config.steps=80", *more))

    def with_images(self, fraction: float) -> list[str]:
        return [f"--config.data.images={self.data}", f"--config.data.image_fraction={fraction}"]

    def calls(self) -> list[str]:
        """'VERB ROW/seedN' of what was run since the last time, sorted."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        fresh, self._read = lines[self._read :], len(lines)
        return sorted(line.rsplit(" ", 1)[0] for line in fresh)

    def table(self, name: str) -> dict:
        return json.loads((self.out / f"{name}.json").read_text())


@pytest.fixture
def desk(packed, tmp_path, monkeypatch) -> Desk:
    made = Desk(packed, tmp_path / "study")
    monkeypatch.setenv("FAKE_LOG", str(made.log))
    monkeypatch.setattr(runs, "_instap", lambda *args: [sys.executable, str(FAKE), *args])
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.02)
    return made


def both(*places: str) -> list[str]:
    return sorted(f"{verb} {place}" for verb in ("train", "evaluate") for place in places)


def test_a_table_its_rerun_its_growth_and_a_table_that_shares_rows(desk, capsys):
    assert desk("table4", "--seeds=0,1") == 0
    assert desk.calls() == both("umt_g/seed0", "instap/seed0", "umt_g/seed1", "instap/seed1")
    rows = desk.table("table4")["rows"]
    assert [row["name"] for row in rows] == ["umt_g", "instap"]
    instance = next(m for m in rows[1]["metrics"] if m["unit"] == "instance captions")
    assert instance["values"] == {"0": 50.0, "1": 57.0}
    assert instance["mean"]["mean"] == 53.5
    assert instance["mean"]["half"] == pytest.approx(12.7062 * 3.5, rel=1e-5)
    assert instance["difference"] == {"mean": 20.0, "half": 0.0, "count": 2}
    text = (desk.out / "table4.md").read_text()
    assert "| with L_inst | `instap` | 2/2 | 80 | 0.400 | 53.5 ± 44.5 |" in text
    assert "| with L_inst | without L_inst | **+20.0 ± 0.0** |" in text
    # Instances are re-ranked in one row alone; all of the other's seeds are done.
    assert "| without L_inst | `umt_g` | 2/2 | 80 | 0.200 | — |" in text
    assert "| with L_inst | without L_inst | — |" in text and "not yet run" not in text
    assert text in capsys.readouterr().out
    assert (desk.out / "table4.png").stat().st_size > 10_000

    assert desk("table4", "--seeds=0,1") == 0
    assert desk.calls() == []
    assert desk("table1", "--seeds=0") == 0
    assert desk.calls() == both("umt_gi/seed0")
    assert "One seed: no interval." in (desk.out / "table1.md").read_text()
    # Other suites: measured again, not trained again.
    images = f"--images={desk._packed}/packed:img_1k"
    assert desk("table4", "--seeds=1", images) == 0
    assert desk.calls() == ["evaluate instap/seed1", "evaluate umt_g/seed1"]
    assert "img_1k" in (desk.out / "table4.md").read_text()


def test_results_that_were_measured_otherwise_by_hand_are_not_taken(desk):
    assert desk("table4", "--seeds=0") == 0
    table = desk.table("table4")
    desk.calls()
    measured = desk.out / "umt_g" / "seed0" / "eval" / "retrieval.json"
    # As `instap evaluate --frames=2` leaves it.
    other = measured.read_text().replace('"frames": 1', '"frames": 2').replace("30.0", "99.0")
    measured.write_text(other)
    assert desk("table4", "--seeds=0") == 0
    assert desk.calls() == ["evaluate umt_g/seed0"]
    assert desk.table("table4") == table


def measured_run(tmp_path: Path, *, last: int = 400) -> runs.Run:
    """A run with results of step 400."""
    write_result(tmp_path, "retrieval", made_up_retrieval(0, 1), config={})
    names = ("videos", "images", "probe_videos", "probe_images")
    evaluation = runs.Evaluation(task="retrieval", **dict.fromkeys(names, ""))
    return runs.Run(
        name="a/seed0", row="a", seed=0, workdir=tmp_path, file="", overrides={},
        config=SimpleNamespace(steps=last, stop_at=None), evaluation=evaluation,
    )  # fmt: skip


def test_what_counts_as_evaluated(tmp_path):
    run = measured_run(tmp_path)
    results, marker = tmp_path / "eval" / "retrieval.json", tmp_path / "evaluated.json"
    right = results.read_text()
    assert not run.evaluated()
    run.mark_evaluated()
    assert run.evaluated()
    other_flags = dataclasses.replace(run.evaluation, videos="d:val")
    assert not dataclasses.replace(run, evaluation=other_flags).evaluated()
    results.write_text(right.replace("dual encoder", "dual softmax"))
    assert not run.evaluated()

    plain = json.loads(marker.read_text())
    assert plain.pop("sha256").keys() == {"retrieval"}
    marker.write_text(json.dumps(plain))  # as studies of before have it
    assert run.evaluated()
    results.write_text(right.replace('"step": 400', '"step": 300', 1))  # --checkpoint=best
    assert not run.evaluated()
    results.write_text(right)
    assert run.evaluated()
    for path in (results, marker):
        before = path.read_text()
        for damaged in ("", "{", "3", "[3]", "\xff"):
            path.write_text(damaged, encoding="latin-1")
            assert not run.evaluated()
        path.unlink()
        assert not run.evaluated()
        path.write_text(before)
    assert run.evaluated()


def test_weights_of_another_step_are_refused_in_one_line(tmp_path):
    """A directory whose run has gone beyond the step at which it is now asked to end."""
    run = measured_run(tmp_path, last=200)
    pool = runner.Runner(jobs=1, logs=tmp_path, lock=0, stop=StopRequest())
    active = runner._Active(run=run, slot=0, phase="evaluate", process=None, step=0)
    assert pool._fault(active, 0) == (
        f"FAILED a/seed0 (evaluate): {tmp_path}/eval/retrieval.json measures step 400, and the run "
        "ends at step 200; use another --out"
    )
    assert not (tmp_path / "evaluated.json").exists()


def test_the_picture_tells_what_is_not_there_by_design(tmp_path, monkeypatch):
    dual, ranked = (
        Column(unit="instance captions", scoring=scoring, suite="val", metric="mean_recall")
        for scoring in ("dual encoder", "re-ranked")
    )
    line = functools.partial(Line, rival="", steps=1, step_seconds=None, differences={})
    both_seeds = {0: 30.0, 1: 31.0}
    summary = Summary(
        title="", columns=(dual, ranked), seeds=(0, 1), protocols=(), notes=(),
        lines=(
            line(name="a", label="a", seeds=(0, 1), values={dual: both_seeds, ranked: both_seeds}),
            line(name="b", label="b", seeds=(0, 1), values={dual: both_seeds}),
            line(name="c", label="c", seeds=(0,), values={dual: {0: 30.0}}),
            line(name="d", label="d", seeds=(), values={}),
        ),
    )  # fmt: skip
    kept, real = [], plot.Figure.savefig
    monkeypatch.setattr(
        plot.Figure, "savefig", lambda figure, *a, **k: (kept.append(figure), real(figure, *a, **k))
    )
    plot.plot(summary, tmp_path / "a.png")
    words = [[(t.get_position()[1], t.get_text()) for t in axis.texts] for axis in kept[0].axes]
    assert words == [
        [(3, "not yet run")],
        [(1, "—"), (2, "not yet run"), (3, "not yet run")],
    ]
    # Of a difference: the first row has its number, the third may get one, the second never will.
    first, second, third, _ = summary.lines
    assert summary.gap([first, third], [ranked]) == "not yet run"
    assert summary.gap([first, second], [ranked]) == "—"


@pytest.mark.parametrize(
    ("metric", "title", "ends"),
    [
        ("t2v/R@1", "t2v/R@1 (%)", (0, 100)),
        ("colour/accuracy", "colour/accuracy (%)", (0, 100)),
        ("mean IoU", "mean IoU (%)", (0, 100)),
        ("top-5", "top-5 (%)", (0, 100)),
        ("t2v/median_rank", "t2v/median rank", (60 - 12.7062 * 58, 60 + 12.7062 * 58)),
        ("v2t/queries", "v2t/queries", (60 - 12.7062 * 58, 60 + 12.7062 * 58)),
    ],
)
def test_ranks_and_counts_are_no_percentages(tmp_path, monkeypatch, metric, title, ends):
    column = Column(unit="global captions", scoring="dual encoder", suite="val", metric=metric)
    line = Line(name="a", label="a", rival="", steps=1, step_seconds=None, differences={},
                seeds=(0, 1), values={column: {0: 2.0, 1: 118.0}})  # fmt: skip
    summary = Summary(
        title="", columns=(column,), seeds=(0, 1), protocols=(), notes=(), lines=(line,)
    )
    assert f"## global captions: {title}, dual encoder\n" in markdown(summary)
    kept = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, path, **_: kept.append(figure))
    monkeypatch.setattr(plot.os, "replace", lambda *_: None)
    plot.plot(summary, tmp_path / "a.png")
    (axis,) = kept[0].axes
    assert axis.get_xlabel() == title
    assert tuple(axis.lines[0].get_xdata()) == pytest.approx(ends, rel=1e-4)


def test_what_a_difference_is_printed_as():
    """A row of three seeds against those that its rival has."""
    column = Column(unit="u", scoring="s", suite="val", metric="mean_recall")
    ours = {0: 50.0, 1: 60.0, 2: 70.0}
    line = functools.partial(Line, steps=1, step_seconds=None)
    for theirs, words in (
        ({0: 50.04, 1: 60.05, 2: 70.04}, "| b | a | +0.0 ± 0.0 |"),
        ({0: 49.0, 1: 59.0, 2: 69.0}, "| b | a | **+1.0 ± 0.0** |"),
        ({0: 49.0, 1: 59.0}, "| b | a | **+1.0 ± 0.0** (2 pairs) |"),
        ({2: 69.0}, "| b | a | +1.0 (1 pair) |"),
    ):
        lines = (
            line(name="a", label="a", rival="", seeds=tuple(theirs), values={column: theirs},
                 differences={}),
            line(name="b", label="b", rival="a", seeds=tuple(ours), values={column: ours},
                 differences={column: paired_difference(ours, theirs)}),
        )  # fmt: skip
        summary = Summary(
            title="", columns=(column,), seeds=(0, 1, 2), protocols=(), notes=(), lines=lines
        )
        assert words in markdown(summary)


def test_a_run_that_fails_is_named_and_the_others_go_on(desk, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "umt_g/seed0")
    assert desk("table4", "--seeds=0,1") == 2
    assert desk.calls() == sorted(
        [*both("instap/seed0", "umt_g/seed1", "instap/seed1"), "train umt_g/seed0"]
    )
    err = capsys.readouterr().err
    log = desk.out / "logs" / "umt_g-seed0.log"
    assert f"FAILED umt_g/seed0 (train, exit 2): instap train: the data are gone; see {log}" in err
    assert err.endswith(
        "instap ablate: 1 of 4 runs failed: umt_g/seed0; the same command tries them again\n"
    )
    row = desk.table("table4")["rows"][0]
    assert row["seeds"] == [1]
    assert row["metrics"][0]["mean"]["half"] is None
    assert desk.table("table4")["rows"][1]["metrics"][0]["difference"]["count"] == 1
    text = (desk.out / "table4.md").read_text()
    assert "| without L_inst | `umt_g` | 1/2 | 80 | 0.200 | not yet run |" in text
    assert "| with L_inst | without L_inst | not yet run |" in text and "—" not in text
    monkeypatch.delenv("FAKE_FAIL")
    assert desk("table4", "--seeds=0,1") == 0
    assert desk.calls() == both("umt_g/seed0")


def test_an_interrupted_run_is_finished_by_the_same_command(desk, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_WAIT", "instap/seed0")

    def interrupt():
        while not (desk.out / "instap" / "seed0" / "metrics.jsonl").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert desk("table4", "--seeds=0") == 130
    thread.join()
    assert desk.calls() == sorted([*both("umt_g/seed0"), "train instap/seed0"])
    kept = [path.name for path in (desk.out / "instap" / "seed0" / "checkpoints").iterdir()]
    assert kept == ["1"]  # it saved the step it was in, which does not make it done
    monkeypatch.delenv("FAKE_WAIT")
    assert desk("table4", "--seeds=0") == 0
    assert desk.calls() == both("instap/seed0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--config.optimizer.learning_rate=0.5", "optimizer.learning_rate (0.001 there, 0.5 now)"),
        ("--table=tabel4", "tables are table1"),
        ("--videos=/nowhere:video_1k", "'/nowhere'"),
        ("--videos=", "no suite"),
        ("--images=/other:video-1k", "/other:video_1k: another suite is called 'video_1k'"),
        ("--seeds=0,x", "--seeds=0,x"),
        ("--task=retrieve", "--task=retrieve: tasks are retrieval"),
        ("--jobs=100000", "--jobs=100000: there are"),
        ("--metrics=recall", "--metrics=recall: task retrieval measures t2v/R@1"),
        ("--metrics=", "--metrics is empty"),
        ("--config.data.videos=", "both empty: no data"),
        ("--config.align.vtc=0.0", "row umt_g: config: align: every term has weight 0"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_and_nothing_is_run(desk, capsys, change, words):
    workdir = desk.out / "umt_g" / "seed0"
    (workdir / "checkpoints" / "80").mkdir(parents=True)
    config = load_config("tiny", "stage2,umt_g")
    config.steps, config.data.videos = 80, desk.data
    plain = {"config": json.loads(json.dumps(config.to_dict()))}
    (workdir / "config.json").write_text(json.dumps(plain))
    assert desk("table4", "--seeds=0", change) == 2
    err = capsys.readouterr().err
    assert err.startswith("instap ablate: ") and err.count("\n") == 1
    assert words in err
    assert desk.calls() == []


def test_what_probes_are_fitted_on_may_have_one_split_name(packed):
    given = dict.fromkeys(("probe_videos", "probe_images"), f"{packed}/packed:train")
    given |= {"videos": f"{packed}/packed:video_1k", "images": "", "task": ["retrieval", "probe"]}
    values = {name: SimpleNamespace(value=value) for name, value in given.items()}
    assert ablate._evaluation(values).probe_images == given["probe_images"]


def test_a_second_study_in_the_directory_is_refused(desk, capsys):
    with runner.locked(desk.out):
        assert desk("table4", "--seeds=0") == 2
    assert "another `instap ablate`" in capsys.readouterr().err
    assert desk.calls() == []


def test_a_configuration_edited_meanwhile_is_noticed(desk, capsys, monkeypatch):
    real = runs.Run.train_command
    monkeypatch.setattr(
        runs.Run, "train_command", lambda run: [*real(run), "--config.data.frames=2"]
    )
    assert desk("table4", "--seeds=0") == 2
    assert "data.frames (2 there, 4 now)" in capsys.readouterr().err
    assert not any(call.startswith("evaluate") for call in desk.calls())


def test_equal_time_trains_what_is_cheap_for_longer(desk):
    """The median of each kind of step, weighted; compiling steps do not count."""
    flags = ["--seeds=0", "--equal=time", *desk.with_images(0.2)]
    assert desk("table4", *flags) == 0
    calls = desk.calls()
    assert [call for call in calls if "calibration" in call] == [
        "train calibration/instap",
        "train calibration/umt_g",
    ]
    assert "train umt_g@160/seed0" in calls and "train instap/seed0" in calls
    table = desk.table("table4-time")
    assert [row["steps"] for row in table["rows"]] == [160, 80]
    assert "umt_g 0.180, instap 0.360" in table["notes"][0]
    assert desk("table4", *flags) == 0
    assert desk.calls() == []


@pytest.mark.parametrize(
    ("fraction", "more", "words"),
    [
        (0.1, (), "40 steps with config.data.image_fraction=0.1 hold 4 of image batches"),
        (0.98, (), "hold 1 of video batches, and timing them takes 5; use --equal=steps"),
        (0.5, ("--config.stop_at=60",), "leave config.stop_at out"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_any_training(desk, capsys, fraction, more, words):
    assert desk("table4", "--seeds=0", "--equal=time", *desk.with_images(fraction), *more) == 2
    assert words in capsys.readouterr().err
    assert desk.calls() == []


def test_a_kind_counts_as_often_as_it_comes(tmp_path):
    """Not as often as 40 steps hold it: of those 5 are of images, of all steps 0.13."""
    config = load_config("tiny", "stage2")
    config.data.update(videos="d:train", images="d:train", image_fraction=0.13)
    write_steps(tmp_path, config, video=1.0, image=0.1)
    found = runs.calibrated_seconds(SimpleNamespace(workdir=tmp_path, config=config))
    assert found == pytest.approx(0.87 * 1.0 + 0.13 * 0.1)


def write_steps(workdir, config, **seconds):
    kinds = [kind_of_step(config, step) for step in range(runs.CALIBRATION_STEPS)]
    lines = [
        {"step": step, f"kind_{kind}": 1.0, "step_seconds": seconds[kind]}
        for step, kind in enumerate(kinds, start=1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lines_of_validation_are_no_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "kind_video": 1.0, "step_seconds": 0.5}) + "\n"
            + json.dumps({"step": step, "val_video/global/mean_recall": 3.0}) + "\n"
            for step in range(1, 6)
        )
    )  # fmt: skip
    config = load_config("tiny", "stage2")
    config.data.videos = "d:train"
    run = SimpleNamespace(workdir=tmp_path, config=config)
    assert runs.calibrated_seconds(run) == runs.step_seconds(run) == 0.5


def test_a_second_signal_kills_what_runs(tmp_path):
    stop = StopRequest()
    pool = runner.Runner(jobs=1, logs=tmp_path, lock=0, stop=stop)
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    active = runner._Active(run=None, slot=0, phase="train", process=process, step=0)
    pool._active.append(active)
    stop.at_once()
    assert process.wait(timeout=20) == -signal.SIGKILL


def test_two_jobs_have_a_share_of_the_cores_each(desk):
    if len(os.sched_getaffinity(0)) < 2:
        assert desk("table4", "--seeds=0", "--jobs=2") == 2  # there are none to share
        return
    assert desk("table4", "--seeds=0", "--jobs=2") == 0
    shares = {line.rsplit(" ", 1)[1] for line in desk.log.read_text().splitlines()}
    cores = [set(share.split(",")) for share in shares]
    assert len(cores) == 2 and not cores[0] & cores[1]


@pytest.mark.parametrize("given", [None, "glibc.malloc.arena_max=1"])
def test_runs_allocate_in_huge_pages_unless_told_otherwise(desk, monkeypatch, given):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert desk("table4", "--seeds=0") == 0
    found = desk.log.with_suffix(".tunables").read_text()
    assert found == (given or "glibc.malloc.hugetlb=1")


# --- for real -----------------------------------------------------------------------------------


def test_a_run_of_two_steps_for_real(packed, tmp_path, monkeypatch):
    """The commands as they are, in their own processes."""
    tokenizer = f"{packed}/tokenizer.model"
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    one = Table(title="one", rows=(Row(label="g", ablation="umt_g"),), reference="umt_g")
    monkeypatch.setitem(TABLES, "one", one)
    overrides = {
        "data.images": f"{packed}/packed:train", "data.batch_size": 4, "data.canvas": "(24, 32)",
        "tokenizer.path": tokenizer, "tokenizer.length": 8,
        "vision.width": 16, "vision.depth": 1, "vision.heads": 2, "vision.image_size": 16,
        "text.width": 16, "text.depth": 2, "text.heads": 2,
        "align.crop_size": 8, "align.projection": 8,
        "steps": 2, "optimizer.warmup_steps": 1, "log.every": 1, "log.tensorboard": False,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    assert main.main([
        "ablate", f"--config={CONFIG}:stage2", "--table=one", "--seeds=5",
        f"--out={tmp_path}/out", f"--images={packed}/packed:img_1k", *flags,
    ]) == 0  # fmt: skip
    row = json.loads((tmp_path / "out" / "one.json").read_text())["rows"][0]
    assert row["seeds"] == [5] and row["steps"] == 2
    assert {m["unit"] for m in row["metrics"]} == {"global captions", "instance captions"}
    assert all(0 <= m["mean"]["mean"] <= 100 for m in row["metrics"])
    stored = config_check.read(tmp_path / "out" / "umt_g" / "seed5")
    assert stored.seed == 5 and stored.align.instance == 0 and stored.vision.width == 16
