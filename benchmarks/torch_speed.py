"""Training speed side by side: one step of ours and the same step of the PyTorch module.

    python benchmarks/torch_speed.py [--size=small] [--batch=8] [--rounds=10]

Both train the video tower (`VisionEncoder` and its distillation heads: 2 taps, loss (1) against
fixed targets) in float32 from the same weights on the same clips: forward, backward, AdamW. They
run by turns in one process, after three untimed steps each; printed are the losses of those, which
must agree, the median samples a second and their ratio. On a GPU, where both find one, the
autocast of PyTorch and our compute dtype are bfloat16.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch.nn import functional

from instap_jax import losses
from instap_jax.config import default
from instap_jax.interop import keys, torch_model, umt
from instap_jax.models.distillation import Student

SIZES = {
    "small": {"width": 256, "depth": 4, "heads": 4, "image_size": 112},
    "l16": {},
}
TAPS, FRAMES = 2, 4
RATE, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.05
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def make_config(size: str, dtype: torch.dtype):
    config = default()
    config.vision.update(SIZES[size])
    config.vision.drop_path = 0.0
    config.distill.layers = TAPS
    config.compute.dtype = str(dtype).removeprefix("torch.")
    config.compute.remat = "all"  # PyTorch keeps everything, too
    return config


class Ours:
    """Our step, jitted, with its state donated."""

    def __init__(self, config, video: np.ndarray, target: np.ndarray):
        compute = config.compute
        model = Student(
            config, dtype=jnp.dtype(compute.dtype), remat=compute.remat, rngs=nnx.Rngs(0)
        )
        graphdef, self.params = nnx.split(model)
        tx = optax.adamw(RATE, *BETAS, weight_decay=DECAY)
        self.opt_state = tx.init(self.params)
        self.video, self.target = jnp.asarray(video), jnp.asarray(target)
        valid = jnp.ones(len(video), bool)

        def step(params, opt_state, video, target):
            def loss_of(params):
                student = nnx.merge(graphdef, params)(video)
                return losses.distillation_loss(student, target, valid)

            loss, gradients = jax.value_and_grad(loss_of)(params)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def step(self) -> float:
        self.params, self.opt_state, loss = self._step(
            self.params, self.opt_state, self.video, self.target
        )
        return float(loss)


def to_torch(params: nnx.State) -> dict[str, torch.Tensor]:
    """Our parameters under the names of the PyTorch module."""
    arrays = {name: np.asarray(leaf) for name, leaf in keys.leaves(params).items()}
    tensors = {}
    for row in umt.table("distill", {name: array.shape for name, array in arrays.items()}).rows:
        array = arrays[row.ours] if row.layer is None else arrays[row.ours][row.layer]
        for key, tensor in row.to_theirs(array).items():
            tensors[key] = torch.from_numpy(np.array(tensor, order="C"))
    return tensors


class Theirs:
    """The PyTorch module's step."""

    def __init__(self, config, params, video: np.ndarray, target: np.ndarray, dtype: torch.dtype):
        self.device, self.dtype = ("cuda" if torch.cuda.is_available() else "cpu"), dtype
        vision = config.vision.to_dict()
        sizes = {key: vision[key] for key in ("width", "depth", "heads", "patch", "mlp_ratio")}
        sizes |= {"position_frames": None, "position_size": None}
        self.model = torch_model.VisionEncoder(sizes, TAPS, config.teacher.projection)
        del self.model.pool_norm  # of stage 2
        self.model.load_state_dict(to_torch(params), strict=True)
        self.model.to(self.device).train()
        self.video, self.target = (torch.from_numpy(a).to(self.device) for a in (video, target))
        self.target = functional.normalize(self.target, dim=-1)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY
        )

    def step(self) -> float:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not torch.float32):
            tapped = self.model.encoder(self.video, None, TAPS)
            codes = torch_model.position_codes(tapped.shape[2], tapped.shape[3]).to(self.device)
            heads = zip(self.model.clip_decoder, tapped)
            out = torch.stack([head["norm"](head["head"](tap + codes)) for head, tap in heads])
        difference = functional.normalize(out.float(), dim=-1) - self.target
        loss = difference.square().sum(-1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    if not gpu and (jax.default_backend() == "gpu" or torch.cuda.is_available()):
        parser.error("only one of JAX and PyTorch sees a GPU")
    dtype = torch.bfloat16 if gpu else torch.float32
    config = make_config(args.size, dtype)
    size, side = config.vision.image_size, config.vision.image_size // config.vision.patch
    rng = np.random.default_rng(0)
    video = rng.standard_normal((args.batch, FRAMES, size, size, 3), np.float32)
    shape = (TAPS, args.batch, FRAMES * side**2, config.teacher.projection)
    target = rng.standard_normal(shape, np.float32)
    ours = Ours(config, video, target)
    theirs = Theirs(config, ours.params, video, target, dtype)
    first = [(ours.step(), theirs.step()) for _ in range(3)]
    seconds = {ours: [], theirs: []}
    for _ in range(args.rounds):
        for side in (ours, theirs):
            start = time.perf_counter()
            side.step()
            seconds[side].append(time.perf_counter() - start)
    print(f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} threads, {dtype}, {args}")
    print(
        "loss of the first steps, ours and PyTorch's: "
        + "; ".join(f"{a:.6f} {b:.6f}" for a, b in first)
    )
    if max(abs(a - b) / b for a, b in first) > TOLERANCE[dtype]:
        raise SystemExit("the losses differ: these are not the same step")
    speed, reference = (args.batch / statistics.median(seconds[side]) for side in (ours, theirs))
    print(
        f"ours {speed:.2f} samples/s, PyTorch {reference:.2f}, ratio {speed / reference:.2f}; "
        f"median of {args.rounds} steps by turns"
    )


if __name__ == "__main__":
    main()
