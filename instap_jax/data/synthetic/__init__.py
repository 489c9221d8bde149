"""The embedded set: InstVL in miniature, rendered. See docs/embedded_set.md."""
