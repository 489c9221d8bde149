"""The report page: errors, attention, fine-tuned runs, ways of scoring, galleries."""

import base64
import io
import re

import numpy as np
import pytest
from made_up_runs import EVIL, SHORT, made_up_probes, made_up_retrieval, make_run, read
from PIL import Image

from instap_jax.data.media import encode_jpeg
from instap_jax.errors import UserError
from instap_jax.evaluation import gallery, report_plots, report_retrieval
from instap_jax.evaluation.errors import CLASSES, PAPER_SHARES
from instap_jax.evaluation.report import write_report
from instap_jax.evaluation.results import (
    Measurement,
    Protocol,
    write_result,
)


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
    assert "tick: random" in page.text
    for name in "ab":
        assert page.text.count(f"{name}: random T→V 12.5 % 12.5 % 12.5 % 12.5 %") == 1
    assert text.count("<pattern") >= 1  # the paper's bars are hatched
    assert set(re.findall(r"url\((#[^)]*)\)", text)) <= {
        f"#{name}" for name in re.findall(r'id="([^"]*)"', text)
    }
    assert pictures_of(page) == [jpeg(40)] * 2
    assert "Cases of video_1k (1)" in page.text and "Weak visual evidence" in page.text


def test_ticks_are_on_the_axis_and_values_in_their_own_column(monkeypatch):
    figures, real = [], report_plots._svg
    monkeypatch.setattr(report_plots, "_svg", lambda f, label: figures.append(f) or real(f, label))
    bars = [
        report_plots.Bar(row=0, slot=0, value=5.0, tick=84.8),
        report_plots.Bar(row=1, slot=None, value=40.0),
    ]
    report_plots.bar_plot(bars, ["a", "b"], unit="%", label="x")
    (axes,) = figures[0].axes
    assert axes.get_xlim()[1] > 84.8
    end = axes.get_window_extent().x1
    values = [text for text in axes.texts if text.get_text() in ("5.0", "40.0")]
    assert len(values) == 2
    assert all(text.get_window_extent().x0 > end for text in values)


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
    # The key of the colours, one copy of the frames, then one map of each run.
    assert pictures_of(page)[1:] == [jpeg(99), jpeg(0), jpeg(10)]
    key = np.asarray(Image.open(io.BytesIO(pictures_of(page)[0])), int)[96]
    assert np.ptp(key[0]) < 12 and key[-1, 0] > key[-1, 2] + 60  # grey, then yellow
    assert "Colour of a map: grey where it is 0" in page.text
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
    head = re.search(r"<table class=\"scored\">.*?</thead>", text, re.S)[0]
    assert re.findall(r">([^<>]+)</th>", head)[:4] == ["run", "scored by", "mean", "T→V R@1"]
    mean = metrics[0]["mean_recall"]
    assert re.search(rf"<td>dual</td><td>(<b>)?{mean:.1f}<", text)


def test_hollow_are_random_weights_not_all_of_step_0(tmp_path, monkeypatch):
    """Converted weights have taken no step here either."""
    run = make_run(tmp_path / "a", lines=SHORT, results=False)
    metrics, accuracy = made_up_retrieval(0, 2)[0].metrics, made_up_probes(0, 2)[0].metrics
    protocols = [
        protocol_of(suite=str(i), weights=weights, step=step)
        for i, (weights, step) in enumerate(
            [("aligned", 0), ("aligned, random", 0), ("student, random initialisation", 0),
             ("aligned", 250)]
        )
    ]  # fmt: skip
    for task, numbers in (("retrieval", metrics), ("probe", accuracy)):
        measured = [Measurement(protocol=p, metrics=numbers, counts={}) for p in protocols]
        write_result(run, task, measured, config={})
    dots, real = [], report_retrieval.dot_plot
    monkeypatch.setattr(
        report_retrieval,
        "dot_plot",
        lambda found, *a, **k: dots.append(found) or real(found, *a, **k),
    )
    write_report([run], tmp_path / "r.html")
    wanted = [False, True, True, False]
    assert [dot.hollow for dot in dots[0]] == wanted
    assert [{dot.hollow for dot in found} for found in dots[1:]] == [{one} for one in wanted]


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
