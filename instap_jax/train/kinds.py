"""Which kind of batch a step takes. Without JAX: `instap ablate` plans by it."""

import math

from ml_collections import ConfigDict

from instap_jax.types import Kind


def kind_of_step(config: ConfigDict, step: int) -> Kind:
    """Whether step number `step` (from 0) takes an image or a video batch: a function of it alone.

    Image steps are spread evenly: one whenever the running count step * image_fraction passes an
    integer.
    """
    if not config.data.videos:
        return Kind.IMAGE
    if not config.data.images:
        return Kind.VIDEO
    fraction = config.data.image_fraction
    passes = math.floor((step + 1) * fraction) > math.floor(step * fraction)
    return Kind.IMAGE if passes else Kind.VIDEO
