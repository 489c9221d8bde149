"""Task 'retrieval': whole samples against captions, instances against their sentences.

Every suite and unit has a measurement for each way of scoring, side by side: the dual encoder;
that re-ranked by VTM, where the run trained it; and, where it is asked for, dual softmax.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instap_jax.data.records import open_source
from instap_jax.errors import UserError
from instap_jax.evaluation import protocols
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.encoder import Encoder
from instap_jax.evaluation.features import SuiteFeatures, whole_caption
from instap_jax.evaluation.protocols import RetrievalProtocol
from instap_jax.evaluation.ranking import Ranking, rank_queries
from instap_jax.evaluation.rerank import TOP_K, Matcher, Texts, rerank
from instap_jax.evaluation.results import Measurement
from instap_jax.evaluation.retrieval import TIE_RULE, Positives, metrics_of_ranks
from instap_jax.evaluation.saved import save_ranking
from instap_jax.train.objectives import term_weights

SAMPLES, INSTANCES = "global captions", "instance captions"
DUAL, RERANKED, DUAL_SOFTMAX = (
    "dual encoder, cosine",
    "dual encoder, top {k} re-ranked by VTM",
    "dual encoder, dual softmax (sees all queries of the suite)",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What is matched: whole samples with captions, or instances with sentences.

    Attributes:
      name: SAMPLES or INSTANCES.
      texts: as they are tokenized.
      text: float32 [N, p]. visual: float32 [M, p].
      temperature: of the contrast that trained them.
      term: the loss term that trained the match head on this unit.
      shown: how the visual side was made, for the protocol.
    """

    name: str
    texts: list[str]
    text: np.ndarray
    visual: np.ndarray
    positives: Positives
    temperature: float
    term: str
    shown: str


def measure(context: Context) -> list[Measurement]:
    """Every sample of a suite against every caption; every instance against every sentence.

    Raises:
      UserError: a suite that is not what the protocol says, NaN scores, a re-ranking that the run
        cannot do, or a run that embeds no texts.
    """
    options, preset = context.options, context.preset
    if preset.name and len(context.suites) != 1:
        raise UserError(
            f"--protocol={preset.name} is of one suite, but {len(context.suites)} are given"
        )
    ranks = {term for term in ("vtm", "inst_vtm") if can_rerank(context, term)}
    if options.top_k and not ranks:
        raise UserError(
            f"--top_k={options.top_k}: {context.workdir} cannot be re-ranked, it was trained "
            "without VTM (config.align.vtm and config.align.inst_vtm); leave out --top_k"
        )
    matchers: dict[str, Matcher] = {}
    if ranks and options.top_k != 0:
        encoder = context.encoder
        matcher = Matcher(encoder.graphdef, encoder.params["model"], encoder.mesh)
        matchers = dict.fromkeys(ranks, matcher)
    expected = protocols.read_ids(options.expected_ids) if options.expected_ids else ()
    measured = []
    for suite in context.suites:
        measured += _measure_suite(context, suite, matchers, expected)
    return measured


def _measure_suite(
    context: Context, suite: Suite, matchers: dict[str, Matcher], expected: Sequence[str]
) -> list[Measurement]:
    """Every unit of a suite; what it holds, above all the visual tokens, is free afterwards.

    Args:
      matchers: by the loss term that trained the match head.
      expected: ids that the suite must hold; (): not checked.
    """
    preset = context.preset
    size = len(open_source(suite.directory, suite.split, suite.kind))
    # At once, but with ids to name the missing ones are worth the reading.
    protocols.check_size(preset, suite.split, suite.kind, None if expected else size)
    context.encoder.require_texts()
    found = context.features(suite, tokens="vtm" in matchers)
    protocols.check(preset, suite.split, found.facts, expected=expected)
    units = units_of(context.encoder, preset, found, merge=context.options.merge_equal_texts)
    return [
        one
        for unit in units
        for one in _measure_unit(context, suite, found, unit, matchers.get(unit.term))
    ]


def can_rerank(context: Context, term: str) -> bool:
    """Whether the run trained the match head by this term."""
    return context.config.stage == "align" and term in term_weights(context.config)


def units_of(
    encoder: Encoder, preset: RetrievalProtocol, found: SuiteFeatures, *, merge: bool = False
) -> list[Unit]:
    """The samples and, where the protocol has them and the run embeds them, the instances.

    Args:
      merge: equal texts are one, correct with all that have it.
    """
    texts, owner = protocols.texts_of(preset, found.facts)
    whole = [whole_caption(one.captions) for one in found.facts]
    units = [
        _unit(
            encoder=encoder,
            merge=merge,
            name=SAMPLES,
            texts=texts,
            owner=owner,
            text=found.text if texts == whole else None,
            visual=found.video,
            temperature=encoder.temperature,
            term="vtm",
            shown="whole picture",
        )
    ]
    if preset.instances and found.instance is not None and len(found.instance):
        own = "inst_vtc" in term_weights(encoder.config)
        units.append(
            _unit(
                encoder=encoder,
                merge=merge,
                name=INSTANCES,
                texts=[whole_caption(one.captions) for one in found.instance_facts],
                owner=range(len(found.instance)),
                text=found.instance_text,
                visual=found.instance,
                temperature=encoder.instance_temperature if own else encoder.temperature,
                term="inst_vtm",
                shown=encoder.instances,
            )
        )
    return units


def _unit(*, encoder, merge: bool, texts, owner: Sequence[int], text, visual, **others) -> Unit:
    correct = [[sample] for sample in owner]
    if merge:
        texts, correct = protocols.merge_equal(texts, owner)
        text = None
    if text is None:
        text = encoder.embed_texts(texts) if texts else np.zeros((0, visual.shape[1]))
    positives = Positives.of(correct, len(visual))
    return Unit(texts=texts, text=text, visual=visual, positives=positives, **others)


def _measure_unit(
    context: Context, suite: Suite, found: SuiteFeatures, unit: Unit, matcher: Matcher | None
) -> list[Measurement]:
    mesh, positives = context.mesh, unit.positives
    k = 0 if matcher is None else context.options.top_k or TOP_K
    t2v = _rank(unit.text, unit.visual, positives, mesh, k)
    v2t = _rank(unit.visual, unit.text, positives.reversed(), mesh, k)
    ranks = {DUAL: (t2v.rank, v2t.rank)}
    logits = None
    if matcher is not None:
        logits = _match(context, found, unit, matcher, t2v, v2t)
        ranks[RERANKED.format(k=k)] = (
            rerank(t2v, logits[0], positives),
            rerank(v2t, logits[1], positives.reversed()),
        )
    if context.options.dual_softmax:
        ranks[DUAL_SOFTMAX] = dual_softmax_ranks(unit, mesh)
    if context.options.save_scores:
        save_ranking(context.directory("retrieval"), suite.split, found, unit, (t2v, v2t), logits)
    notes = _notes(context, found, unit)
    remarks = _remarks(context, unit, reranked=matcher is not None)
    return [
        Measurement(
            protocol=context.protocol(
                suite, unit=unit.name, scoring=scoring, frames=found.frames, notes=notes
            ),
            metrics=metrics_of_ranks(*pair, positives),
            counts={
                "texts": positives.texts,
                "videos": positives.videos,
                "distinct texts": len(set(unit.texts)),
            },
            remarks=remarks,
        )
        for scoring, pair in ranks.items()
    ]


def _rank(queries, candidates, positives, mesh, k: int, **options) -> Ranking:
    return rank_queries(
        queries, candidates, positives, mesh=mesh, top=min(k, len(candidates)), **options
    )


def dual_softmax_ranks(unit: Unit, mesh) -> tuple[np.ndarray, np.ndarray]:
    """Ranks by softmax over the videos times softmax over the texts, of cosine / temperature.

    In logarithms 2 s - log sum exp(s over the candidate's queries), but for a term that is the
    same for all candidates of a query (CAMoE, arXiv 2109.04290, applied at test time).
    """
    scale = 1 / unit.temperature
    sides = {
        "t2v": (unit.text, unit.visual, unit.positives),
        "v2t": (unit.visual, unit.text, unit.positives.reversed()),
    }
    totals = {name: _rank(*side, mesh, 0, scale=scale).log_total for name, side in sides.items()}
    others = {"t2v": totals["v2t"], "v2t": totals["t2v"]}
    t2v, v2t = (
        _rank(*side, mesh, 0, scale=2 * scale, offset=others[name]).rank
        for name, side in sides.items()
    )
    return t2v, v2t


def _match(
    context: Context,
    found: SuiteFeatures,
    unit: Unit,
    matcher: Matcher,
    t2v: Ranking,
    v2t: Ranking,
) -> tuple[np.ndarray, np.ndarray]:
    """The match logits of the candidates of both directions, each pair scored once."""
    videos = unit.positives.videos
    text_side = np.arange(len(t2v.top))[:, None] * videos + t2v.top
    video_side = v2t.top.astype(np.int64) * videos + np.arange(len(v2t.top))[:, None]
    pairs = np.unique(np.concatenate([text_side.ravel(), video_side.ravel()]))
    ids = context.encoder.tokenize(unit.texts)
    texts = Texts(ids=ids, tokens=context.encoder.text_tokens(ids))
    blocks = found.tokens() if unit.name == SAMPLES else context.encoder.crop_blocks(found.crop)
    logits = matcher.score(blocks, texts, pairs // videos, pairs % videos)
    return logits[np.searchsorted(pairs, text_side)], logits[np.searchsorted(pairs, video_side)]


def _notes(context: Context, found: SuiteFeatures, unit: Unit) -> str:
    preset, length, parts = context.preset, context.encoder.text_length, []
    if unit.name == SAMPLES:
        parts.append(preset.line(found.frames, length))
    elif preset.name:
        parts.append(f"preset {preset.name}")
    parts.append(f"texts cut to {length} tokens")
    if context.options.merge_equal_texts:
        parts.append("equal texts merged, each correct with all it belongs to")
    shown = unit.shown if unit.name == SAMPLES else "regions of the instances"
    return "; ".join([*parts, shown, "uniform frames", TIE_RULE])


def _remarks(context: Context, unit: Unit, *, reranked: bool) -> list[str]:
    """What sets this run apart, and so is no part of the protocol that runs are compared under."""
    # Runs with and without an instance branch are compared: each embeds a region its own way.
    remarks = [f"instances: {unit.shown}"] if unit.name == INSTANCES else []
    if not reranked and can_rerank(context, unit.term):
        remarks.append("not re-ranked: --top_k=0")
    elif not reranked:
        equation = {"vtm": "(3)", "inst_vtm": "(9)"}[unit.term]
        remarks.append(f"not re-ranked: this run did not train VTM, equation {equation}")
    if context.options.dual_softmax:
        remarks.append(f"temperature of dual softmax: {unit.temperature:.4f}")
    return remarks
