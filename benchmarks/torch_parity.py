"""JAX against the exported PyTorch module at full size, and the memory that exporting takes.

    python benchmarks/torch_parity.py --out=DIR [--size=l16] [--frames=4]

Writes a run of random parameters to DIR/run, exports it to DIR/torch and DIR/umt, then embeds the
same clip, instance and sentence with both sides in float32 and prints the largest differences. Each
step is a process of its own. Memory is the peak resident set of an export above that of its process
once everything is imported, also as a multiple of the parameters' bytes.

Sizes: 'l16' is configs/stage2_l16.py (needs 12 GB of memory and 8 GB of disk), 'medium' 300 MB,
'small' 20 MB.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).parent.parent / "configs" / "stage2_l16.py"
SMALLER = {
    "l16": {},
    "medium": {"width": 512, "depth": 8, "heads": 8},
    "small": {"width": 128, "depth": 3, "heads": 2},
}
TEXTS = ["a red ball rolls to the left of a blue box", "two dogs wait at a door"]


def make(out: Path, size: str) -> None:
    """A run of random parameters."""
    import jax
    from flax import nnx

    from instap_jax import config_check
    from instap_jax.train import checkpoint, inputs
    from instap_jax.train.objectives import OBJECTIVES

    spec = importlib.util.spec_from_file_location("stage2_l16", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.vision.update(SMALLER[size])
    config.text.update(SMALLER[size])
    if size != "l16":
        config.text.fusion_layers = 2
    config.distill.mask_score, config.align.rec = "random", 0.0  # no teacher here
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += sorted({word for text in TEXTS for word in text.split()})
    words += [f"word{i}" for i in range(config.text.vocab_size - len(words))]
    out.mkdir(parents=True)
    (out / "vocab.txt").write_text("\n".join(words) + "\n")
    config.tokenizer.path = str(out.absolute() / "vocab.txt")

    create = OBJECTIVES["align"].create
    abstract = nnx.state(nnx.eval_shape(lambda: create(config, nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        """Activations of size one: kernels of 1 / sqrt(1024), norms about one, tau 0.07."""
        name = jax.tree_util.keystr(path)
        value = rng.standard_normal(leaf.shape, np.float32)
        value *= np.float32(0.03)
        value += np.float32(1.0 if "scale" in name else 0.07 if "temperature" in name else 0)
        return np.abs(value) if "temperature" in name else value

    state = jax.tree_util.tree_map_with_path(draw, abstract)
    loaded = config_check.LoadedConfig(config=config, file=str(CONFIG), overrides={})
    config_check.record(loaded, out / "run")
    meta = {"stage": "align", "inputs": inputs.identify(config)}
    checkpoint.write_params(str(out / "run"), state, meta=meta)


def export(out: Path, layout: str) -> None:
    """Exports, and records the memory it took."""
    from instap_jax.interop.export import export as write
    from instap_jax.train.checkpoint import StoredParams

    if layout == "umt":
        import torch  # noqa: F401 - counted as the start, not as the export's
    shapes = StoredParams(str(out / "run")).shapes.values()
    size = 4 * sum(int(np.prod(shape)) for shape in shapes)
    before, start = peak(), time.perf_counter()
    write(out / "run", out / layout, layout=layout)
    taken = {"parameters": size, "before": before, "peak": peak()}
    taken["seconds"] = round(time.perf_counter() - start, 1)
    (out / f"memory_{layout}.json").write_text(json.dumps(taken))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sample(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip uint8 [1, T, 180, 320, 3] of moving waves, and two instances' boxes [1, 2, T, 4]."""
    t, y, x, c = np.ogrid[:frames, :180, :320, :3]
    waves = np.sin(x / 17 + t / 3 + c) + np.cos(y / 11 - t / 5 + 2 * c)
    boxes = np.array([[0.1, 0.2, 0.5, 0.9], [0.6, 0.05, 0.95, 0.4]], np.float32)
    clip = (127.5 + 63 * waves).astype(np.uint8)
    return clip[None], np.broadcast_to(boxes[:, None], (2, frames, 4))[None]


def embed(out: Path, side: str, frames: int) -> None:
    """Embeds the sample with one side and writes what comes out."""
    clip, boxes = sample(frames)
    start = time.perf_counter()
    if side == "jax":
        import instap_jax

        model = instap_jax.load(out / "run", dtype="float32")
    else:
        import torch

        from instap_jax.interop.torch_model import InstAP

        torch.set_grad_enabled(False)
        model = InstAP.from_pretrained(out / "torch").eval()
    loaded = time.perf_counter()
    found = {
        "encode_text": model.encode_text(TEXTS),
        "encode_video": model.encode_video(clip),
        "encode_instances": model.encode_instances(clip, boxes)[0],
        "match": model.match(clip, TEXTS[:1]),
        "match_instances": model.match_instances(clip, boxes, [TEXTS])[0],
    }
    done = time.perf_counter()
    print(f"{side}: opened in {loaded - start:.1f} s, computed in {done - loaded:.1f} s")
    np.savez(out / f"{side}.npz", **{name: np.asarray(value) for name, value in found.items()})


def report(out: Path) -> None:
    ours, theirs = np.load(out / "jax.npz"), np.load(out / "torch.npz")
    print(f"{'float32':<18}{'shape':>12}{'largest difference':>20}{'smallest, largest value':>28}")
    for name in ours:
        a, b = ours[name], theirs[name]
        span = f"{a.min():.4f}, {a.max():.4f}"
        print(f"{name:<18}{a.shape!s:>12}{np.abs(a - b).max():>20.1e}{span:>28}")
    for layout in ("torch", "umt"):
        m = json.loads((out / f"memory_{layout}.json").read_text())
        taken, size = m["peak"] - m["before"], m["parameters"]
        print(
            f"export to {layout}: {size / 1e6:.0f} MB of parameters, peak {taken / 1e6:.0f} MB "
            f"above the imports' {m['before'] / 1e6:.0f} MB, {taken / size:.2f} of the model, "
            f"{m['seconds']} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SMALLER, default="l16")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--step", help="one step alone, as the whole runs them")
    args = parser.parse_args()
    steps = {
        "make": lambda: make(args.out, args.size),
        "export torch": lambda: export(args.out, "torch"),
        "export umt": lambda: export(args.out, "umt"),
        "jax": lambda: embed(args.out, "jax", args.frames),
        "torch": lambda: embed(args.out, "torch", args.frames),
    }
    if args.step:
        steps[args.step]()
        return
    for step in steps:
        print(f"== {step}", flush=True)
        subprocess.run([sys.executable, *sys.argv, f"--step={step}"], check=True)
    report(args.out)


if __name__ == "__main__":
    main()
