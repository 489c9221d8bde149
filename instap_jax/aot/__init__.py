"""Compiling a stage for TPU pods on a machine without one, and reading what the compiler made."""
