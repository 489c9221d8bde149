"""Results files, and the tables of the terminal."""

import pytest
from made_up_runs import made_up_probes, made_up_retrieval

from instap_jax.errors import UserError
from instap_jax.evaluation.results import (
    Measurement,
    config_hash,
    format_table,
    read_results,
    write_result,
)


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
