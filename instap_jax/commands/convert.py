"""`instap convert`: weights of CLIP, BERT and UMT in (`--from`), PyTorch and UMT out (`--to`)."""

from pathlib import Path

from absl import flags

from instap_jax import config_check
from instap_jax.errors import UserError

SOURCES = ("clip", "bert", "umt", "torch")
TARGETS = ("torch", "umt")


def define_flags(values: flags.FlagValues) -> None:
    config_check.define_flag(values)

    def text(name: str, help_text: str, *, required: bool = False) -> None:
        flags.DEFINE_string(name, None, help_text, required=required, flag_values=values)

    text("from", f"what the input is: {', '.join(SOURCES)}")
    text("to", f"what to make of a run of stage 'align': {', '.join(TARGETS)}")
    text(
        "input", "weight file, or a directory with one; with --to: the run's workdir", required=True
    )
    text("output", "directory to be made", required=True)


def run(values: flags.FlagValues) -> None:
    kind, layout = values["from"].value, values["to"].value
    if (kind is None) == (layout is None):
        raise UserError("give one of --from=KIND (weights in) and --to=KIND (weights out)")
    output = Path(values["output"].value)
    if kind is None:
        _export(layout, values["input"].value, output, values)
        return
    _choose("from", kind, SOURCES)
    loaded = config_check.load(values) if values["config"].value is not None else None
    from instap_jax.interop.importing import convert

    report = convert(kind, Path(values["input"].value), output, loaded)
    print(f"{report.text()}\n{output}: done")


def _export(layout: str, workdir: str, output: Path, values: flags.FlagValues) -> None:
    _choose("to", layout, TARGETS)
    if values["config"].value is not None:
        raise UserError("--config is for --from; a run has its own configuration")
    from instap_jax.interop.export import export
    from instap_jax.interop.report import table

    written = export(Path(workdir), output, layout=layout)
    print("\n".join([f"{workdir} -> {layout}", *table(written), f"{output}: done"]))


def _choose(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"--{flag}={value}: one of {', '.join(choices)}")
