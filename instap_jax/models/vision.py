"""The student f: a ViT over all space-time patches of a clip, as UMT pre-trains it.

No class token, joint space-time attention, one-frame tubelets, a fixed sine-cosine position table.
Structure after UMT's modeling_pretrain_umt.py.

Axis letters: B clips, T frames, N patches of a frame, V visible tokens of a clip, d width,
K taps. Token t * N + i is patch i (row-major) of frame t.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.models import resize
from instap_jax.models.attention_backends import pad_tokens
from instap_jax.models.depth import scan_blocks, stack
from instap_jax.models.layers import Bias, LayerNorm, Linear, PreNormBlock, exact_gelu

Array = jax.Array

NORM_EPSILON = 1e-6
# torch's default for Conv3d, which UMT leaves as it is: uniform within 1 / sqrt(fan_in).
_conv_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


# Without HIGHEST a TPU would round codes and weights to bfloat16.
_exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionOutput:
    """Attributes:
    tokens: [B, V, d], last layer's outputs after the final LayerNorm, in the compute dtype.
    taps: [K, B, V, d], the same of the last K layers in layer order; None without taps.
    """

    tokens: Array
    taps: Array | None


class VisionEncoder(nnx.Module):
    """Patch embedding, positions, blocks, final LayerNorm.

    Args:
      config: the `vision` section of the configuration.
      dtype: compute dtype.
      remat: see `depth.scan_blocks`. backend: see `attention_backends`.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        dtype: Any,
        remat: str,
        rngs: nnx.Rngs,
        backend: str = "auto",
    ):
        self.width = config.width
        self.heads = config.heads
        self.patch = config.patch
        self.positions = PositionGrid.of(config)
        self.patch_embedding = Linear(
            config.patch**2 * 3,
            config.width,
            axes=("patch", "embed"),
            init=_conv_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = stack(lambda rngs: _block(config, dtype, backend, rngs), config.depth, rngs)
        self.norm = LayerNorm(config.width, eps=NORM_EPSILON, dtype=dtype, backend=backend)
        self.drop_path_rates = tuple(np.linspace(0, config.drop_path, config.depth).tolist())
        self.dtype = dtype
        self.remat = remat
        self.backend = backend

    def __call__(
        self,
        video: Array,
        *,
        visible: Array | None = None,
        mask: Array | None = None,
        key: Array | None = None,
        taps: int = 0,
        remat: str | None = None,
    ) -> VisionOutput:
        """Encodes the visible tokens of a batch of clips.

        Args:
          video: float [B, T, H, W, 3], normalised with the ImageNet constants.
          visible: int32 [B, V], indices of the tokens to encode, or None for all T * N.
          mask: bool [B, V], which of these may be attended to, or None for all. The outputs of the
            others mean nothing.
          key: for stochastic depth; None runs deterministically.
          taps: also return the outputs of the last `taps` layers.
          remat: another policy than the encoder's own.
        """
        patches = patchify(video, self.patch)
        frames = video.shape[1]
        tokens = patches.shape[1]
        if visible is not None:
            # Before the embedding: masked patches then cost nothing at all.
            patches = jnp.take_along_axis(patches, visible[..., None], axis=1)
        x = self.patch_embedding(patches)
        codes = self.position_codes(frames, tokens // frames, visible)
        x = x + codes.astype(self.dtype)
        length = x.shape[1]
        x, tapped = scan_blocks(
            self.blocks,
            pad_tokens(x, backend=self.backend, heads=self.heads),
            remat=remat or self.remat,
            key=key if any(self.drop_path_rates) else None,
            drop_path_rates=jnp.asarray(self.drop_path_rates, jnp.float32),
            taps=taps,
            call=lambda block, x, key, rate: block(
                x, mask=mask, length=length, key=key, drop_path_rate=rate
            ),
        )
        if not taps:
            return VisionOutput(tokens=self.norm(x)[:, :length], taps=None)
        tapped = self.norm(tapped)[:, :, :length]
        return VisionOutput(tokens=tapped[-1], taps=tapped)

    def position_codes(self, frames: int, patches: int, visible: Array | None = None) -> Array:
        """`position_codes` of this encoder."""
        return position_codes(frames, patches, self.width, visible, grid=self.positions)


def _block(config: ConfigDict, dtype: Any, backend: str, rngs: nnx.Rngs) -> PreNormBlock:
    return PreNormBlock(
        config.width,
        config.heads,
        mlp_ratio=config.mlp_ratio,
        bias=Bias.QUERY_VALUE,
        activation=exact_gelu,
        eps=NORM_EPSILON,
        dtype=dtype,
        rngs=rngs,
        backend=backend,
    )


def patchify(video: Array, patch: int) -> Array:
    """Cuts frames [B, T, H, W, 3] into patches [B, T * N, patch * patch * 3].

    A patch's values are in (row, column, channel) order, which leaves the pixels' memory order
    alone. A torch convolution kernel [d, 3, (1,) patch, patch] converts to the matching linear
    kernel by moving d last and channels second to last, then flattening the rest.
    """
    b, t, height, width, channels = video.shape
    if height % patch or width % patch:
        raise ValueError(f"{height} x {width} pixels cannot be cut into patches of {patch}")
    rows, columns = height // patch, width // patch
    x = video.reshape(b, t, rows, patch, columns, patch, channels)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, t * rows * columns, patch * patch * channels)


@dataclasses.dataclass(frozen=True)
class PositionGrid:
    """What the weights learned the position table for; None: whatever is at hand.

    Attributes:
      frames: of a clip. side: patches a side.
    """

    frames: int | None = None
    side: int | None = None

    @classmethod
    def of(cls, config: ConfigDict) -> "PositionGrid":
        """That of the `vision` section of a configuration."""
        size = config.position_size
        return cls(frames=config.position_frames, side=size and size // config.patch)


def position_codes(
    frames: int,
    patches: int,
    width: int,
    visible: Array | None = None,
    *,
    grid: PositionGrid = PositionGrid(),
) -> Array:
    """UMT's fixed position table: a one-dimensional sinusoid over the token index p.

    code[p, 2 j] = sin(p w_j), code[p, 2 j + 1] = cos(p w_j), w_j = 10000^(-2 j / width)
    (get_sinusoid_encoding_table). An image is frames = 1.

    Args:
      visible: int32 [B, V] token indices, or None.
      grid: another number of frames is interpolated from this one linearly (an image, as in UMT,
        has the codes of the first frame), another number of patches bicubically, square to square.

    Returns:
      float32 [B, V, width] at the visible tokens, or [frames * patches, width].
    """
    first = grid.frames if grid.frames and frames > 1 else frames
    side = math.isqrt(patches)
    table = _sinusoid(first, grid.side**2 if grid.side else patches, width)
    if first != frames:
        table = _exactly("tf,fpd->tpd", resize.linear(first, frames).astype(np.float32), table)
    if grid.side and grid.side != side:
        matrix = resize.bicubic(grid.side, side).astype(np.float32)
        table = table.reshape((frames, grid.side, grid.side, width))
        table = _exactly("yr,xc,trcd->tyxd", matrix, matrix, table)
    table = table.reshape(frames * patches, width)
    return table if visible is None else table[visible]


def _sinusoid(frames: int, patches: int, width: int) -> Array:
    """The table itself, float32 [frames, patches, width]."""
    # Composed from two small tables by the angle-sum identities, p = t * patches + i: a table for
    # a long clip would be a constant of many megabytes in the program, and float32 angles are
    # not exact enough to compute it in place.
    frequency = 10000.0 ** (-2 * np.arange(width // 2, dtype=np.float64) / width)
    frame_angle = np.arange(frames)[:, None] * patches * frequency
    patch_angle = np.arange(patches)[:, None] * frequency
    sin_t, cos_t = (jnp.asarray(f(frame_angle), jnp.float32)[:, None] for f in (np.sin, np.cos))
    sin_i, cos_i = (jnp.asarray(f(patch_angle), jnp.float32)[None] for f in (np.sin, np.cos))
    sine = sin_t * cos_i + cos_t * sin_i
    cosine = cos_t * cos_i - sin_t * sin_i
    return jnp.stack([sine, cosine], axis=-1).reshape(frames, patches, width)
