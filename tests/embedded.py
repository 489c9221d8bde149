"""The embedded set as a user makes it, small."""

from pathlib import Path

from instap_jax import main


def make_embedded(root: Path, *sizes: str) -> Path:
    """Renders, packs and makes a vocabulary: root/set, root/packed, root/tokenizer.model.

    Args:
      sizes: flags of `instap synth`.
    """
    annotations = f"--annotations={root}/set/annotations.jsonl"
    commands = (
        ("synth", f"--out={root}/set", *sizes),
        ("pack", annotations, f"--media={root}/set/media", f"--out={root}/packed",
         "--short_side=24", "--processes=1"),
        ("tokenizer", annotations, f"--out={root}/tokenizer.model", "--vocab_size=320"),
    )  # fmt: skip
    for command in commands:
        assert main.main(command) == 0
    return root
