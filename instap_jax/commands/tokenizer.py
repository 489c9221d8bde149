"""`instap tokenizer`: trains a sentencepiece vocabulary on an annotation file."""

import os
import random
from pathlib import Path

from absl import flags

from instap_jax.data.schema import read_annotations
from instap_jax.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from instap_jax.errors import UserError
from instap_jax.progress import Progress
from instap_jax.types import Sample


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "annotations", None, "Annotation file (JSON Lines).", required=True, flag_values=values
    )
    flags.DEFINE_string("out", None, "The .model file to write.", required=True, flag_values=values)
    flags.DEFINE_integer(
        "vocab_size", None, "Pieces wanted; a small corpus gives fewer.", required=True,
        lower_bound=6, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "max_captions", 2_000_000,
        "Captions to train on; of more, so many are drawn, the same ones each time. Training takes "
        "20 bytes of memory for each character.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("split", "train", "Split whose captions are read.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    out = Path(values.out)
    if out.exists():
        raise UserError(f"--out={out} exists; name another file or remove it")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: {out.parent} is not a directory; make it first")
    texts, found = _captions(Path(values.annotations), values.split, values.max_captions)
    drawn = f", drawn from {found}" if found > len(texts) else ""
    print(f"training on {len(texts)} captions{drawn}", flush=True)
    data = train_sentencepiece(texts, values.vocab_size)
    tokenizer = SentencePieceTokenizer(data)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
    if tokenizer.vocab_size < values.vocab_size:
        print(f"the corpus is too small for {values.vocab_size} pieces")
    print(f"wrote {out}: {tokenizer.vocab_size} pieces (text.vocab_size must be at least that)")


def _captions(annotations: Path, split: str, limit: int) -> tuple[list[str], int]:
    """Captions of a split, global and of instances, and how many it has.

    All of them in file order; where they are more than `limit`, so many drawn evenly (a reservoir:
    the file may be larger than the memory).
    """
    texts: list[str] = []
    found, splits = 0, set()
    draw = random.Random(0)
    # Hyphens become underscores in split names, as everywhere behind the annotation file.
    wanted = split.replace("-", "_")
    with Progress("read captions", unit="lines") as progress:
        for sample in read_annotations(annotations):
            splits.add(sample.split)
            for text in _of_sample(sample) if sample.split == wanted else ():
                found += 1
                if len(texts) < limit:
                    texts.append(text)
                elif (place := draw.randrange(found)) < limit:
                    texts[place] = text
            progress.update()
    if not texts:
        names = ", ".join(sorted(splits))
        raise UserError(f"{annotations} has no captions of split {split!r}; its splits: {names}")
    return texts, found


def _of_sample(sample: Sample) -> list[str]:
    return [*sample.captions, *(text for i in sample.instances for text in i.captions)]
