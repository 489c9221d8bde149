"""Instance-aware video-language pre-training (InstAP, arXiv 2604.08337) in JAX."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Not imported with the package: the command answers `--help` without JAX.
    if name == "load":
        from instap_jax.inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
