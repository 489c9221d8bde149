"""The student in PyTorch, written from UMT's description, with UMT's parameter names.

Only what parity tests need: no stochastic depth, no initialisation of note. `load` copies its
parameters into ours, so that both compute the same function.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

torch.set_num_threads(1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.randn(width))
        self.v_bias = nn.Parameter(torch.randn(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, v = q + self.q_bias, v + self.v_bias
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch))

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, *, width, depth, heads, hidden, patch):
        super().__init__()
        self.width = width
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, video, masked):
        """video [B, 3, T, H, W], masked bool [B, T N] -> all layers' normed outputs."""
        x = self.patch_embed(video)
        x = x + torch.tensor(sinusoid(x.shape[1], self.width), dtype=torch.float32)
        x = x[~masked].reshape(len(x), -1, self.width)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Head(nn.Module):
    def __init__(self, width, projection):
        super().__init__()
        self.head = nn.Linear(width, projection)
        self.norm = nn.LayerNorm(projection, eps=1e-6)

    def forward(self, x):
        return self.norm(self.head(x))


class Student(nn.Module):
    def __init__(self, *, width, depth, heads, hidden, patch, taps, projection):
        super().__init__()
        self.encoder = Encoder(width=width, depth=depth, heads=heads, hidden=hidden, patch=patch)
        self.clip_decoder = nn.ModuleList(Head(width, projection) for _ in range(taps))
        randomise(self)

    def forward(self, video, masked):
        tapped = self.encoder(video, masked)[-len(self.clip_decoder) :]
        codes = torch.tensor(sinusoid(masked.shape[1], tapped.shape[-1]), dtype=torch.float32)
        codes = codes.expand(len(masked), -1, -1)[~masked].reshape(tapped.shape[1:])
        return torch.stack([head(x + codes) for head, x in zip(self.clip_decoder, tapped)])


def sinusoid(positions: int, width: int) -> np.ndarray:
    """UMT's table in float64, entry by entry."""
    table = np.zeros((positions, width))
    for p in range(positions):
        for j in range(width):
            angle = p / 10000 ** (2 * (j // 2) / width)
            table[p, j] = np.cos(angle) if j % 2 else np.sin(angle)
    return table


def randomise(module: nn.Module) -> None:
    """Moves biases and norms off their initial 0 and 1, which would hide a missing term."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def linear(source: nn.Linear) -> dict:
    out = {"kernel": array(source.weight).T}
    return out if source.bias is None else out | {"bias": array(source.bias)}


def norm(source: nn.LayerNorm) -> dict:
    return {"scale": array(source.weight), "bias": array(source.bias)}


def attention(source: Attention) -> dict:
    width = source.qkv.in_features
    kernel = array(source.qkv.weight).T.reshape(width, 3, source.heads, -1)
    bias = np.stack([array(source.q_bias), array(source.v_bias)]).reshape(2, source.heads, -1)
    return {"qkv": kernel, "qkv_bias": bias, "out": linear(source.proj)}


def mlp(source: Mlp) -> dict:
    return {"expand": linear(source.fc1), "contract": linear(source.fc2)}


def block(source: Block) -> dict:
    return {
        "norm1": norm(source.norm1),
        "attention": attention(source.attn),
        "norm2": norm(source.norm2),
        "mlp": mlp(source.mlp),
    }


def convolution(weight: torch.Tensor) -> np.ndarray:
    """[d, 3, (1,) p, p] -> [p p 3, d]."""
    weight = array(weight).reshape(weight.shape[0], 3, *weight.shape[-2:])
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def encoder(source: Encoder) -> dict:
    embedding = source.patch_embed.proj
    return {
        "patch_embedding": {
            "kernel": convolution(embedding.weight),
            "bias": array(embedding.bias),
        },
        "blocks": stacked([block(b) for b in source.blocks]),
        "norm": norm(source.norm),
    }


def student(source: Student) -> dict:
    heads = [{"linear": linear(h.head), "norm": norm(h.norm)} for h in source.clip_decoder]
    return {"encoder": encoder(source.encoder), "heads": {"heads": stacked(heads)}}


def stacked(layers: list[dict]) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def load(create: Callable[[], nnx.Module], parameters: dict) -> nnx.Module:
    """The module `create` makes, with these parameters; a missing, extra or misshapen one fails."""
    module = nnx.eval_shape(create)
    state = nnx.state(module, nnx.Param)
    ours, theirs = (jax.tree.map(np.shape, t) for t in (nnx.to_pure_dict(state), parameters))
    assert ours == theirs, f"{ours}\n{theirs}"
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, parameters))
    nnx.update(module, state)
    return module


def fill(create: Callable[[], nnx.Module]) -> nnx.Module:
    """The module `create` makes, with random parameters and no initialiser to compile."""
    random = np.random.default_rng(7)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(create), nnx.Param))

    def draw(path, leaf):
        values = 0.15 * random.normal(size=leaf.shape)
        return (values + (path[-1].key == "scale")).astype(np.float32)

    return load(create, jax.tree_util.tree_map_with_path(draw, shapes))
