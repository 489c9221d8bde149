#!/usr/bin/env bash
# Installs everything the tests need into .venv, checks style, runs the tests.
# Arguments go to pytest: bash launch/test.sh -k captions
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="[test]"
. launch/install.sh
ruff check .
ruff format --check .
exec python -m pytest "$@"
