"""Stage 1's student: the vision encoder and the heads that speak the teacher's language.

Each of the student's last K layers, after the encoder's final LayerNorm, gets the position code
added, then its own Linear (width -> the teacher's projection) and LayerNorm (UMT: Linear_Decoder).
The l2 normalisation belongs to loss (1).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.models.depth import stack
from instap_jax.models.layers import LayerNorm, Linear
from instap_jax.models.vision import NORM_EPSILON, VisionEncoder

Array = jax.Array


class DistillationHead(nnx.Module):
    """Linear, then LayerNorm."""

    def __init__(self, width: int, projection: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(width, projection, axes=("embed", "proj"), dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(projection, eps=NORM_EPSILON, dtype=jnp.float32, axis="proj")

    def __call__(self, x: Array) -> Array:
        """[..., width] -> float32 [..., projection]."""
        return self.norm(self.linear(x))


class DistillationHeads(nnx.Module):
    """One `DistillationHead` for each distilled layer, stacked.

    Args:
      config: the `distill` section of the configuration.
      width: of the student.
      projection: of the teacher.
    """

    def __init__(
        self, config: ConfigDict, width: int, projection: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        def create(rngs: nnx.Rngs) -> DistillationHead:
            return DistillationHead(width, projection, dtype=dtype, rngs=rngs)

        self.heads = stack(create, config.layers, rngs)

    def __call__(self, taps: Array, positions: Array) -> Array:
        """taps [K, B, V, d], positions [B, V, d] or [V, d] -> float32 [K, B, V, projection]."""
        graphdef, state = nnx.split(self.heads)
        x = taps + positions.astype(taps.dtype)
        return jax.vmap(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


class Student(nnx.Module):
    """Encoder and heads; what stage 1 trains and checkpoints.

    Args:
      config: the whole configuration.
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
        self.encoder = VisionEncoder(
            config.vision, dtype=dtype, remat=remat, rngs=rngs, backend=backend
        )
        self.heads = DistillationHeads(
            config.distill, config.vision.width, config.teacher.projection, dtype=dtype, rngs=rngs
        )
        self.taps = config.distill.layers

    def __call__(
        self, video: Array, *, visible: Array | None = None, key: Array | None = None
    ) -> Array:
        """Predicts the teacher's features of the visible tokens.

        Args:
          video, visible, key: as `VisionEncoder` takes them.

        Returns:
          float32 [K, B, V, p] for the last K layers in layer order, not l2-normalised.
        """
        taps = self.encoder(video, visible=visible, key=key, taps=self.taps).taps
        frames, height, width = video.shape[1:4]
        patches = (height // self.encoder.patch) * (width // self.encoder.patch)
        positions = self.encoder.position_codes(frames, patches, visible)
        return self.heads(taps, positions)
