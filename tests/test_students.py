"""Stage-1 runs under evaluation: by the teacher that each has, and as candidates."""

import json
import shutil

import jax
import pytest
from written import student_config, write_run, write_teacher

from instap_jax import main, sharding
from instap_jax.data.tokenizer import train_sentencepiece
from instap_jax.errors import UserError
from instap_jax.evaluation import probe_task
from instap_jax.evaluation.context import parse_suites
from instap_jax.evaluation.encoder import load_encoder
from instap_jax.evaluation.selection import rank_candidates
from instap_jax.evaluation.validation import make_validate


@pytest.fixture(scope="module")
def clip(small_set, tmp_path_factory):
    """A teacher as `instap convert --from=clip` makes it."""
    return write_teacher(small_set, tmp_path_factory.mktemp("clip") / "clip", only="visual")


@pytest.fixture(scope="module")
def student(small_set, clip):
    return write_run(student_config(small_set, clip), clip.parent / "student")


def test_without_a_text_tower_a_student_is_probed_not_retrieved(
    small_set, clip, student, monkeypatch, capsys
):
    monkeypatch.setattr(probe_task, "LEAST_EXAMPLES", 10)
    packed = f"{small_set}/packed"
    command = ["evaluate", f"--workdir={student}", "--batch_size=8",
               f"--videos={packed}:video_1k", f"--probe_videos={packed}:val_video"]  # fmt: skip
    assert main.main([*command, "--task=probe"]) == 0
    (first, *_) = json.loads((student / "eval" / "probe.json").read_text())["measurements"]
    assert first["protocol"]["unit"] == "entity attributes" and first["metrics"]
    assert main.main([*command, "--task=retrieval"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{clip}: this teacher has no text tower" in line and "--task=probe" in line


@pytest.mark.parametrize(
    ("taught", "message"), [(True, "no text tower"), (False, "set config.teacher.checkpoint to")]
)
def test_retrieval_in_training_needs_a_teacher_with_a_text_tower(small_set, clip, taught, message):
    config = student_config(small_set, clip if taught else None, **{"evaluation.every": 1})
    with pytest.raises(UserError, match=message):
        make_validate(config, sharding.mesh_of_all(), None)


def test_a_teachers_tokenizer_made_anew_is_refused(small_set, tmp_path):
    shutil.copytree(small_set, tmp_path / "set", ignore=shutil.ignore_patterns("set", "packed"))
    teacher = write_teacher(tmp_path / "set", tmp_path / "teacher")
    run = write_run(student_config(small_set, teacher), tmp_path / "student")
    mesh = sharding.mesh_of_all()
    with jax.set_mesh(mesh):
        assert load_encoder(run, mesh).embeds_texts
        other = train_sentencepiece([f"quite other words {n}" for n in range(40)], 300)
        (tmp_path / "set" / "tokenizer.model").write_bytes(other)
        with pytest.raises(UserError, match=f"is not the tokenizer that {teacher} was trained"):
            load_encoder(run, mesh)


def test_a_candidate_without_a_number_for_its_loss(small_set, clip, student, tmp_path):
    broken = write_run(student_config(small_set, clip), tmp_path / "broken", scale=float("nan"))
    (suite,) = parse_suites(f"{small_set}/packed:val_video", "")
    with pytest.raises(UserError, match=f"{broken}: its loss on val_video at step 0 is nan"):
        rank_candidates([broken, student], suite, batch_size=8)
    untaught = write_run(student_config(small_set, None), tmp_path / "untaught")
    with pytest.raises(UserError, match=f"{untaught} has no teacher"):
        rank_candidates([untaught], suite, batch_size=8)
