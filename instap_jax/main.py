"""The console command: `instap VERB [flags]` (also `python -m instap_jax VERB`).

Only the verb's own module is imported, so that `instap --help` and a mistyped verb answer at once
and without JAX.
"""

import difflib
import importlib
import keyword
import os
import re
import sys
import types
from collections.abc import Sequence

from absl import flags, logging

from instap_jax import __version__
from instap_jax.errors import (
    EXIT_USER_ERROR,
    Preempted,
    UserError,
    exit_code,
    is_of_the_path,
)

# What a path of the user's can meet anywhere; of others no one knows whose fault they are.

# Verb -> one line of help. The module is `instap_jax.commands.<verb>` ('import_', as Python keeps
# that word for itself). It has `define_flags(values: flags.FlagValues)` and
# `run(values) -> int | None` (the exit code; None is 0).
VERBS = {
    "synth": "render the embedded InstVL-like set: H.264 clips, JPEG stills, annotations",
    "validate": "check an annotation file against the schema and the media",
    "preview": "draw boxes, ids and captions over the frames",
    "import": "turn COCO, Visual Genome, MOT, YouTube-VIS, UMT, Kinetics annotations into ours",
    "pack": "annotations and media -> sharded ArrayRecord (a TFDS directory)",
    "tokenizer": "train a sentencepiece vocabulary on an annotation file",
    "preflight": "try all that a run needs before its pod is held: hosts, storage, data, a step",
    "train": "train any stage",
    "compile": "compile a stage for TPU pods without one: memory, traffic, estimated time",
    "replay": "the step that stopped a run by a NaN or inf, computed again part by part",
    "evaluate": "measure a trained model; write JSON",
    "ablate": "train and evaluate a table of configurations over seeds; write it with intervals",
    "convert": "weights of CLIP, BERT and UMT in; PyTorch and UMT out",
    "select": "choose the stage-1 run of the lowest validation loss, fine-tune and measure it",
    "features": "embeddings of media files, of their instances and texts",
    "report": "one self-contained HTML page: curves, samples, results of one or more runs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code.

    0 done; 2 a fault of the input: the same command would meet it again; 74 storage failed, 75
    preempted and saved: start it again; 130 Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] == "--version":
        print(f"instap_jax {__version__}")
        return 0
    try:
        code = _run(argv[0], argv[1:])
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"instap {argv[0]}: {_one_line(error)}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError as error:  # whoever read what we print has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_code(error)
    except OSError as error:
        if not is_of_the_path(error):
            raise
        print(f"instap {argv[0]}: {error.filename}: {error.strerror}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt as error:
        how = "preempted" if isinstance(error, Preempted) else "interrupted"
        print(f"instap {argv[0]}: {how}", file=sys.stderr)
        return exit_code(error)


def _run(verb: str, args: list[str]) -> int:
    module = _command(verb)
    # Our own FlagValues: libraries define global flags that are no business of our users.
    values = flags.FlagValues()
    sys.argv = [f"instap {verb}", *args]  # where config_flags looks for overrides
    flags.FLAGS.mark_as_parsed()  # grain's workers read the global ones
    logging.set_verbosity(logging.ERROR)  # our libraries warn of what is as it should be
    module.define_flags(values)
    if any(arg in ("-h", "--help") for arg in args):
        print(f"instap {verb}: {VERBS[verb]}\n{_flag_help(values)}")
        return 0
    parse_flags(values)
    return module.run(values) or 0


def _command(verb: str) -> types.ModuleType:
    if verb not in VERBS:
        raise UserError(f"unknown verb{_closest(verb, VERBS)}; `instap --help` lists them")
    name = verb + "_" if keyword.iskeyword(verb) else verb
    return importlib.import_module(f"instap_jax.commands.{name}")


def parse_flags(values: flags.FlagValues) -> None:
    """Parses `sys.argv`, overrides of the configuration included.

    Raises:
      UserError: a flag or a key that does not exist, or a value that it cannot have.
    """
    try:
        rest = values(sys.argv)[1:]
    except (AttributeError, KeyError) as error:  # what ml_collections raises for an unknown key
        raise UserError(_unknown_key(error)) from error
    except (flags.Error, TypeError, ValueError, OSError) as error:
        raise UserError(_flag_fault(error)) from error
    except RecursionError as error:  # absl looks for a similar name, letter by letter
        raise UserError("a flag's name is too long to be one; `--help` lists them") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; flags look like --name=value")
    for name, value in values.flag_values_dict().items():
        if value != value:  # passes absl's bounds
            raise UserError(f"--{name}={value}: expected a number")


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    return (
        f"instap_jax {__version__}: instance-aware video-language pre-training\n\n"
        f"usage: instap VERB [--flag=value ...]\n\n{verbs}\n\n"
        "`instap VERB --help` shows a verb's flags."
    )


def _flag_help(values: flags.FlagValues) -> str:
    """The verb's own flags, without those that absl adds to every FlagValues."""
    ours = [name for name in values.flags_by_module_dict() if name.startswith("instap_jax")]
    return "\n".join(values.module_help(name) for name in ours)


def _closest(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" {word!r}" + (f": did you mean {close[0]!r}?" if close else "")


def _unknown_key(error: Exception) -> str:
    """ml_collections says: 'key' Did you mean "other" instead of "key"?"""
    words = re.findall(r"(?<=['\"])\w+(?=\\?['\"])", str(error))
    close = re.search(r'mean "(\w+)"', str(error))
    hint = f"; did you mean {close[1]!r}?" if close else ""
    return f"config has no key {words[0] if words else error}{hint}"


def _flag_fault(error: Exception) -> str:
    text = str(error)
    if "Traceback" in text:  # absl hands on the whole of what a configuration file raised
        text = f"--config: {text.strip().splitlines()[-1]}"
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
