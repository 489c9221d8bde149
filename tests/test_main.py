import ast
import errno
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import instap_jax
from instap_jax import main
from instap_jax.aside import written_aside
from instap_jax.errors import UserError

PACKAGE = Path(instap_jax.__file__).parent


def test_help_is_fast_and_imports_no_jax():
    code = (
        "import sys\nfrom instap_jax import main\ncode = main.main(['--help'])\n"
        "assert code == 0 and 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Far under a second on an idle machine; the margin is for a busy one.
    assert time.perf_counter() - start < 5
    for verb in main.VERBS:
        assert verb in out.stdout


def test_module_and_unknown_verb():
    command = [sys.executable, "-m", "instap_jax", "trian"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 2
    assert out.stderr == (
        "instap trian: unknown verb 'trian': did you mean 'train'?; `instap --help` lists them\n"
    )


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_verb_has_help(verb, capsys):
    assert main.main([verb, "--help"]) == 0
    assert "--" in capsys.readouterr().out


# What each part of the package may import from the rest.
LEAVES = {"types", "errors", "progress", "aside"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "progress": set(),
    "config": set(),
    "config_check": {"config"},
    "sharding": set(),
    "distributed": set(),
    "masking": set(),
    "losses": set(),
    "box_losses": set(),
    "models": {"sharding"},
    "data": set(),
    "ablations": set(),
    "train": {
        "config",
        "config_check",
        "sharding",
        "masking",
        "losses",
        "box_losses",
        "models",
        "data",
    },
    "evaluation": {"config", "config_check", "sharding", "box_losses", "models", "data", "train"},
    "interop": {"config", "config_check", "models", "data", "train"},
    "preflight": {"config", "config_check", "data", "distributed", "sharding", "train"},
    "study": {"ablations", "config_check", "evaluation", "train"},
    "aot": {"sharding", "data", "train"},
    "aside": set(),
    "extract": {"data", "inference"},
    "inference": {"config", "config_check", "sharding", "models", "data", "train", "evaluation"},
    "commands": {
        "aot",
        "config_check",
        "distributed",
        "train",
        "evaluation",
        "data",
        "interop",
        "preflight",
        "study",
        "inference",
        "extract",
    },
    "main": set(),
}


def imports_of(path: Path) -> set[str]:
    """Parts of the package (or top-level libraries) that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "instap_jax":
                found |= {f"instap_jax.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def test_imports_go_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        for name in imports_of(path):
            library, _, rest = name.partition(".")
            if library == "instap_jax" and rest:
                target = rest.split(".")[0]
                fine = target in LEAVES | ALLOWED[part] | {part, "__version__"}
                wrong += [] if fine else [f"{path.relative_to(PACKAGE)} imports {name}"]
            if part in ("data", "types", "errors") and library in ("jax", "flax", "optax"):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
            foreign = ("tensorflow", "transformers", "clu")
            # torch for its own files alone: interop reads and writes those.
            if library in foreign or (library == "torch" and part != "interop"):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_only_the_train_command_imports_the_loop():
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "instap_jax.train.loop" in imports_of(path)
    ]
    assert users == ["commands/train.py"]


LONG = "a" * 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["synth", f"--out={LONG}"], "File name too long"),
        (["validate", "--annotations=a.jsonl", f"--media={LONG}"], "File name too long"),
        (["report", f"--workdirs={LONG}", "--out=r.html"], "File name too long"),
        (["train", f"--config={LONG}", "--workdir=w"], "File name too long"),
        (["validate", "--annotations=a.jsonl", "--media="], "--media is empty"),
        (["preview", "--annotations=a.jsonl", "--media=", "--out=p"], "--media is empty"),
        (["synth", "--out=s", "--val_size=1000000000000"], "at most 1,000,000 samples"),
        (["pack", "--annotations=a", "--media=m", "--out=o", "--max_reject_rate=nan"],
         "--max_reject_rate=nan: expected a number"),
    ],
)  # fmt: skip
def test_paths_and_values_that_cannot_be_are_one_line(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert main.main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.splitlines()[-1].startswith(f"instap {words[0]}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_output_that_cannot_be_replaced_is_known_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with written_aside(link, "--out") as root:
        (root / "found").touch()
    assert link.is_symlink() and (tmp_path / "real" / "found").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"--out=\.: cannot be replaced"):
        written_aside(Path("."), "--out").__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real"]


def test_other_errors_of_the_system_are_not_taken_for_the_user(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(main, "_run", full)
    with pytest.raises(OSError, match="No space left"):
        main.main(["train"])


def test_a_reader_that_has_enough_is_no_fault():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "instap_jax", "train", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_constraints_allow_what_jax_asks_for_on_tpus():
    """With the file of constraints `pip install .[tpu]` must find a libtpu."""
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^libtpu==(.+)$", pins, re.MULTILINE)
    wanted = map(Requirement, importlib.metadata.requires("jax"))
    (libtpu,) = (one for one in wanted if one.name == "libtpu" and 'extra == "tpu"' in str(one))
    assert libtpu.specifier.contains(pinned)
