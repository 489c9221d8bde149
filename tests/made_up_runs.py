"""Made-up runs for tests of the report page, and a reader of the page."""

import json
import math
from html.parser import HTMLParser

import numpy as np
from ranked import retrieval_metrics

from instap_jax.evaluation.probe import ProbeResult
from instap_jax.evaluation.results import (
    Measurement,
    Protocol,
    write_result,
)

EVIL = """<script x='"'>alert('&')</script>"""  # a text that must stay text on a page
SHORT = [{"step": 1, "loss": 2.0}, {"step": 5, "loss": 1.5}]  # where curves are not the point


def make_lines(seed, steps=400, every=5, **extra):
    """A log that looks like a training run's."""
    rng = np.random.default_rng(seed)
    for step in [1, *range(every, steps + 1, every)]:
        decay = math.exp(-step / (0.3 * steps))
        seconds = 0.4 * (1 + 0.1 * rng.random()) + (6.0 if step == 1 else 0)
        yield {
            "step": step,
            "time": 1.7e9 + 0.42 * step,
            "loss": 0.4 + 1.5 * decay + 0.08 * rng.normal(),
            "learning_rate": 1.5e-4 * min(step / 40, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "grad_norm": math.exp(2 * decay - 1 + 0.4 * rng.normal()),
            "param_norm": 80 + 4 * (1 - decay),
            "examples_per_second": 16 / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": 0.012 * rng.random() * seconds,
            "compute_seconds": 0.99 * seconds,
            "temperature": 0.07 - 0.02 * (1 - decay),
            **extra,
        }


def make_run(workdir, *, seed=0, stage="distill", skill=2.0, lines=None, results=True):
    """Writes what a trained and evaluated run leaves behind (but its checkpoints)."""
    workdir.mkdir(parents=True)
    config = {"stage": stage, "steps": 400, "data": {"batch_size": 16, "frames": 4}}
    changed = {"steps": [1000, 400], "data.batch_size": [64, 16]}
    (workdir / "config.json").write_text(
        json.dumps(
            {
                "config": config,
                "changed": changed,
                "file": "configs/tiny.py",
                "overrides": ["steps=400"],
            }
        )
    )
    logged = list(make_lines(seed)) if lines is None else lines
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    if results:
        write_result(workdir, "retrieval", made_up_retrieval(seed, skill), config=config)
        write_result(workdir, "probe", made_up_probes(seed, skill), config=config)
    return workdir


def made_up_retrieval(seed, skill):
    rng = np.random.default_rng(seed)
    measurements = []
    for suite, unit, frames, count, gain in (
        ("img_1k", "global captions", 1, 64, 1.0),
        ("video_1k", "global captions", 4, 48, 0.8),
        ("video_1k", "instance captions", 4, 150, 0.4),
    ):
        scores = rng.normal(size=(count, count)) + skill * gain * np.eye(count)
        measurements.append(
            Measurement(
                protocol=Protocol(
                    suite=suite,
                    unit=unit,
                    scoring="dual encoder",
                    frames=frames,
                    weights="student",
                    step=400,
                ),
                metrics=retrieval_metrics(scores, [[i] for i in range(count)]),
                counts={"texts": count, "videos": count},
            )
        )
    return measurements


def made_up_probes(seed, skill):
    rng = np.random.default_rng(seed)
    measurements = []
    for weights, step, gain in (
        ("student", 400, 15 * skill),
        ("student, random initialisation", 0, 5),
    ):
        metrics = {}
        for attribute, chance in (
            ("shape", 22.0),
            ("colour", 14.0),
            ("texture", 31.0),
            ("direction", 26.0),
        ):
            accuracy = min(97.0, chance + gain + 6 * rng.random())
            metrics[attribute] = ProbeResult(
                accuracy=accuracy,
                low=accuracy - 4,
                high=min(accuracy + 4, 100.0),
                chance=chance,
                classes=6,
                train_examples=900,
                test_examples=300,
            )
        protocol = Protocol(
            suite="img_1k", unit="instances", scoring="20-NN", frames=1, weights=weights, step=step
        )
        counts = {"training instances": 900, "test instances": 300}
        measurements.append(Measurement(protocol=protocol, metrics=metrics, counts=counts))
    return measurements


class Page(HTMLParser):
    """Checks that every element is closed in order; collects text, tags and attributes."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, *pair) for pair in attributes]
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, *pair) for pair in attributes]

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))
