"""Words for facts: several templates each, small vocabulary, no word with two meanings.

'left' and 'right' are only ever sides (a clip leaves no trace of 'left' as a past tense), 'circle',
'ring' and 'cross' only ever shapes. A template's {s} is the subject, {o} the same as an object.
"""

import re
from collections.abc import Sequence

import numpy as np

from instap_jax.data.synthetic.facts import Fact
from instap_jax.data.synthetic.scene import Background, pick

_DIRECTIONS = {
    "right": ("to the right", "towards the right"),
    "left": ("to the left", "towards the left"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up_right": ("up and to the right", "diagonally to the upper right"),
    "up_left": ("up and to the left", "diagonally to the upper left"),
    "down_right": ("down and to the right", "diagonally to the lower right"),
    "down_left": ("down and to the left", "diagonally to the lower left"),
    "vertical": ("up and down",),
    "horizontal": ("from side to side",),
    "clockwise": ("clockwise",),
    "anticlockwise": ("anticlockwise",),
}
_COMES_FROM = {"right": "left", "left": "right", "up": "bottom", "down": "top"}
_MOVES = {
    ("straight", "slow"): (
        "moves slowly {d}",
        "drifts slowly {d}",
        "creeps {d}",
        "slowly goes {d}",
    ),
    ("straight", "fast"): ("moves quickly {d}", "races {d}", "rushes {d}", "moves fast {d}"),
    ("straight", None): ("moves {d}", "goes {d}", "travels {d}"),
    ("zigzag", "slow"): ("zigzags slowly {d}", "moves slowly {d} in a zigzag"),
    ("zigzag", "fast"): ("zigzags quickly {d}", "rushes {d} in a zigzag"),
    ("zigzag", None): ("zigzags {d}", "moves {d} in a zigzag"),
    ("circling", "slow"): ("loops slowly {d}", "goes round slowly {d}"),
    ("circling", "fast"): ("loops quickly {d}", "goes round and round quickly {d}"),
    ("circling", None): ("loops {d}", "goes round {d}"),
    ("bouncing", "slow"): ("bounces slowly {d}", "slowly hops {d}"),
    ("bouncing", "fast"): ("bounces quickly {d}", "hops fast {d}"),
    ("bouncing", None): ("bounces {d}", "hops {d}"),
    ("still", None): ("stays still", "does not move", "rests in one place", "keeps its place"),
}
_ON_THE_SPOT = {
    "spin": ("spins on the spot", "stays in one place and spins", "turns round without moving"),
    "blink": ("blinks on the spot", "stays in one place and blinks", "flashes without moving"),
    "pulse": ("pulses on the spot", "stays in one place, growing and shrinking"),
}
_AS_IT_GOES = {
    "spin": (" while spinning", ", spinning as it goes"),
    "blink": (" while blinking", ", flashing as it goes"),
    "pulse": (" while pulsing", ", growing and shrinking as it goes"),
}
_INPLACE = {
    "spin": ("{s} spins.", "{s} keeps spinning.", "{s} spins all the time."),
    "blink": ("{s} blinks.", "{s} keeps flashing.", "{s} blinks all the time."),
    "pulse": ("{s} pulses.", "{s} grows and shrinks.", "{s} keeps growing and shrinking."),
}
_NOT_INPLACE = {
    "spin": ("{s} does not spin.", "{s} never spins."),
    "blink": ("{s} does not blink.", "{s} never blinks."),
    "pulse": ("{s} does not pulse.", "{s} keeps its size."),
}
_RELATIONS = {
    "left_of": ("{s} is to the left of {r}.", "{s} is left of {r}.", "{r} is to the right of {o}."),
    "right_of": (
        "{s} is to the right of {r}.",
        "{s} is right of {r}.",
        "{r} is to the left of {o}.",
    ),
    "above": ("{s} is above {r}.", "{s} is higher than {r}.", "{r} is below {o}."),
    "below": ("{s} is below {r}.", "{s} is lower than {r}.", "{r} is above {o}."),
    "larger": ("{s} is larger than {r}.", "{r} is smaller than {o}."),
    "smaller": ("{s} is smaller than {r}.", "{r} is larger than {o}."),
    "same_colour": ("{s} has the same colour as {r}.", "{s} shares its colour with {r}."),
    "behind": ("{s} is partly hidden by {r}.", "{r} covers part of {o}."),
    "in_front": ("{s} covers part of {r}.", "{r} is partly hidden by {o}."),
    "towards": ("{s} moves towards {r}.", "{s} comes nearer to {r}."),
    "away": ("{s} moves away from {r}.", "{s} gets farther from {r}."),
    "faster": ("{s} moves faster than {r}.", "{r} is slower than {o}."),
    "slower": ("{s} moves slower than {r}.", "{r} is faster than {o}."),
}
_ZONES = {
    "left": ("on the left side", "on the left"),
    "right": ("on the right side", "on the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "near the middle"),
}
_POSITIONS = {
    "always": ("{s} is {z}.", "{s} can be seen {z}.", "{s} is {z} of the picture."),
    "start": ("{s} starts {z}.", "At first {s} is {z}."),
    "end": ("{s} ends up {z}.", "In the end {s} is {z}."),
}
_PATTERNS = {
    "plain": "without a pattern",
    "striped": "with stripes",
    "dotted": "with dots",
    "checkered": "with checks",
    "wavy": "with wavy lines",
    "netted": "with a net pattern",
}
_BACKGROUNDS = {
    "plain": "a plain {tone} background",
    "gradient": "a shaded {tone} background",
    "noise": "a noisy {tone} background",
    "stripes": "a striped {tone} background",
    "tiles": "a {tone} background of tiles",
    "grass": "green grass",
    "sky": "a sky with clouds",
    "bricks": "a brick wall",
    "water": "water with waves",
    "pebbles": "{tone} pebbles",
}
_COUNTS = ("no", "one", "two", "three", "four", "five")


def say(rng: np.random.Generator, fact: Fact, subject: str, as_object: str | None = None) -> str:
    """One sentence for one fact.

    Args:
      subject: a noun phrase or 'it', in lower case.
      as_object: the same where it is an object; `subject` by default.
    """
    if fact.kind == "look":
        return _say_look(rng, fact.value, subject)
    if fact.kind == "motion":
        return say_motion(rng, fact, subject)
    if fact.kind in ("inplace", "not_inplace"):
        template = pick(rng, (_INPLACE if fact.kind == "inplace" else _NOT_INPLACE)[fact.value])
        return finish(template.format(s=subject))
    if fact.kind == "position":
        when, zone = fact.value
        words = pick(rng, _ZONES.get(zone, (f"in the {zone}", f"in the {zone} part")))
        template = pick(rng, _POSITIONS[when])
        return finish(template.format(s=subject, z=words))
    template = pick(rng, _RELATIONS[fact.kind])
    return finish(template.format(s=subject, o=as_object or subject, r=fact.value))


def say_motion(
    rng: np.random.Generator, motion: Fact, subject: str, inplace: Fact | None = None
) -> str:
    """One sentence for a path, and for an in-place motion along with it where there is one."""
    path, direction, speed, event = motion.value
    if path == "still" and inplace:
        return finish(f"{subject} {pick(rng, _ON_THE_SPOT[inplace.value])}")
    way = pick(rng, _DIRECTIONS[direction]) if direction else ""
    clause = pick(rng, _MOVES[path, speed]).format(d=way)
    if event == "enters":
        side = _COMES_FROM.get(direction)
        entry = f"comes in from the {side}" if side else "comes into the picture"
        clause = f"{entry} and {clause}"
    elif event == "leaves":
        clause = f"{clause} {pick(rng, ('and leaves the picture', 'and goes out of view'))}"
    if inplace:
        clause += pick(rng, _AS_IT_GOES[inplace.value])
    return finish(f"{subject} {clause}")


def say_background(rng: np.random.Generator, background: Background) -> str:
    """A sentence on the background alone."""
    words = background_words(background)
    if background.kind in ("sky", "grass", "water", "bricks", "pebbles"):
        return finish(pick(rng, (f"behind them we see {words}", f"the background shows {words}")))
    return finish(pick(rng, (f"everything is on {words}", f"the scene has {words}")))


def background_words(background: Background) -> str:
    """A noun phrase with its article."""
    return with_article(_BACKGROUNDS[background.kind].format(tone=background.tone))


def noun(look: Sequence[str | None], number: int = 1) -> str:
    """'large striped red circle' of (size, texture, colour, shape), each but the last optional."""
    words = [word for word in look if word]
    if number > 1:
        words[-1] += "es" if words[-1].endswith("s") else "s"
    return " ".join(words)


def counted(look: Sequence[str | None], number: int) -> str:
    """'a red circle', 'two red circles'."""
    if number == 1:
        return with_article("a " + noun(look))
    return f"{_COUNTS[number]} {noun(look, number)}"


def listed(phrases: Sequence[str]) -> str:
    """'x', 'x and y', 'x, y and z'."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def with_article(phrase: str) -> str:
    """Turns every 'a' into 'an' where the next word begins with a vowel sound."""
    return re.sub(r"\ba (?=[aeiou]|hour)", "an ", phrase)


def finish(text: str) -> str:
    """Capital letter and full stop."""
    return text[0].upper() + text[1:].rstrip(".") + "."


def _say_look(rng: np.random.Generator, look: tuple, subject: str) -> str:
    size, texture, colour, shape = look
    pattern = _PATTERNS.get(texture, "")
    options = [
        f"a {noun(look)}",
        f"this is a {noun(look)}",
        f"here is a {noun(look)}",
        f"a {noun((size, None, colour, shape))} {pattern}",
        f"the {noun((size, shape))} is {' and '.join(filter(None, (texture, colour)))}",
        f"the {noun((size, shape))} is {colour} {pattern}",
    ]
    if size:
        options.append(f"the {noun((texture, colour, shape))} is {size}")
        if texture:
            options.append(f"a {colour} {shape}, {size} and {texture}")
    if subject != "it":
        options = options[:4]
    return finish(with_article(pick(rng, options).strip()))
