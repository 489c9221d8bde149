"""Reads captions of the embedded set back into claims and measures them on the boxes.

Independent of the generator: it knows only the words, the annotated boxes and the attributes.
"""

import dataclasses
import re

import numpy as np

SIZES = ("small", "medium", "large")
COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black"]
SHAPES = [
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "heart",
    "moon",
    "hourglass",
]
PATTERNS = {
    "striped": "striped|stripes",
    "dotted": "dotted|dots",
    "checkered": "checkered|checks",
    "wavy": "wavy",
    "netted": "netted|net",
    "plain": "plain|without a pattern",
}
NP = r"(it|(?:the|one) [a-z ]+?)"
ZONE = (
    r"(?:in|at|on|near) the "
    r"((?:upper|lower) (?:left|right)|left|right|top|bottom|middle)(?: part| side)?"
)
RELATIONS = [
    (rf"{NP} is (?:to the )?left of {NP}", "left_of", "right_of"),
    (rf"{NP} is (?:to the )?right of {NP}", "right_of", "left_of"),
    (rf"{NP} is (?:above|higher than) {NP}", "above", "below"),
    (rf"{NP} is (?:below|lower than) {NP}", "below", "above"),
    (rf"{NP} is larger than {NP}", "larger", "smaller"),
    (rf"{NP} is smaller than {NP}", "smaller", "larger"),
    (rf"{NP} (?:has the same colour as|shares its colour with) {NP}", "same_colour", None),
    (rf"{NP} is partly hidden by {NP}", "behind", "in_front"),
    (rf"{NP} covers part of {NP}", "in_front", "behind"),
    (rf"{NP} (?:moves towards(?! the (?:left|right)\b)|comes nearer to) {NP}", "towards", None),
    (rf"{NP} (?:moves away|gets farther) from {NP}", "away", None),
    (rf"{NP} (?:moves|is) faster than {NP}", "faster", "slower"),
    (rf"{NP} (?:moves|is) slower than {NP}", "slower", "faster"),
]
POSITIONS = [
    (rf"{NP} (?:is|can be seen) {ZONE}(?: of the picture)?", "always"),
    (rf"{NP} starts {ZONE}", "start"),
    (rf"at first {NP} is {ZONE}", "start"),
    (rf"{NP} ends up {ZONE}", "end"),
    (rf"in the end {NP} is {ZONE}", "end"),
]
_VERBS = (
    r"moves|drifts|creeps|goes|slowly goes|races|rushes|travels|zigzags|loops|bounces|hops|"
    r"slowly hops|stays|rests|keeps its place|does not move|spins on|blinks on|pulses on|"
    r"turns round|flashes|comes in|comes into"
)
_INPLACE = {
    "spin": "spin|turns round",
    "blink": "blink|flash",
    "pulse": "puls|grow|keeps its size",
}
SIDES = {"left_of": (0, -1), "right_of": (0, 1), "above": (1, -1), "below": (1, 1)}
VECTORS = {
    "right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "up_right": (1, -1),
    "up_left": (-1, -1), "down_right": (1, 1), "down_left": (-1, 1),
}  # fmt: skip


@dataclasses.dataclass
class Claim:
    kind: str
    subject: str
    value: object = None
    other: str | None = None


def read(sentence: str) -> Claim:
    """The one claim of a sentence; raises where it fits no pattern."""
    text = sentence.lower().rstrip(".")
    for pattern, kind, reverse in RELATIONS:
        match = re.fullmatch(pattern, text)
        if match and match[2] == "it":  # in an instance's caption: the instance itself
            return Claim(reverse, "it", None, match[1])
        if match:
            return Claim(kind, match[1], None, match[2])
    for pattern, when in POSITIONS:
        if match := re.fullmatch(pattern, text):
            return Claim("position", match[1], (when, match[2]))
    if match := re.fullmatch(
        rf"{NP} (?:does not|never) (spin|spins|blink|blinks|pulse|pulses)", text
    ):
        return Claim("not_inplace", match[1], match[2].rstrip("s"))
    if match := re.fullmatch(rf"{NP} keeps its size", text):
        return Claim("not_inplace", match[1], "pulse")
    if match := re.fullmatch(rf"{NP} ((?:{_VERBS})\b.*)", text):
        return Claim("motion", match[1], _motion(match[2]))
    spinning = r"(?:keeps )?(?:spin|blink|flash|puls|grow)\w*(?: and shrink\w+)?(?: all the time)?"
    if match := re.fullmatch(rf"{NP} ({spinning})", text):
        return Claim("inplace", match[1], _inplace(match[2]))
    if any(shape in text.split() or shape + "," in text.split() for shape in SHAPES):
        return Claim("look", "it", attributes(text))
    raise AssertionError(f"cannot be read: {sentence!r}")


def attributes(text: str) -> dict[str, str]:
    """Attribute words of a phrase, by attribute; a plural counts as its singular."""
    words = [
        re.sub(r"^(cross|hourglass)es$|(?<=[^s])s$", r"\1", w) for w in re.findall(r"\w+", text)
    ]
    found = {}
    for name, known in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES)):
        hits = {word for word in words if word in known}
        assert len(hits) <= 1, text
        if hits:
            found[name] = hits.pop()
    for texture, pattern in PATTERNS.items():
        if re.search(rf"\b({pattern})\b", text):
            assert "texture" not in found, text
            found["texture"] = texture
    return found


def _inplace(text: str) -> str | None:
    return next((name for name, words in _INPLACE.items() if re.search(words, text)), None)


def _motion(text: str) -> dict[str, str | None]:
    slow = re.search("slowly|drifts|creeps", text)
    fast = re.search("quickly|fast|races|rushes", text)
    path = "straight"
    for name, words in (
        ("still", "stays still|does not move|one place|its place|on the spot|without moving"),
        ("zigzag", "zigzag"), ("circling", "loops|round"), ("bouncing", "bounces|hops"),
    ):  # fmt: skip
        if re.search(words, text):
            path = name
            break
    # 'comes in from the left and moves ...' tells where from before it tells where to.
    event = "enters" if "comes in" in text else None
    event = "leaves" if re.search("leaves the|out of view", text) else event
    origin, _, rest = text.partition(" and ") if event == "enters" else ("", "", text)
    return {
        "path": path,
        "speed": "slow" if slow else "fast" if fast else None,
        "direction": None if path == "still" else _direction(rest),
        "event": event,
        "from": origin.removeprefix("comes in from the ") if "from" in origin else None,
        "inplace": _inplace(text),
    }


def _direction(text: str) -> str:
    if "up and down" in text:
        return "vertical"
    if "from side to side" in text:
        return "horizontal"
    for turn in ("anticlockwise", "clockwise"):
        if turn in text:
            return turn
    up = "up" if re.search(r"\b(up|upwards|upper)\b", text) else None
    down = "down" if re.search(r"\b(down|downwards|lower)\b", text) else None
    side = next((side for side in ("left", "right") if re.search(rf"\b{side}\b", text)), None)
    return "_".join(filter(None, (up, down, side)))


class Measured:
    """Boxes of a sample on every frame, and what they say about a claim."""

    def __init__(self, sample: dict, frames: int, size: tuple[int, int]):
        self.instances = sample["instances"]
        self.attributes = [instance["attributes"] for instance in self.instances]
        self.size, self.short, self.frames = np.array(size), min(size), frames
        self.boxes = np.stack([self._on_grid(instance) for instance in self.instances])
        self.centre = (self.boxes[..., :2] + self.boxes[..., 2:]) / 2

    def _on_grid(self, instance: dict) -> np.ndarray:
        rows = np.array(instance["boxes"], float)
        times = np.arange(self.frames)
        boxes = np.stack([np.interp(times, rows[:, 0], column) for column in rows[:, 1:].T], -1)
        boxes[(times < rows[0, 0]) | (times > rows[-1, 0])] = np.nan
        for a, b in instance.get("absent", ()):
            boxes[a : b + 1] = np.nan
        return boxes

    def matching(self, phrase: str, speaker: int | None) -> list[int]:
        """Entities that a noun phrase fits; 'the other X' never fits its speaker."""
        if phrase == "it":
            return [speaker]
        wanted = attributes(phrase).items()
        fits = [k for k, own in enumerate(self.attributes) if wanted <= own.items()]
        return [k for k in fits if k != speaker] if " other " in phrase else fits

    def holds(self, claim: Claim, i: int, speaker: int | None) -> bool | None:
        """Whether the claim is true of entity i; None where boxes cannot tell."""
        own = self.attributes[i]
        if claim.kind == "look":
            return claim.value.items() <= own.items()
        if claim.kind in ("inplace", "not_inplace"):
            return (own["inplace"] == claim.value) == (claim.kind == "inplace")
        if claim.kind == "motion":
            return self._moves(claim.value, i)
        if claim.kind == "position":
            return self._placed(*claim.value, i)
        answers = [
            self._related(claim.kind, i, j) for j in self.matching(claim.other, speaker) if j != i
        ]
        return None if None in answers else any(answers)

    def _placed(self, when: str, zone: str, i: int) -> bool:
        seen = self.centre[i][~np.isnan(self.centre[i, :, 0])] / self.size
        x, y = {"always": seen, "start": seen[:1], "end": seen[-1:]}[when].T
        if zone == "middle":
            return bool(np.all(np.abs(x - 0.5) < 0.09) and np.all(np.abs(y - 0.5) < 0.09))
        tests = {"left": x < 0.37, "right": x > 0.63, "upper": y < 0.37, "top": y < 0.37}
        tests |= {"lower": y > 0.63, "bottom": y > 0.63}
        return all(bool(np.all(tests[word])) for word in zone.split())

    def _related(self, kind: str, i: int, j: int) -> bool | None:
        gap = self.centre[i] - self.centre[j]
        gap = gap[~np.isnan(gap[:, 0])] / self.short
        a, b = self.attributes[i], self.attributes[j]
        if kind in SIDES:
            axis, sign = SIDES[kind]
            return bool(len(gap) and np.all(sign * gap[:, axis] > 0.1))
        if kind in ("larger", "smaller"):
            difference = SIZES.index(a["size"]) - SIZES.index(b["size"])
            return difference > 0 if kind == "larger" else difference < 0
        if kind == "same_colour":
            return a["colour"] == b["colour"]
        if kind in ("faster", "slower"):
            order = (a["speed"], b["speed"])
            straight = a["path"] == b["path"] == "straight"
            return straight and order == (
                ("fast", "slow") if kind == "faster" else ("slow", "fast")
            )
        if kind in ("behind", "in_front"):
            return None
        distance = np.linalg.norm(gap, axis=-1)
        change = distance[-1] - distance[0] if len(distance) else 0
        return bool(change < -0.15 if kind == "towards" else change > 0.15)

    def meet(self, i: int, j: int) -> bool:
        """Whether the boxes of two entities touch in some frame (or one is hidden in between)."""
        a, b = self.boxes[i], self.boxes[j]
        apart = np.maximum(a[:, :2], b[:, :2]) - np.minimum(a[:, 2:], b[:, 2:])
        apart = apart[~np.isnan(apart[:, 0])]
        return len(apart) == 0 or bool(apart.max(-1).min() <= 2)

    def _moves(self, claim: dict, i: int) -> bool:
        own = self.attributes[i]
        for key in ("path", "direction", "speed", "event", "inplace"):
            if claim[key] is not None and claim[key] != own[key]:
                return False
        return True

    def motion_shown(self, i: int) -> None:
        """Asserts that the boxes of entity i show its attributes' path, direction and speed."""
        own = self.attributes[i]
        centre, way = self._unhindered(i)
        if own["path"] != "still" and len(centre) < 4:
            return
        span = np.ptp(centre, axis=0) if len(centre) else np.zeros(2)
        if own["path"] == "still":
            assert span.max() < (0.16 if own["inplace"] in ("spin", "pulse") else 0.03), span
        elif own["path"] in ("straight", "zigzag"):
            self._shows_translation(own, centre, way)
        elif own["path"] == "circling":
            turns = self._turns(centre)
            assert (turns > 0) == (own["direction"] == "clockwise"), turns
            if len(centre) == self.frames:
                assert (abs(turns) > 1.4) == (own["speed"] == "fast"), turns
        else:
            axis = 1 if own["direction"] == "vertical" else 0
            assert span[axis] > 1.5 * span[1 - axis], span
            if len(centre) == self.frames:
                length = np.abs(np.diff(centre[:, axis])).sum()
                assert (length > (1.2 if axis else 0.78)) == (own["speed"] == "fast"), length

    def _shows_translation(self, own: dict, centre: np.ndarray, way: np.ndarray) -> None:
        vector = np.array(VECTORS[own["direction"]], float)
        vector /= np.linalg.norm(vector)
        passed = (way[-1] - way[0]) / (self.frames - 1)
        if passed < 0.4:
            return
        moved = (centre[-1] - centre[0]) / passed  # of the whole clip at this pace
        assert (moved @ vector > 0.52) == (own["speed"] == "fast"), moved
        if own["path"] == "straight":
            assert moved @ vector > 0.9 * np.linalg.norm(moved), moved

    def _turns(self, centre: np.ndarray) -> float:
        low, high = centre.min(0), centre.max(0)
        relative = centre - (low + high) / 2
        angle = np.unwrap(np.arctan2(relative[:, 1], relative[:, 0]))
        return float((angle[-1] - angle[0]) / (2 * np.pi))

    def _unhindered(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Centres in short sides, and frames, where neither the edge nor another cuts the box."""
        box = self.boxes[i]
        with np.errstate(invalid="ignore"):
            whole = np.all(box[:, :2] > 0, -1) & np.all(box[:, 2:] < self.size, -1)
            extent = box[:, 2:] - box[:, :2]
            if self.attributes[i]["inplace"] not in ("spin", "pulse") and whole.any():
                whole &= np.all(extent > np.nanmax(extent[whole], 0) - 2.5, -1)
        return self.centre[i][whole] / self.short, np.flatnonzero(whole)
