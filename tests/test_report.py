"""Results files and the report page, on made-up runs."""

import base64
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from made_up_runs import EVIL, SHORT, made_up_probes, made_up_retrieval, make_run, read
from PIL import Image

from instap_jax import main as command
from instap_jax.data.media import encode_jpeg
from instap_jax.errors import UserError
from instap_jax.evaluation import report_plots, report_runs
from instap_jax.evaluation.report import write_report
from instap_jax.evaluation.results import (
    Measurement,
    Protocol,
    read_results,
    write_result,
)


def test_two_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, skill=3.0)]
    page = read(write_report(runs, tmp_path / "out" / "report.html"))
    for expected in (
        "2 runs side by side",
        "400 of 400",
        "video_1k · instance captions · 4 frames · 150 texts, 150 videos",
        "student at step 400",
        "a tie counts against the model",
        "student, random initialisation at step 0",
        "measured (UTC)",
        "data.batch_size",
        "Gradient norm",
        "temperature",
    ):
        assert expected in page.text, expected
    number = read_results(runs[1])["retrieval"].measurements[2].metrics["mean_recall"]
    assert f"{number:.1f}" in page.text
    assert page.tags.count("svg") == 1 + 1 + 6 + 1  # recalls, probes, curves, temperature


def test_configurations_are_compared(tmp_path):
    first = make_run(tmp_path / "a", lines=SHORT, results=False)
    second = make_run(tmp_path / "b", lines=SHORT, results=False)
    config = json.loads((second / "config.json").read_text())
    config["changed"] = {"steps": [1000, 500], "data.batch_size": [64, 16]}
    (second / "config.json").write_text(json.dumps(config))
    text = write_report([first, second], tmp_path / "r.html").read_text()
    assert "<td>1000</td><td><b>400</b></td><td><b>500</b></td>" in text
    assert "<td>64</td><td>16</td><td>16</td>" in text
    assert "configs/tiny.py steps=400" in text


def test_page_needs_nothing_else(tmp_path):
    page = read(write_report([make_run(tmp_path / "a")], tmp_path / "r.html"))
    assert not {"script", "link", "iframe"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), value
    style = (tmp_path / "r.html").read_text()
    assert not re.search(r"url\((?!#)|@import", style)


def test_same_runs_give_the_same_plots(tmp_path):
    run = make_run(tmp_path / "a")
    first, second = (
        re.findall(r"<svg.*?</svg>", write_report([run], tmp_path / name).read_text(), re.S)
        for name in ("1.html", "2.html")
    )
    assert first == second


def test_every_text_is_escaped(tmp_path):
    run = make_run(tmp_path / "a" / "x", lines=[{"step": 1, "loss": 1.0, EVIL: 1.0}])
    config = json.loads((run / "config.json").read_text())
    config |= {"file": EVIL, "overrides": [EVIL], "changed": {EVIL: [EVIL, EVIL]}}
    config["config"] |= {"stage": EVIL, EVIL: EVIL}
    (run / "config.json").write_text(json.dumps(config))
    protocol = Protocol(
        suite=EVIL, unit=EVIL, scoring=EVIL, frames=1, weights=EVIL, step=1, notes=EVIL
    )
    measured = [Measurement(protocol=protocol, metrics={EVIL: EVIL}, counts={EVIL: 1})]
    write_result(run, "errors", measured, config={})  # not the numbers of that task: as they are
    write_result(run, "sorting", measured, config={})
    probes = Measurement(
        protocol=protocol, metrics={EVIL: made_up_probes(0, 1)[0].metrics["shape"]}, counts={}
    )
    write_result(run, "probe", [probes], config={})
    recalls = Measurement(protocol=protocol, metrics=made_up_retrieval(0, 1)[0].metrics, counts={})
    write_result(run, "retrieval", [recalls], config={})
    page = read(write_report([run], tmp_path / "r.html"))
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 15


def test_runs_of_one_name_are_told_apart_and_stages_are_not_mixed(tmp_path):
    first = make_run(tmp_path / "p" / "run", stage="teacher", results=False, lines=SHORT)
    second = make_run(tmp_path / "q" / "run", results=False, lines=SHORT)
    page = read(write_report([first, second], tmp_path / "r.html"))
    assert "p/run" in page.text and "q/run" in page.text
    assert "Stage: teacher" in page.text and "Stage: distill" in page.text
    assert "None of these runs has results" in page.text


def test_different_protocols_are_not_put_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name, results=False, lines=SHORT) for name in "ab"]
    for run, frames in zip(runs, (4, 8)):
        one = made_up_retrieval(0, 1)[1]
        protocol = Protocol(
            suite="v", unit="u", scoring="dual encoder", frames=frames, weights="w", step=1
        )
        same = Measurement(protocol=protocol, metrics=one.metrics, counts=one.counts)
        write_result(run, "retrieval", [same], config={})
    page = read(write_report(runs, tmp_path / "r.html"))
    assert "v · u · 4 frames" in page.text and "v · u · 8 frames" in page.text


def test_boxes_of_wide_tables_are_reached_by_key(tmp_path):
    page = read(write_report([make_run(tmp_path / "a")], tmp_path / "r.html"))
    found = [key for name, key, value in page.attributes if name == "div"]
    boxes = page.tags.count("table")
    assert found.count("tabindex") == found.count("role") == boxes > 5
    labels = [v for name, key, v in page.attributes if (name, key) == ("div", "aria-label")]
    assert len(set(labels)) == boxes and all(labels)


def test_the_note_on_running_means_says_the_least_window(tmp_path):
    text = read(write_report([make_run(tmp_path / "a")], tmp_path / "r.html")).text
    assert "over about 1/25 of the log, at least 5 lines (none in logs of fewer than 12)" in text
    assert report_plots.running_mean(np.arange(12.0)) is not None
    assert report_plots.running_mean(np.arange(11.0)) is None


def test_losses_of_both_kinds_and_lines_beside_those_of_validation(tmp_path):
    lines = [
        line
        for step in (1, 2)
        for line in (
            {"step": step, "loss": 3.0, "loss_video": 4.0 / step, "loss_image": 2.0},
            {"step": step, "eval/val/global/mean_recall": 50.0},
        )
    ]
    workdir = make_run(tmp_path / "a", lines=lines, results=False)
    facts = report_runs.facts(report_runs.load_runs([workdir])[0])
    assert facts["loss, first → last"].startswith("3 → 3 ")
    assert facts["loss of videos, first → last"].startswith("4 → 2 ")
    assert facts["loss of images, first → last"].startswith("2 → 2 ")
    text = read(write_report([workdir], tmp_path / "r.html")).text
    assert "Loss of video batches" in text and "eval/val/global/mean_recall" in text


def test_missing_parts_are_said(tmp_path):
    no_log = make_run(tmp_path / "no-log")
    (no_log / "metrics.jsonl").unlink()
    no_eval = make_run(tmp_path / "no-eval", results=False, lines=SHORT)
    with (no_eval / "metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "lo')
    only_eval = make_run(tmp_path / "only-eval")
    (only_eval / "metrics.jsonl").write_text("")
    (only_eval / "config.json").unlink()
    text = read(write_report([no_log, no_eval, only_eval], tmp_path / "r.html")).text
    assert "no-log : metrics.jsonl is missing or empty" in text
    assert "no-eval : metrics.jsonl: 1 unreadable lines" in text
    assert "no-eval : eval/ holds no results" in text
    assert "only-eval : config.json is missing" in text


def test_odd_logs(tmp_path):
    one = make_run(tmp_path / "one", lines=[{"step": 1, "loss": 2.0}], results=False)
    bad = [{"step": i, "loss": float("nan") if i % 3 else -i} for i in range(1, 40)]
    odd = make_run(tmp_path / "odd", lines=bad, results=False)
    read(write_report([one, odd], tmp_path / "r.html"))


def test_figures_of_a_run(tmp_path):
    lines = [
        {"step": 1, "step_seconds": 9.0, "data_wait_seconds": 8.0, "examples_per_second": 1.0},
        {"step": 11, "step_seconds": 0.5, "data_wait_seconds": 0.1, "examples_per_second": 32.0},
        {
            "step": 31,
            "step_seconds": 1.0,
            "data_wait_seconds": 0.0,
            "examples_per_second": 16.0,
            "faults/NO_FRAMES": 3.0,
        },
    ]
    run = report_runs.load_runs([make_run(tmp_path / "a", lines=lines)])[0]
    facts = report_runs.facts(run)
    assert facts["training time"] == "34.0 s"  # 1 x 9 + 10 x 0.5 + 20 x 1
    assert facts["data wait"] == "4.0 % of step time"  # (10 x 0.1) / 25, compilation left out
    assert facts["samples/s"] == "24.0 (median)"
    assert facts["unreadable samples"] == "3 NO_FRAMES"


def test_samples_are_drawn(tmp_path):
    run, media = make_run(tmp_path / "a", results=False, lines=SHORT), tmp_path / "media"
    media.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(9):
        if i:  # the first one's media is missing
            frame = rng.integers(0, 255, (48, 64, 3)).astype(np.uint8)
            (media / f"{i}.jpg").write_bytes(encode_jpeg(frame))
        rows.append(
            {
                "id": f"s{i}",
                "media": f"{i}.jpg",
                "kind": "image",
                "split": ("train", "img_1k")[i % 2] if i else "lost",
                "caption": f"Scene {i} {EVIL}",
                "instances": [{"id": 0, "caption": "A box.", "boxes": [[0, 5, 5, 30, 30]]}],
            }
        )
    annotations = tmp_path / "annotations.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = write_report([run], tmp_path / "r.html", annotations=annotations, media=media)
    page = read(out)
    pictures = [value for name, key, value in page.attributes if (name, key) == ("img", "src")]
    assert len(pictures) == 4  # two of each readable split
    for picture in pictures:
        data = base64.b64decode(picture.removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(data)).width > 300
    assert "s0: 0.jpg: no such file" in page.text
    with pytest.raises(UserError, match="belong together"):
        write_report([run], tmp_path / "r.html", annotations=annotations)
    with pytest.raises(UserError, match="is not a directory"):
        write_report([run], tmp_path / "r.html", annotations=annotations, media=tmp_path / "no")


def test_faults_of_the_input(tmp_path, capsys):
    run, out = make_run(tmp_path / "a"), tmp_path / "r.html"
    (tmp_path / "empty").mkdir()
    for workdirs, message in (
        ("nowhere", "nowhere: no such directory"),
        (tmp_path / "empty", "empty holds no run"),
        (f"{run},{run}", "named twice"),
    ):
        assert command.main(["report", f"--workdirs={workdirs}", f"--out={out}"]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    assert command.main(["report"]) == 2
    with pytest.raises(UserError, match="is a directory"):
        write_report([run], tmp_path)
    for name, text, message in (
        ("config.json", "{", "config.json is not readable JSON"),
        ("config.json", "[]", "has no object 'config'"),
        ("metrics.jsonl", '{"loss": 1}\n', "not a metrics file"),
        ("eval/probe.json", '{"task": "probe"}', "probe.json is not a results file"),
        ("eval/retrieval.json", "[]", "retrieval.json is not a results file"),
    ):
        before = (run / name).read_text()
        (run / name).write_text(text)
        with pytest.raises(UserError, match=message):
            write_report([run], out)
        (run / name).write_text(before)
    assert not list(tmp_path.glob("**/*.partial")) and not out.exists()


def test_command_prints_where_the_page_is(tmp_path, capsys):
    run, out = make_run(tmp_path / "a", lines=SHORT), tmp_path / "r.html"
    assert command.main(["report", f"--workdirs={run}", f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out


def test_running_mean_against_a_plain_loop():
    rng = np.random.default_rng(0)
    values = rng.normal(size=130)
    values[[3, 50]] = np.nan, np.inf
    got = report_plots.running_mean(values)
    for i in range(130):
        reach = min(2, i, 129 - i)
        window = values[i - reach : i + reach + 1]
        expected = np.mean(window[np.isfinite(window)]) if reach else np.nan
        assert got[i] == pytest.approx(expected, nan_ok=True)
    assert report_plots.running_mean(values[:5]) is None


def test_decimation_keeps_the_extremes():
    steps = np.arange(50_000)
    values = np.sin(steps / 500)
    values[31_337] = 99
    few, kept = report_plots._decimated(steps, values)
    assert len(few) <= 600 and kept.max() == 99 and (np.diff(few) > 0).all()
    assert few[0] == 0 and few[-1] == 49_999


def test_report_does_not_start_jax():
    code = "import sys, instap_jax.evaluation.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
