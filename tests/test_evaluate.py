"""Task 'retrieval' from packed records to its results file, on a run that trained VTM."""

import json
import os
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pair import measure_more
from ranked import mesh_of
from test_retrieval import reference
from test_train import run
from tiny import tiny_config
from written import student_config, write_run, write_teacher

from instap_jax import main
from instap_jax.data.records import open_source
from instap_jax.errors import UserError
from instap_jax.evaluation import context, features, retrieval_task, saved
from instap_jax.evaluation.context import Context, Options, parse_suites
from instap_jax.evaluation.encoder import load_encoder
from instap_jax.evaluation.features import embed_suite, whole_caption
from instap_jax.evaluation.fingerprint import fingerprint
from instap_jax.evaluation.protocols import OWN
from instap_jax.evaluation.ranking import rank_queries
from instap_jax.evaluation.retrieval_task import units_of
from instap_jax.types import Kind

SUITE = "val_video"


@pytest.fixture(scope="module")
def aligned(small_set, tmp_path_factory):
    """A run of one step whose match head was trained on samples and on instances."""
    workdir = tmp_path_factory.mktemp("evaluate") / "aligned"
    changes = {
        "data.videos": f"{small_set}/packed:train",
        "tokenizer.path": f"{small_set}/tokenizer.model",
        "data.batch_size": 16,  # groups of two: each has a negative
        "align.vtm": 1.0,
        "align.inst_vtm": 1.0,
        "stop_at": 1,
    }
    run(tiny_config("stage2", **changes), workdir)
    return workdir


@pytest.fixture(scope="module")
def encoders(aligned):
    return {devices: load_encoder(aligned, mesh_of(devices)) for devices in (1, 8)}


def embed(encoder, small_set, **options):
    options = {"batch_size": 8} | options
    with jax.set_mesh(encoder.mesh):
        return embed_suite(encoder, f"{small_set}/packed", SUITE, Kind.VIDEO, **options)


@pytest.fixture(scope="module")
def eight(encoders, small_set):
    return embed(encoders[8], small_set, token_limit=1 << 30)


def evaluate(workdir, small_set, *flags):
    return main.main(["evaluate", f"--workdir={workdir}", f"--videos={small_set}/packed:{SUITE}",
                      "--batch_size=8", *flags])  # fmt: skip


def test_texts_are_cut_where_asked(aligned, small_set, capsys):
    assert evaluate(aligned, small_set, "--top_k=0", "--text_length=5") == 0
    result = json.loads((aligned / "eval" / "retrieval.json").read_text())
    assert all("texts cut to 5 tokens" in m["protocol"]["notes"] for m in result["measurements"])
    capsys.readouterr()
    assert evaluate(aligned, small_set, "--text_length=9999") == 2
    assert "has positions for" in capsys.readouterr().err


def test_rows_are_records_and_instances_in_order(eight, small_set):
    records = list(open_source(f"{small_set}/packed", SUITE, Kind.VIDEO))
    assert [one.id for one in eight.facts] == [record.id for record in records]
    counts = [len(record.instance_ids) for record in records]
    assert eight.parent.tolist() == np.repeat(np.arange(len(records)), counts).tolist()
    sentences = [whole_caption(c) for record in records for c in record.instance_captions]
    assert [whole_caption(one.captions) for one in eight.instance_facts] == sentences
    assert len(eight.instance) == len(eight.crop) == len(eight.entity) == sum(counts)


def test_embeddings_are_those_of_the_model_one_record_at_a_time(encoders, eight, small_set):
    alone = embed(encoders[1], small_set, batch_size=1, token_limit=1 << 30)
    for name in ("video", "text", "instance", "instance_text", "crop", "entity"):
        np.testing.assert_allclose(getattr(alone, name), getattr(eight, name), atol=2e-5)
    tokens = [np.concatenate([*map(np.asarray, f.tokens())]) for f in (alone, eight)]
    np.testing.assert_allclose(tokens[0], tokens[1][: len(tokens[0])], atol=2e-5)


def test_tokens_beyond_the_limit_are_computed_again_the_same(encoders, eight, small_set):
    again = embed(encoders[8], small_set, token_limit=0)
    for kept, computed in zip(eight.tokens(), again.tokens(), strict=True):
        # Another program, which computes nothing else, may round otherwise.
        np.testing.assert_allclose(kept, computed, rtol=0, atol=1e-5)
    assert embed(encoders[8], small_set).tokens is None


def test_tokens_of_a_measured_suite_do_not_wait_beside_the_next(
    aligned, encoders, small_set, monkeypatch
):
    kept = []

    def embed_and_watch(*args, **options):
        assert not any(tokens() for tokens in kept)
        found = embed_suite(*args, **options)
        kept.append(weakref.ref(found.tokens))
        return found

    monkeypatch.setattr(context, "embed_suite", embed_and_watch)
    monkeypatch.setattr(retrieval_task, "units_of", lambda *_, **__: [])  # embedding is enough
    suites = parse_suites(f"{small_set}/packed:{SUITE},{small_set}/packed:video_1k", "")
    shared = Context(aligned, suites, Options(batch_size=8))
    shared.encoder, shared.mesh = encoders[8], encoders[8].mesh
    with jax.set_mesh(shared.mesh):
        retrieval_task.measure(shared)
    assert [tokens() is None for tokens in kept] == [True, False]


def test_equal_texts_have_equal_embeddings_wherever_they_stand(encoders):
    texts = [f"{i}" for i in range(300)]
    found = encoders[8].embed_texts([texts[7], *texts, texts[7]])
    np.testing.assert_array_equal(found[0], found[8])
    np.testing.assert_array_equal(found[0], found[-1])
    assert not np.array_equal(found[0], found[1])


def test_results_say_all_and_equal_a_plain_loop_over_the_saved_scores(aligned, small_set):
    flags = ["--top_k=3", "--dual_softmax", "--save_scores"]
    assert evaluate(aligned, small_set, *flags) == 0
    result = json.loads((aligned / "eval" / "retrieval.json").read_text())
    assert len(result["checkpoint_hash"]) == len(result["config_hash"]) == 16
    assert result["versions"]["jax"] == jax.__version__
    measured = {
        (m["protocol"]["unit"], m["protocol"]["scoring"]): m for m in result["measurements"]
    }
    for unit in ("global captions", "instance captions"):
        scored = [scoring for name, scoring in measured if name == unit]
        assert scored == [
            "dual encoder, cosine",
            "dual encoder, top 3 re-ranked by VTM",
            "dual encoder, dual softmax (sees all queries of the suite)",
        ]
        stem = aligned / "eval" / "retrieval" / f"{SUITE}-{unit.split()[0]}"
        arrays, scores = np.load(f"{stem}.npz"), np.load(f"{stem}-scores.npy")
        correct = [[] for _ in range(len(scores))]
        for text, video in zip(arrays["pair_text"], arrays["pair_visual"]):
            correct[text].append(video)
        metrics = measured[unit, "dual encoder, cosine"]["metrics"]
        for name, (recall, median, mean, _) in zip(("t2v", "v2t"), reference(scores, correct)):
            assert {k: metrics[name][f"R@{k}"] for k in recall} == pytest.approx(recall)
            assert metrics[name]["median_rank"] == median
            assert metrics[name]["mean_rank"] == pytest.approx(mean)
        assert arrays["t2v_top"].shape == arrays["t2v_logits"].shape == (len(scores), 3)
        notes = measured[unit, "dual encoder, cosine"]["protocol"]["notes"]
        assert "texts cut to 8 tokens" in notes and "a tie counts against the model" in notes


def test_equal_texts_have_equal_saved_scores(tmp_path):
    """Of all sizes: a plain float32 product differs in the last bit by where a row stands."""
    rng = np.random.default_rng(0)
    for count in range(2, 60):
        text, visual = (rng.normal(size=(n, 16)).astype(np.float32) for n in (count, 40))
        text[-1] = text[0]
        saved.write_scores(tmp_path / "scores.npy", text, visual)
        scores = np.load(tmp_path / "scores.npy")
        np.testing.assert_array_equal(scores[0], scores[-1])
        np.testing.assert_allclose(scores, text @ visual.T, atol=1e-5)


def test_saved_logits_are_the_match_head_on_text_and_visual_tokens(aligned, encoders, eight):
    encoder = encoders[8]
    model = nnx.merge(encoder.graphdef, encoder.params["model"])
    tokens = np.concatenate([*map(np.asarray, eight.tokens())])
    for unit, visual in (("global", tokens), ("instance", eight.crop[:, None])):
        arrays = np.load(aligned / "eval" / "retrieval" / f"{SUITE}-{unit}.npz")
        ids = encoder.tokenize(arrays["texts"].tolist())
        for text in (0, 5):
            videos = arrays["t2v_top"][text]
            encoded = model.text.encode(jnp.asarray(ids[[text] * len(videos)]))
            mask = jnp.asarray(ids[[text] * len(videos)] != 0)
            fused = model.text.fuse(encoded.tokens, mask, jnp.asarray(visual[videos]))
            logits = model.match_head(fused)[:, 1]
            np.testing.assert_allclose(arrays["t2v_logits"][text], logits, atol=1e-4)


def test_one_and_eight_devices_rank_alike(encoders, eight, small_set):
    found = {1: embed(encoders[1], small_set), 8: eight}
    ranks = {}
    for devices, encoder in encoders.items():
        for unit in units_of(encoder, OWN, found[devices]):
            sides = ((unit.text, unit.visual, unit.positives),
                     (unit.visual, unit.text, unit.positives.reversed()))  # fmt: skip
            ranks[devices, unit.name] = [
                rank_queries(*side, mesh=encoder.mesh).rank.tolist() for side in sides
            ]
    for name in ("global captions", "instance captions"):
        assert ranks[1, name] == ranks[8, name]


def test_two_processes_measure_what_one_does(aligned, small_set, tmp_path):
    assert evaluate(aligned, small_set, "--top_k=3") == 0
    teacher = write_teacher(small_set, tmp_path / "teacher", only="visual")
    student = write_run(student_config(small_set, teacher), tmp_path / "student")
    other = tmp_path / "run"
    shutil.copytree(aligned, other, ignore=shutil.ignore_patterns("eval"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    command = [sys.executable, str(Path(__file__).with_name("pair.py")), address]
    rest = [
        str(student),
        f"{tmp_path}/more.json",
        f"--workdir={other}",
        f"--videos={small_set}/packed:{SUITE}",
        "--batch_size=8",
        "--top_k=3",
    ]
    processes = [
        subprocess.Popen(
            [*command, str(rank), *rest],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # One of them speaks, and it says what a single process does.
    assert sorted("mean recall" in output for output in outputs) == [False, True]
    found, expected = (
        json.loads((workdir / "eval" / "retrieval.json").read_text())
        for workdir in (other, aligned)
    )
    assert found["measurements"] == expected["measurements"]
    assert found["checkpoint_hash"] == expected["checkpoint_hash"]
    more = json.loads((tmp_path / "more.json").read_text())
    alone = measure_more(aligned, student, f"{small_set}/packed:{SUITE}")
    assert more["boxes"] == alone["boxes"]
    assert more["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_fingerprint_tells_values_from_places(encoders):
    assert encoders[1].fingerprint == encoders[8].fingerprint
    plain = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}
    first = fingerprint(plain)
    assert fingerprint(dict(plain)) == first
    for other in (
        plain | {"a": jnp.arange(6.0).reshape(3, 2)},
        plain | {"a": jnp.arange(6.0)[::-1].reshape(2, 3)},
        plain | {"b": jnp.full(3, 1.0078125, jnp.bfloat16)},
        {"a": plain["a"], "c": plain["b"]},
    ):
        assert fingerprint(other) != first


def test_nan_parameters_end_in_one_line(encoders, small_set):
    bad = jax.tree.map(lambda leaf: leaf * np.nan, encoders[8].params["model"])
    encoder = encoders[8].with_params(bad, 1)
    unit = units_of(encoder, OWN, embed(encoder, small_set))[0]
    with pytest.raises(UserError, match=r"NaN scores: 12 of 12 queries"):
        rank_queries(unit.text, unit.visual, unit.positives, mesh=encoder.mesh)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol=msvd"], "12 samples instead of 670"),
        (["--protocol=msdv"], "did you mean 'msvd'?"),
        (["--protocol=instvl-1k-img"], "the protocol is of images"),
        (["--expected_ids={small_set}/none.txt"], "none.txt: No such file"),
        (["--checkpoint=best"], "no best checkpoint"),
        (["--top_k=-1"], "top_k"),
    ],
)
def test_bad_input_is_one_line(aligned, small_set, capsys, flags, message):
    assert evaluate(aligned, small_set, *(flag.format(small_set=small_set) for flag in flags)) == 2
    text = capsys.readouterr().err
    assert message in text.splitlines()[-1] and "Traceback" not in text


def test_missing_ids_and_an_empty_split(
    aligned, encoders, small_set, capsys, tmp_path, monkeypatch
):
    ids = [record.id for record in open_source(f"{small_set}/packed", SUITE, Kind.VIDEO)]
    (tmp_path / "ids").write_text("\n".join([*ids[1:], "absent-7"]))
    assert evaluate(aligned, small_set, f"--expected_ids={tmp_path}/ids") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"1 ids missing: absent-7; 1 ids not expected: {ids[0]}" in line
    monkeypatch.setattr(features, "open_source", lambda *_: [])
    with pytest.raises(UserError, match=f"{SUITE} has no video samples"):
        embed(encoders[8], small_set)


def test_a_checkpoint_of_another_configuration(aligned, small_set, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(aligned, other)
    config = json.loads((other / "config.json").read_text())
    config["config"]["vision"]["width"] = 64
    (other / "config.json").write_text(json.dumps(config))
    assert evaluate(other, small_set) == 2
    assert "do not fit this config" in capsys.readouterr().err


def test_without_vtm_reranking_is_left_out_and_said_so(aligned, small_set, capsys, tmp_path):
    other = tmp_path / "contrast"
    shutil.copytree(aligned, other)
    config = json.loads((other / "config.json").read_text())
    config["config"]["align"] |= {"vtm": 0.0, "inst_vtm": 0.0}
    (other / "config.json").write_text(json.dumps(config))
    assert evaluate(other, small_set) == 0
    out = capsys.readouterr().out
    assert "re-ranked by VTM" not in out
    assert "not re-ranked: this run did not train VTM, equation (3)" in out
    assert "not re-ranked: this run did not train VTM, equation (9)" in out
    assert evaluate(other, small_set, "--top_k=5") == 2
    assert "cannot be re-ranked" in capsys.readouterr().err


def test_a_matrix_too_large_is_left_out(monkeypatch, tmp_path, eight, encoders, capsys):
    monkeypatch.setattr(saved, "MAX_SCORES", 100)
    unit = units_of(encoders[8], OWN, eight)[0]
    saved.save_ranking(tmp_path, SUITE, eight, unit, (None, None), None)
    assert [path.name for path in tmp_path.iterdir()] == [f"{SUITE}-global.npz"]
    assert "only its embeddings" in capsys.readouterr().out
