"""What to say of a scene: sentences of every instance and of the whole, and the facts behind them.

Everything stated is true with a margin, and the sentences of an instance together tell it from
every other entity of its scene (facts.py). Where that cannot be done the scene is not used.
"""

import dataclasses
from collections import Counter

import numpy as np

from instap_jax.data.synthetic import language
from instap_jax.data.synthetic.facts import RELATIONS, SIDES, Fact, Observation, inplace_facts
from instap_jax.data.synthetic.scene import Entity, Scene, pick

SUMMARY_WORDS = 24
_MAX_SENTENCES = 4
_RARE = ("towards", "away", "faster", "slower", "behind", "in_front")


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """Sentences, in order, and the facts they state."""

    sentences: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    @property
    def key(self) -> tuple:
        """What is stated, however it is worded: equal keys mean the same caption."""
        return tuple(sorted((fact.kind, str(fact.value)) for fact in self.facts))


def describe_instances(rng: np.random.Generator, seen: Observation) -> list[Description] | None:
    """One description per entity, or None where one cannot be told from another."""
    descriptions = []
    for i in range(len(seen.scene.entities)):
        facts = _choose_facts(rng, seen, i)
        if facts is None:
            return None
        descriptions.append(_word(rng, facts, seen.scene.entities[i]))
    return descriptions


def identifies(seen: Observation, facts: tuple[Fact, ...], i: int) -> bool:
    """Whether the facts, all true of entity i, hold of no other entity of its scene."""
    return not _confusable(seen, facts, i)


def summary_key(scene: Scene) -> tuple:
    """What the summary of a global caption tells scenes apart by."""
    looks = sorted((entity.look.colour, entity.look.shape) for entity in scene.entities)
    return (scene.background.kind, scene.background.tone, *looks)


def describe_scene(rng: np.random.Generator, seen: Observation) -> tuple[str, ...]:
    """Sentences on the whole: a summary that names the entities, then details one by one."""
    scene = seen.scene
    details = [_detail(rng, seen, i) for i in rng.permutation(len(scene.entities))]
    if rng.random() < 0.6:
        details.append(language.say_background(rng, scene.background))
    return (_summary(rng, scene), *details)


def look_of(entity: Entity) -> tuple[str, str, str, str]:
    """(size, texture, colour, shape)."""
    look = entity.look
    return entity.size, look.texture, look.colour, look.shape


# --- facts ---------------------------------------------------------------------------------------


def _choose_facts(rng: np.random.Generator, seen: Observation, i: int) -> tuple[Fact, ...] | None:
    """Two to four sentences' worth of facts that identify entity i; the look comes first."""
    scene = seen.scene
    size, texture, colour, shape = look_of(scene.entities[i])
    size = size if rng.random() < 0.75 else None
    # Where others have no pattern either, it goes without saying more often.
    texture = texture if texture != "plain" or rng.random() < 0.4 else None
    chosen = [Fact("look", (size, texture, colour, shape))]
    lacking = []
    if scene.frames > 1:
        chosen.append(_motion_fact(rng, scene.entities[i]))
        inplace = inplace_facts(scene, i)
        chosen += [fact for fact in inplace if fact.kind == "inplace"]
        lacking = [fact for fact in inplace if fact.kind == "not_inplace"]
    relations = _shuffled(rng, _relation_facts(rng, seen, i))
    # What is rarely true is said when it is; then a side, which only the scene can show.
    rank = {kind: 0 if kind in _RARE else 0.9 if kind in SIDES else 1 for kind in RELATIONS}
    relations.sort(key=lambda fact: rank[fact.kind] + 1.5 * rng.random())
    positions = _shuffled(rng, [Fact("position", value) for value in seen.positions(i)])
    chosen += relations[:1]
    if positions and (len(chosen) < 2 or rng.random() < 0.4):
        chosen.append(positions[0])
    for fact in (*relations[1:], *positions, *lacking):
        confusable = _confusable(seen, chosen, i)
        if not confusable:
            break
        if fact not in chosen and any(seen.refutes(fact, i, j) for j in confusable):
            chosen.append(fact)
    if _confusable(seen, chosen, i) or len(chosen) < 2:
        return None
    chosen = _pruned(seen, chosen, i)
    return tuple(chosen) if len(chosen) <= _MAX_SENTENCES else None


def _pruned(seen: Observation, chosen: list[Fact], i: int) -> list[Fact]:
    """Drops relations and positions beyond four facts, as long as the rest identifies."""
    for fact in [fact for fact in chosen if fact.kind == "position" or fact.kind in RELATIONS]:
        rest = [other for other in chosen if other is not fact]
        if len(chosen) > _MAX_SENTENCES and not _confusable(seen, rest, i):
            chosen = rest
    return chosen


def _confusable(seen: Observation, facts, i: int) -> list[int]:
    others = (j for j in range(len(seen.scene.entities)) if j != i)
    return [j for j in others if not any(seen.refutes(fact, i, j) for fact in facts)]


def _motion_fact(rng: np.random.Generator, entity: Entity) -> Fact:
    motion = entity.motion
    speed = motion.speed if rng.random() < 0.85 else None
    return Fact("motion", (motion.path, motion.direction, speed, motion.event))


def _relation_facts(rng: np.random.Generator, seen: Observation, i: int) -> list[Fact]:
    facts = []
    for kind, other in seen.relations(i):
        words = reference(rng, seen.scene, other, i, colour=kind != "same_colour")
        if words:
            facts.append(Fact(kind, words, other))
    return facts


def reference(
    rng: np.random.Generator, scene: Scene, k: int, speaker: int | None, *, colour: bool = True
) -> str | None:
    """Words that name entity k and no other, said of or beside entity `speaker`; None if none do.

    'the other red circle' is a name where the speaker is the only one else that fits.
    """
    size, texture, tint, shape = look_of(scene.entities[k])
    if texture == "plain":
        texture = None
    choices = [(None, None, tint, shape), (size, None, tint, shape), (None, texture, tint, shape)]
    if not colour:
        choices = [(None, None, None, shape), (size, None, None, shape)]
    names = []
    for choice in choices:
        fits = {
            j
            for j, entity in enumerate(scene.entities)
            if all(said in (None, is_) for said, is_ in zip(choice, look_of(entity)))
        }
        if fits == {k}:
            names.append(f"the {language.noun(choice)}")
        elif fits == {k, speaker}:
            names.append(f"the other {language.noun(choice)}")
    # The shortest name most of the time.
    return (names[0] if rng.random() < 0.6 else pick(rng, names)) if names else None


# --- sentences -----------------------------------------------------------------------------------


def _word(rng: np.random.Generator, facts: tuple[Fact, ...], entity: Entity) -> Description:
    look, rest = facts[0], list(facts[1:])
    subjects = (
        "it",
        "it",
        f"the {entity.look.shape}",
        f"the {entity.look.colour} {entity.look.shape}",
    )
    sentences = []
    kinds = [fact.kind for fact in rest]
    if "inplace" in kinds:
        motion, inplace = rest[kinds.index("motion")], rest[kinds.index("inplace")]
    # 'It does not move. It spins.' would sound like a contradiction.
    if "inplace" in kinds and (motion.value[0] == "still" or rng.random() < 0.7):
        rest = [fact for fact in rest if fact not in (motion, inplace)]
        sentences.append(language.say_motion(rng, motion, pick(rng, subjects), inplace))
    # As an object it is 'it': 'the star is above the circle' would leave open which circle.
    sentences += [language.say(rng, fact, pick(rng, subjects), "it") for fact in rest]
    sentences = _shuffled(rng, sentences)
    sentences.insert(0, language.say(rng, look, "it"))
    return Description(tuple(sentences), facts)


def _summary(rng: np.random.Generator, scene: Scene) -> str:
    """Names every entity; with as many attributes as fit into `SUMMARY_WORDS` words."""
    looks = [look_of(scene.entities[k]) for k in rng.permutation(len(scene.entities))]
    place = language.background_words(scene.background)
    options = []
    for size, texture in ((True, True), (False, True), (True, False), (False, False)):
        counts = Counter(
            (own if size else None, pattern if texture and pattern != "plain" else None, *rest)
            for own, pattern, *rest in looks
        )
        names = language.listed([language.counted(look, n) for look, n in counts.items()])
        options += [f"{names} on {place}", f"on {place} we see {names}"]
    short = [option for option in options if len(option.split()) <= SUMMARY_WORDS]
    return language.finish(pick(rng, short or options[-2:]))


def _detail(rng: np.random.Generator, seen: Observation, i: int) -> str:
    """A sentence on one entity: its motion, place, relation or only its look."""
    scene, entity = seen.scene, seen.scene.entities[i]
    subject = _subject(rng, scene, i)
    if scene.frames > 1 and rng.random() < 0.75:
        inplace = [fact for fact in inplace_facts(scene, i) if fact.kind == "inplace"]
        return language.say_motion(rng, _motion_fact(rng, entity), subject, *inplace)
    facts = [Fact("position", value) for value in seen.positions(i)]
    # A name that leans on the speaker ('the other') needs the speaker named in full.
    facts += [fact for fact in _relation_facts(rng, seen, i) if "other" not in fact.value]
    if facts:
        return language.say(rng, pick(rng, facts), subject)
    return language.say(rng, Fact("look", look_of(entity)), subject)


def _subject(rng: np.random.Generator, scene: Scene, i: int) -> str:
    """The full look with 'the', or 'one' where others look the same."""
    look = look_of(scene.entities[i])
    if look[1] == "plain" and rng.random() < 0.6:
        look = (look[0], None, *look[2:])
    same = sum(
        all(said in (None, is_) for said, is_ in zip(look, look_of(entity)))
        for entity in scene.entities
    )
    return f"the {language.noun(look)}" if same == 1 else f"one {language.noun(look)}"


def _shuffled(rng: np.random.Generator, items: list) -> list:
    return [items[k] for k in rng.permutation(len(items))]
