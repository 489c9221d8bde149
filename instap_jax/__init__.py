"""Instance-aware video-language pre-training (InstAP, arXiv 2604.08337) in JAX."""

__version__ = "0.1.0"
