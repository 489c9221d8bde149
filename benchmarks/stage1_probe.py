"""What stage 1 learns: entity attributes read off the student's features, trained against random.

    python benchmarks/stage1_probe.py --packed=PACKED --teacher=TEACHER --out=DIR [--seeds=3]

PACKED is what `instap pack` wrote of the embedded set, TEACHER the workdir of a finished
`configs/tiny.py:teacher` run (`launch/quickstart.sh` leaves both). Every seed trains the student
of `configs/tiny.py:stage1` in DIR/seed-N (resumed if it is there) and measures it beside the same
student as it was at random initialisation: the same probes, suites and splits. Prints a Markdown
table: mean over the seeds and the lowest and highest of them.
"""

import argparse
import importlib.util
import json
import statistics
from collections import defaultdict
from pathlib import Path

import jax
from ml_collections import ConfigDict

from instap_jax import config_check, sharding
from instap_jax.data.pipeline import Corpus
from instap_jax.evaluation.encoder import load_encoder
from instap_jax.evaluation.features import embed_suite
from instap_jax.evaluation.probe_task import measure_probes
from instap_jax.train.loop import train
from instap_jax.train.metrics import read_metrics
from instap_jax.train.stop import StopRequest
from instap_jax.types import Kind

SUITES = ((Kind.VIDEO, "video_1k", "val_video"), (Kind.IMAGE, "img_zero_1k", "val_img"))


def tiny_stage1(packed: str, teacher: str, seed: int) -> ConfigDict:
    path = Path(__file__).parent.parent / "configs" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("stage1")
    config.seed = seed
    config.data.videos = f"{packed}:train"
    config.teacher.checkpoint = teacher
    return config


def probe(workdir: Path, packed: str, *, random_weights: bool) -> dict[tuple[str, ...], float]:
    """(suite, probe, attribute) -> accuracy in percent; also the accuracy by chance."""
    mesh = sharding.make_mesh(config_check.read(workdir).mesh)
    found = {}
    with jax.set_mesh(mesh):
        encoder = load_encoder(workdir, mesh, random_weights=random_weights)
        for kind, suite, fit in SUITES:
            corpora = [Corpus(packed, split) for split in (suite, fit)]
            features = [
                embed_suite(encoder, c.directory, c.split, kind, batch_size=32) for c in corpora
            ]
            for measurement in measure_probes(encoder, *features):
                for attribute, result in measurement.metrics.items():
                    key = suite, measurement.protocol.scoring, attribute
                    found[key] = result.accuracy
                    found[(*key, "chance")] = result.chance
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packed", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    trained, random, losses = defaultdict(list), defaultdict(list), []
    for seed in range(args.seeds):
        config = tiny_stage1(args.packed, args.teacher, seed)
        workdir = args.out / f"seed-{seed}"
        loaded = config_check.LoadedConfig(
            config=config, file="configs/tiny.py:stage1", overrides={"seed": seed}
        )
        config_check.check(config)
        config_check.record(loaded, workdir)
        train(config, workdir, StopRequest())
        lines = read_metrics(workdir)
        losses.append((lines[0]["loss"], statistics.mean(line["loss"] for line in lines[-5:])))
        for into, is_random in ((trained, False), (random, True)):
            for key, value in probe(workdir, args.packed, random_weights=is_random).items():
                into[key].append(value)
    first, last = zip(*losses)
    print(f"distillation loss: {spread([*first])} -> {spread([*last])}, {args.seeds} seeds\n")
    print("| suite | probe | attribute | majority class | random student | trained student |")
    print("|---|---|---|---|---|---|")
    for key in trained:
        if key[-1] != "chance":
            chance = trained[(*key, "chance")][0]
            cells = [*key, f"{chance:.1f}", spread(random[key]), spread(trained[key])]
            print(f"| {' | '.join(cells)} |")
    plain = {"/".join(k): [random[k], trained[k]] for k in trained}
    (args.out / "probe.json").write_text(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
