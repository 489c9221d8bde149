#!/usr/bin/env bash
# Installs everything the tests need into .venv, checks style, runs the tests.
# Arguments go to pytest: bash launch/test.sh -k captions
# Two processes: XLA compiles on one core, and a process takes about 2 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="[test]"
. launch/install.sh
ruff check .
ruff format --check .
exec python -m pytest --numprocesses=2 --dist=loadfile "$@"
