"""Results files and the report page, on made-up runs."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from ranked import retrieval_metrics

from instap_jax import main as command
from instap_jax.data.media import encode_jpeg
from instap_jax.errors import UserError
from instap_jax.evaluation import gallery, report_plots, report_runs
from instap_jax.evaluation.errors import CLASSES, PAPER_SHARES
from instap_jax.evaluation.probe import ProbeResult
from instap_jax.evaluation.report import write_report
from instap_jax.evaluation.results import (
    Measurement,
    Protocol,
    config_hash,
    format_table,
    read_results,
    write_result,
)

SHORT = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": 1.5}]  # where curves are not the point
EVIL = """<script x='"'>alert('&')</script>"""


def make_lines(seed, steps=400, every=5, **extra):
    """A log that looks like a training run's."""
    rng = np.random.default_rng(seed)
    for step in [1, *range(every, steps + 1, every)]:
        decay = math.exp(-step / (0.3 * steps))
        seconds = 0.4 * (1 + 0.1 * rng.random()) + (6.0 if step == 1 else 0)
        yield {
            "step": step,
            "time": 1.7e9 + 0.42 * step,
            "loss": 0.4 + 1.5 * decay + 0.08 * rng.normal(),
            "learning_rate": 1.5e-4 * min(step / 40, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "grad_norm": math.exp(2 * decay - 1 + 0.4 * rng.normal()),
            "param_norm": 80 + 4 * (1 - decay),
            "examples_per_second": 16 / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": 0.012 * rng.random() * seconds,
            "compute_seconds": 0.99 * seconds,
            "temperature": 0.07 - 0.02 * (1 - decay),
            **extra,
        }


def make_run(workdir, *, seed=0, stage="distill", skill=2.0, lines=None, results=True):
    """Writes what a trained and evaluated run leaves behind (but its checkpoints)."""
    workdir.mkdir(parents=True)
    config = {"stage": stage, "steps": 400, "data": {"batch_size": 16, "frames": 4}}
    changed = {"steps": [1000, 400], "data.batch_size": [64, 16]}
    (workdir / "config.json").write_text(
        json.dumps(
            {
                "config": config,
                "changed": changed,
                "file": "configs/tiny.py",
                "overrides": ["steps=400"],
            }
        )
    )
    logged = list(make_lines(seed)) if lines is None else lines
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    if results:
        write_result(workdir, "retrieval", made_up_retrieval(seed, skill), config=config)
        write_result(workdir, "probe", made_up_probes(seed, skill), config=config)
    return workdir


def made_up_retrieval(seed, skill):
    rng = np.random.default_rng(seed)
    measurements = []
    for suite, unit, frames, count, gain in (
        ("img_1k", "global captions", 1, 64, 1.0),
        ("video_1k", "global captions", 4, 48, 0.8),
        ("video_1k", "instance captions", 4, 150, 0.4),
    ):
        scores = rng.normal(size=(count, count)) + skill * gain * np.eye(count)
        measurements.append(
            Measurement(
                protocol=Protocol(
                    suite=suite,
                    unit=unit,
                    scoring="dual encoder",
                    frames=frames,
                    weights="student",
                    step=400,
                ),
                metrics=retrieval_metrics(scores, [[i] for i in range(count)]),
                counts={"texts": count, "videos": count},
            )
        )
    return measurements


def made_up_probes(seed, skill):
    rng = np.random.default_rng(seed)
    measurements = []
    for weights, step, gain in (
        ("student", 400, 15 * skill),
        ("student, random initialisation", 0, 5),
    ):
        metrics = {}
        for attribute, chance in (
            ("shape", 22.0),
            ("colour", 14.0),
            ("texture", 31.0),
            ("direction", 26.0),
        ):
            accuracy = min(97.0, chance + gain + 6 * rng.random())
            metrics[attribute] = ProbeResult(
                accuracy=accuracy,
                low=accuracy - 4,
                high=min(accuracy + 4, 100.0),
                chance=chance,
                classes=6,
                train_examples=900,
                test_examples=300,
            )
        protocol = Protocol(
            suite="img_1k", unit="instances", scoring="20-NN", frames=1, weights=weights, step=step
        )
        counts = {"training instances": 900, "test instances": 300}
        measurements.append(Measurement(protocol=protocol, metrics=metrics, counts=counts))
    return measurements


class Page(HTMLParser):
    """Checks that every element is closed in order; collects text, tags and attributes."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, *pair) for pair in attributes]
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, *pair) for pair in attributes]

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


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


def protocol_of(suite="video_1k", scoring="dual encoder", **changes):
    fields = {"unit": "things", "frames": 4, "weights": "aligned", "step": 250} | changes
    return Protocol(suite=suite, scoring=scoring, **fields)


def write_errors(run, *, seed=0):
    shares = np.random.default_rng(seed).multinomial(80, [0.1, 0.2, 0.3, 0.4])
    one = {
        name: {"count": int(n), "share": 100 * n / 80, "holds": int(n), "chance": 12.5}
        for name, n in zip(CLASSES, shares)
    }
    metrics = dict.fromkeys(("t2v", "v2t"), {"wrong": 80, "queries": 90} | one)
    measured = [Measurement(protocol=protocol_of(), metrics=metrics, counts={"instances": 90})]
    write_result(run, "errors", measured, config={})


def write_attention(run, mass, *, siblings=True):
    metrics = {
        "mass": mass, "mass_margin": 0.9, "area": 4.5, "hit": 20.0, "hit_margin": 2.0,
        "hit_chance": 5.25, "unsmoothed": {"mass": mass + 1, "hit": 30.0},
    }  # fmt: skip
    if siblings:
        metrics |= {"sibling_mass": 7.25, "selectivity": mass - 7.25, "selectivity_margin": 0.4}
    measured = [
        Measurement(protocol=protocol_of(scoring=kind), metrics=metrics, counts={"instances": 90})
        for kind in ("Grad-CAM", "match")
    ]
    write_result(run, "attention", measured, config={})


def jpeg(shade, size=(8, 12)):
    return encode_jpeg(np.full((*size, 3), shade, np.uint8))


def write_case(run, task, shade, **changes):
    fields = {
        "suite": "video_1k", "group": "weak_evidence", "key": "t2v/3",
        "texts": {"direction": "T→V", "first": "A star.", "second": "A ring.", "why": "too small"},
        "pictures": {"the right instance": jpeg(shade), "retrieved instead": jpeg(shade)},
    }  # fmt: skip
    gallery.write_cases(run, task, [gallery.Case(**(fields | changes))])


def pictures_of(page):
    return [
        base64.b64decode(value.removeprefix("data:image/jpeg;base64,"))
        for name, key, value in page.attributes
        if (name, key) == ("img", "src")
    ]


def test_errors_stand_beside_the_paper(tmp_path):
    runs = [make_run(tmp_path / name, lines=SHORT, results=False) for name in "ab"]
    for seed, run in enumerate(runs):
        write_errors(run, seed=seed)
    write_case(runs[1], "errors", 40)
    text = (out := write_report(runs, tmp_path / "r.html")).read_text()
    page = read(out)
    for share in PAPER_SHARES.values():
        assert f"{share:.1f} %" in page.text
    assert page.text.count("80 of 90") == 4 and "too small" in page.text
    assert text.count("<pattern") >= 1  # the paper's bars are hatched
    assert set(re.findall(r"url\((#[^)]*)\)", text)) <= {
        f"#{name}" for name in re.findall(r'id="([^"]*)"', text)
    }
    assert pictures_of(page) == [jpeg(40)] * 2
    assert "Cases of video_1k (1)" in page.text and "Weak visual evidence" in page.text


def test_attention_of_runs_stands_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name, lines=SHORT, results=False) for name in "abc"]
    write_attention(runs[0], 13.25)
    write_attention(runs[1], 8.75)
    write_attention(runs[2], 6.5, siblings=False)
    for shade, run in enumerate(runs[:2]):
        write_case(
            run, "attention", 10 * shade, group="overlay", key="7/1", texts={"sentence": "A star."},
            pictures={"the instance": jpeg(99), "Grad-CAM": jpeg(10 * shade)},
            numbers={"Grad-CAM": 13.5 - shade, "area": 4.25},
        )  # fmt: skip
    page = read(write_report(runs, tmp_path / "r.html"))
    # One copy of the frames, then one map of each run.
    assert pictures_of(page) == [jpeg(99), jpeg(0), jpeg(10)]
    assert "Maps of video_1k: one instance" in page.text
    for expected in (
        "“A star.”", "13.5 % of the map in the box", "12.5 % of the map in the box",
        "4.2 % of the picture", "13.2 ±0.9", "map that knows nothing",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "things · Grad-CAM · 4 frames" in page.text and "things · match ·" in page.text


def test_grounding_and_classification_stand_on_their_floors(tmp_path):
    run = make_run(tmp_path / "a", lines=SHORT, results=False)
    iou = {"IoU@50": 60.0, "IoU@70": 40.0, "IoU@90": 10.0, "mean IoU": 50.0}
    floors = {"mean box": dict.fromkeys(iou, 1.5), "any instance": dict.fromkeys(iou, 31.5)}
    one = Measurement(protocol=protocol_of(), metrics=iou | {"floors": floors}, counts={})
    write_result(run, "grounding", [one], config={})
    accuracy = {"top-1": 70.0, "top-5": 90.0, "top-1 interval": {"low": 66.0, "high": 73.0}}
    accuracy["majority"] = {"top-1": 11.5, "top-5": 44.5}
    remarked = Measurement(
        protocol=protocol_of(), metrics=accuracy, counts={}, remarks=("seed 3 only",)
    )
    write_result(run, "classification", [remarked], config={})
    page = read(write_report([run], tmp_path / "r.html"))
    for expected in (
        "any instance 31.5 31.5 31.5 31.5", "mean box 1.5", "70.0 ±3.5 90.0", "seed 3 only",
        "majority classes 11.5 44.5",
    ):  # fmt: skip
        assert expected in page.text, expected


def test_ways_of_scoring_share_a_table(tmp_path):
    runs = [make_run(tmp_path / name, lines=SHORT, results=False) for name in "ab"]
    metrics = [one.metrics for one in made_up_retrieval(0, 2)]
    for run, count in zip(runs, (2, 1)):
        measured = [
            Measurement(
                protocol=protocol_of(scoring=("dual", "re-ranked")[i]),
                metrics=metrics[i],
                counts={},
                remarks=() if count == 2 else ("not re-ranked: no VTM",),
            )
            for i in range(count)
        ]
        write_result(run, "retrieval", measured, config={})
    text = write_report(runs, tmp_path / "r.html").read_text()
    assert text.count("<h3>video_1k: things</h3>") == 1
    assert text.count("<td>re-ranked</td>") == 1 and text.count("<td>dual</td>") == 2
    assert "not re-ranked: no VTM" in text


def test_galleries_are_written_whole_and_replaced(tmp_path):
    run = make_run(tmp_path / "a", lines=SHORT, results=False)
    write_errors(run)
    write_case(run, "errors", 10)
    write_case(run, "errors", 20, suite="other", texts={"first": EVIL})
    (case,) = gallery.read_cases(run, "errors")
    assert case.suite == "other" and case.texts == {"first": EVIL}
    assert len(list((run / "eval" / "errors").iterdir())) == 3
    assert gallery.read_cases(run, "attention") == []
    assert not list((run / "eval").glob(".*"))
    page = read(write_report([run], tmp_path / "r.html"))
    assert "script" not in page.tags
    path = run / "eval" / "errors" / gallery.CASES
    for place in (0, 1):  # they are there, but are none of the gallery's own
        (run / "eval" / f"x_evidence-000-{place}.jpg").write_bytes(jpeg(0))
    for text, message in (
        ("[", "cannot be read"),
        ('[{"suite": 1}]', "cannot be read"),
        (path.read_text().replace("other-weak", "../x"), "is missing"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            write_report([run], tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        gallery.write_cases(tmp_path / "file", "errors", [])


def test_result_file_round_trip(tmp_path):
    measurements = made_up_probes(3, 1.0)
    path = write_result(tmp_path, "probe", measurements, config={"b": 1, "a": 2})
    assert path == tmp_path / "eval" / "probe.json"
    result = read_results(tmp_path)["probe"]
    assert result.config_hash == config_hash({"a": 2, "b": 1}) != config_hash({"a": 2, "b": 2})
    assert set(result.versions) == {"instap_jax", "jax", "flax", "numpy"}
    assert result.measurements[0].protocol == measurements[0].protocol
    assert result.measurements[1].metrics["shape"]["chance"] == 22.0
    assert format_table("probe", result.measurements) == format_table("probe", measurements)
    assert [p.name for p in path.parent.iterdir()] == ["probe.json"]


def test_failed_write_leaves_the_old_result(tmp_path):
    write_result(tmp_path, "retrieval", made_up_retrieval(0, 1), config={})
    before = (tmp_path / "eval" / "retrieval.json").read_text()
    broken = made_up_retrieval(0, 1)[0]
    nan = Measurement(protocol=broken.protocol, metrics={"x": float("nan")}, counts={})
    with pytest.raises(ValueError):
        write_result(tmp_path, "retrieval", [nan], config={})
    with pytest.raises(UserError, match="measured nothing"):
        write_result(tmp_path, "retrieval", [], config={})
    assert (tmp_path / "eval" / "retrieval.json").read_text() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        write_result(tmp_path / "file", "probe", made_up_probes(0, 1), config={})
    (tmp_path / "eval" / "probe.json").mkdir()
    with pytest.raises(UserError, match=r"probe\.json cannot be written"):
        write_result(tmp_path, "probe", made_up_probes(0, 1), config={})
    assert not list(tmp_path.glob("**/.*partial"))


def test_tables_state_their_protocol():
    text = format_table("retrieval", made_up_retrieval(0, 2))
    blocks = text.split("\n\n")
    assert len(blocks) == 3
    title = "retrieval: student at step 400 · img_1k · global captions · dual encoder · 1 frame"
    assert blocks[0].splitlines()[0] == f"{title} · 64 texts, 64 videos"
    rows = blocks[0].splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["direction", "text", "by", "video", "by", "mean"]
    other = Measurement(
        protocol=made_up_retrieval(0, 2)[0].protocol, metrics={"iou": {"50": 12.5}}, counts={}
    )
    assert "iou/50   12.5" in format_table("sorting", [other])


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
