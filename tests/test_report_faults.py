"""The report page on files of a wrong shape, numbers that are none, and targets to keep."""

import json

import numpy as np
import pytest
from made_up_runs import SHORT, made_up_retrieval, make_run, read
from test_report_tasks import write_attention, write_case, write_errors

from instap_jax import main as command
from instap_jax.errors import UserError
from instap_jax.evaluation import report_runs
from instap_jax.evaluation.report import write_report
from instap_jax.evaluation.results import write_result

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "a", lines=SHORT, results=False)


def change(path, *keys, value):
    """Sets a field of a JSON file, at any depth."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        *(
            (("changed",), value, "'changed' is not an object of pairs")
            for value in (None, [], "x")
        ),
        (("changed", "steps"), "xy", "'changed' is not an object of pairs"),
        (("changed", "steps"), [], "'changed' is not an object of pairs"),
        *((("overrides",), value, "'overrides' is not a list of texts") for value in (None, [1])),
        (("file",), 5, "'file' is not text or null"),
        *((("config", "data"), v, "'data' of 'config' is not an object") for v in ("x", 5, None)),
        (("config", "stage"), [], "'stage' of 'config' is not text"),
    ],
)
def test_a_configuration_of_another_shape_is_named(run, tmp_path, keys, value, message):
    change(run / "config.json", *keys, value=value)
    with pytest.raises(UserError, match=message) as caught:
        write_report([run], tmp_path / "r.html")
    assert str(caught.value).startswith(str(run / "config.json"))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("versions",), "x", "'versions' is not an object of texts"),
        (("written",), 1, "'written' is not text"),
        (("measurements",), {}, "'measurements' is not a list of objects"),
        (
            ("measurements", 0, "counts"),
            {"a": "x"},
            "'counts' of a measurement is not an object of",
        ),
        (("measurements", 0, "remarks"), [1], "'remarks' of a measurement is not a list of texts"),
        (("measurements", 0, "metrics"), "x", "'metrics' of a measurement is not an object"),
        (("measurements", 0, "protocol"), None, "'protocol' of a measurement is not an object"),
        (("measurements", 0, "protocol", "step"), "x", "'step' of a protocol is not a whole"),
        (("measurements", 0, "protocol", "suite"), ["x"], "'suite' of a protocol is not text"),
    ],
)
def test_a_results_file_of_another_shape_is_named(run, tmp_path, keys, value, message):
    path = write_result(run, "retrieval", made_up_retrieval(0, 1), config={})
    change(path, *keys, value=value)
    with pytest.raises(UserError, match=message) as caught:
        write_report([run], tmp_path / "r.html")
    assert str(caught.value).startswith(f"{path} is not a results file (")


@pytest.mark.parametrize("name", ["config.json", "eval/deep.json"])
def test_json_too_deep_to_read_is_named(run, tmp_path, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=name):
        write_report([run], tmp_path / "r.html")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("texts", "x"), ("texts", {"a": 1}), ("pictures", {}), ("suite", []), ("key", {}),
        ("numbers", {"area": "x"}),
    ],
)  # fmt: skip
def test_cases_of_another_shape_are_named(run, tmp_path, field, value):
    write_errors(run)
    write_case(run, "errors", 10)
    path = run / "eval" / "errors" / "cases.json"
    change(path, 0, field, value=value)
    with pytest.raises(UserError, match="cannot be read") as caught:
        write_report([run], tmp_path / "r.html")
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e308, 10**400])
def test_a_scalar_that_is_no_number_is_left_out(tmp_path, value):
    good = {"loss": 2.0, "step_seconds": 0.5, "data_wait_seconds": 0.1}
    lines = [{"step": 1} | good, {"step": 2} | good | {"faults/decode": 3.0}]
    for name in (*good, "mfu", "faults/decode"):
        lines[-1] |= {name: value}
    workdir = make_run(tmp_path / "a", lines=lines, results=False)
    page = read(write_report([workdir], tmp_path / "r.html"))
    facts = report_runs.facts(report_runs.load_runs([workdir])[0])
    assert facts["training time"] == "0.5 s" and facts["step time"] == "500 ms (median)"
    assert facts["data wait"] == "20.0 % of step time"
    assert facts["loss, first → last"].startswith("2 → 2 ")
    assert facts["unreadable samples"] == "none"
    assert "nan" not in page.text and "inf" not in page.text


def test_scalars_are_paired_by_step(tmp_path):
    """As many lines with one as with the other, but not the same ones."""
    lines = [
        {"step": 1, "step_seconds": 9.0, "data_wait_seconds": 9.0},
        {"step": 2, "step_seconds": 1.0},
        {"step": 3, "data_wait_seconds": 1.0},
        {"step": 4, "step_seconds": 1.0, "data_wait_seconds": 0.25},
    ]
    workdir = make_run(tmp_path / "a", lines=lines, results=False)
    facts = report_runs.facts(report_runs.load_runs([workdir])[0])
    assert facts["data wait"] == "25.0 % of step time"


def test_training_time_holds_every_start(tmp_path):
    lines = [
        {"step": 1, "step_seconds": 1.0, "start_seconds": 50.0},
        {"step": 11, "step_seconds": 1.0},
        {"step": 21, "step_seconds": 1.0, "start_seconds": 8.0},
    ]
    workdir = make_run(tmp_path / "a", lines=lines, results=False)
    facts = report_runs.facts(report_runs.load_runs([workdir])[0])
    assert facts["training time"] == "79.0 s" and facts["step time"] == "1000 ms (median)"


@pytest.mark.parametrize("step", [10**30, -1, True])
def test_a_line_without_a_possible_step_is_left_out(tmp_path, step):
    lines = [*SHORT, {"step": step, "loss": 1.0}]
    workdir = make_run(tmp_path / "a", lines=lines, results=False)
    text = read(write_report([workdir], tmp_path / "r.html")).text
    assert "metrics.jsonl: 1 unreadable lines were left out" in text and "5 of 400" in text


def spoil(value, bad):
    if isinstance(value, dict):
        return {key: spoil(inner, bad) for key, inner in value.items()}
    return bad if isinstance(value, float) else value


@pytest.mark.parametrize("bad", [NAN, INF, 10**400])
@pytest.mark.parametrize("task", ["errors", "attention", "retrieval", "probe"])
def test_a_metric_that_is_no_number_is_a_dash(tmp_path, task, bad):
    workdir = make_run(tmp_path / "a", lines=SHORT)
    write_errors(workdir)
    write_attention(workdir, 13.25)
    path = workdir / "eval" / f"{task}.json"
    for place, one in enumerate(json.loads(path.read_text())["measurements"]):
        change(path, "measurements", place, "metrics", value=spoil(one["metrics"], bad))
    page = read(write_report([workdir], tmp_path / "r.html"))
    titles = {"errors": "Wrong instance retrievals", "attention": "Attention to the instance"}
    assert titles.get(task, "") in page.text  # in its own layout
    assert "—" in page.text
    for word in ("nan", "inf"):
        assert word not in page.text.lower().replace("information", "").split()


@pytest.mark.parametrize("bad", ["x", [], None, {}])
def test_metrics_of_another_shape_are_shown_by_name(tmp_path, bad):
    workdir = make_run(tmp_path / "a", lines=SHORT)
    write_errors(workdir)
    for task in ("retrieval", "errors"):
        path = workdir / "eval" / f"{task}.json"
        one = json.loads(path.read_text())["measurements"][0]
        change(path, "measurements", 0, "metrics", value=spoil(one["metrics"], bad))
    for place in (0, 1):
        probe = workdir / "eval" / "probe.json"
        change(probe, "measurements", place, "metrics", value={"shape": bad})
    read(write_report([workdir], tmp_path / "r.html"))


def test_texts_that_are_no_formulas_and_half_characters(tmp_path):
    lines = [{"step": 1, "loss": 1.0, "$\\frac{$": 1.0, "\ud800": 2.0}]
    workdir = make_run(tmp_path / "a", lines=lines)
    path = workdir / "eval" / "retrieval.json"
    change(path, "measurements", 0, "protocol", "suite", value="$\\frac{$\udfff")
    assert "$\\frac{$" in read(write_report([workdir], tmp_path / "r.html")).text


def test_only_a_page_is_replaced(run, tmp_path, capsys):
    log = run / "metrics.jsonl"
    before = log.read_text()
    (tmp_path / "empty").write_text("")
    for out in (log, tmp_path / "empty", "/dev/null"):
        assert command.main(["report", f"--workdirs={run}", f"--out={out}"]) == 2
        errors = capsys.readouterr().err
        assert "exists and is not an HTML page" in errors and errors.count("\n") == 1
    assert log.read_text() == before
    page = tmp_path / "r.html"
    for text in ("<!doctype html>\nthe one before", "<!DOCTYPE HTML><p>the one before"):
        page.write_text(text)
        write_report([run], page)
        assert "the one before" not in read(page).text
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        write_report([run], tmp_path / ("x" * 300))


def test_names_of_runs_that_are_none(run, tmp_path, capsys):
    for names, message in (
        (",", "--workdirs has an empty name"),
        (f"{run},", "--workdirs has an empty name"),
        ("", "no run to report on"),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        assert command.main(["report", f"--workdirs={names}", f"--out={tmp_path / 'r'}"]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop"):
        write_report([tmp_path / "loop"], tmp_path / "r.html")


def test_log_axis_of_any_span(tmp_path):
    values = np.geomspace(1e-320, 1e99, 30)
    lines = [{"step": i + 1, "loss": float(value)} for i, value in enumerate(values)]
    with np.errstate(over="raise"):
        write_report([make_run(tmp_path / "a", lines=lines, results=False)], tmp_path / "r.html")
