"""What every task of `instap evaluate` is given: the run, its encoder, the suites, the options."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from instap_jax import config_check, sharding
from instap_jax.data.pipeline import parse_corpora
from instap_jax.errors import UserError
from instap_jax.evaluation import protocols
from instap_jax.evaluation.encoder import Encoder, load_encoder
from instap_jax.evaluation.features import SuiteFeatures, embed_suite
from instap_jax.evaluation.results import DIRECTORY, Protocol
from instap_jax.types import Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of `instap evaluate` that tasks read: one field for each flag of that name.

    Attributes:
      batch_size: samples a step, over all devices.
      frames: T of a clip; None: as many as the run was trained on.
      text_length: tokens that captions are cut to; None: the preset's, or as in training.
      workers: processes that read and decode; None: `data.workers` of the run.
      checkpoint: 'newest' or 'best', which checkpoint of the run.
      protocol: name of a retrieval preset; '': a suite of one's own.
      expected_ids: file with the ids that the suite must hold; '': not checked.
      merge_equal_texts: equal texts of a suite are one, correct with all that have it.
      top_k: candidates that VTM re-ranks; None: 128 where the run trained VTM; 0: none.
      dual_softmax: also score so.
      token_memory: GiB of a host's memory for the visual tokens that VTM reads.
      save_scores: keep embeddings and scores beside the results.
      probe_videos, probe_images: 'DIR:SPLIT' on which the probes of that kind are fitted.
      attention_cases: instances of every suite whose attention maps are drawn.
      clips, crops: views of a video, and of a frame, that classification averages.
    """

    batch_size: int = 32
    frames: int | None = None
    text_length: int | None = None
    workers: int | None = None
    checkpoint: str = "newest"
    protocol: str = ""
    expected_ids: str = ""
    merge_equal_texts: bool = False
    top_k: int | None = None
    dual_softmax: bool = False
    token_memory: float = 4.0
    save_scores: bool = False
    probe_videos: str = ""
    probe_images: str = ""
    attention_cases: int = 6
    clips: int = 1
    crops: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """One split of packed data, of one kind, to be measured whole."""

    directory: str
    split: str
    kind: Kind


def parse_suites(videos: str, images: str) -> list[Suite]:
    """The suites of one evaluation from 'DIR:SPLIT,...' of each kind, videos first.

    Raises:
      UserError: two have one split name, by which protocols, columns and files tell them apart.
    """
    suites: dict[str, Suite] = {}
    for kind, text in ((Kind.VIDEO, videos), (Kind.IMAGE, images)):
        for corpus in parse_corpora(text):
            if corpus.split in suites:
                raise UserError(
                    f"{corpus.directory}:{corpus.split}: another suite is called {corpus.split!r}, "
                    "and results are named by that alone; pack one of the two under another split "
                    "name"
                )
            suites[corpus.split] = Suite(directory=corpus.directory, split=corpus.split, kind=kind)
    return list(suites.values())


class Context:
    """Shared by the tasks of one evaluation; what is costly is made when first asked for, once.

    Attributes:
      workdir: of the run. config: its resolved configuration.
      suites: what to measure on, in order.
      mesh: of all devices; it is the current one while a task runs.
      preset: the retrieval protocol.
    """

    def __init__(self, workdir: Path, suites: Sequence[Suite], options: Options):
        self.workdir, self.suites, self.options = Path(workdir), list(suites), options
        self.config: ConfigDict = config_check.read(self.workdir)
        self.mesh: jax.sharding.Mesh = sharding.mesh_of_all()
        shards = sharding.data_shards(self.mesh)
        if options.batch_size % shards:
            raise UserError(f"--batch_size must be a multiple of {shards} devices")
        self.preset = protocols.find(options.protocol)
        self._features: dict[Suite, SuiteFeatures] = {}

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The checkpoint that is evaluated.

        Raises:
          UserError: see `load_encoder`; texts longer than it has positions for.
        """
        encoder = load_encoder(self.workdir, self.mesh, which=self.options.checkpoint)
        length = self.options.text_length or self.preset.text_length or encoder.text_length
        most = encoder.config.text.max_length
        if length > most:
            asked = "" if self.options.text_length else f"--protocol={self.preset.name}: "
            raise UserError(
                f"{asked}texts of {length} tokens, and the text encoder of {self.workdir} has "
                f"positions for {most}; give --text_length={most} or less"
            )
        return dataclasses.replace(encoder, text_length=length)

    def features(self, suite: Suite, *, tokens: bool = False) -> SuiteFeatures:
        """The embeddings of a suite: each suite once, however many tasks want it.

        Args:
          tokens: the visual tokens are wanted too. `--token_memory` is that of one suite: asking
            for another's drops those that are here.
        """
        found = self._features.get(suite)
        if found is None or (tokens and found.tokens is None):
            options = self.options
            if tokens:
                self._drop_tokens()
            self._features[suite] = embed_suite(
                self.encoder,
                suite.directory,
                suite.split,
                suite.kind,
                batch_size=options.batch_size,
                frames=options.frames or self.preset.frames,
                workers=options.workers,
                token_limit=int(options.token_memory * (1 << 30)) if tokens else None,
            )
        return self._features[suite]

    def _drop_tokens(self) -> None:
        kept = self._features.items()
        self._features = {suite: dataclasses.replace(one, tokens=None) for suite, one in kept}

    def protocol(
        self, suite: Suite, *, unit: str, scoring: str, frames: int, notes: str = ""
    ) -> Protocol:
        """The protocol of a measurement of this run's checkpoint on `suite`."""
        return Protocol(
            suite=suite.split,
            unit=unit,
            scoring=scoring,
            frames=frames,
            weights=self.encoder.weights,
            step=self.encoder.step,
            notes=notes,
        )

    def directory(self, task: str) -> Path:
        """`workdir/eval/TASK/`, made if need be: for pictures and arrays beside TASK.json."""
        path = self.workdir / DIRECTORY / task
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be made: {error.strerror}") from error
        return path
