"""What tests of the launchers share."""

import shlex
import sys

TRAIN = ["train", "--config=configs/stage1_l16.py", "--workdir=/shared/my run"]
TPU = ("run", "--name=n", "--project=p", "--zone=europe-west4-b")


def dry(launcher, capsys, *argv):
    """What `launcher ... --dry-run` prints: its commands as lists of words, and the rest."""
    assert launcher.main([*argv[:1], "--dry-run", *argv[1:], "--", *TRAIN]) == 0
    text = capsys.readouterr().out
    commands, _, rest = text.partition("<<'END'\n")
    return [shlex.split(line, comments=True) for line in commands.splitlines()], rest


def flags_of(words):
    return dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))


def fake(folder, script, name="gcloud", first=4):
    """A `gcloud` on the PATH that does what the Python `script` says with `words`, and logs."""
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nwords = sys.argv[{first}:]\n"
        f"log = pathlib.Path({str(folder / 'log')!r})\n"
        "before = log.read_text().split() if log.exists() else []\n"
        "log.write_text(' '.join([*before, words[0]]))\n" + script
    )
    program.chmod(0o755)
    return folder / "log"
