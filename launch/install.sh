# Sourced by the other scripts: enters the repository's own virtual environment, made on first use.
#
#   EXTRAS  extras of setup.cfg to install, such as "[test]" (default: none)
#   PYTHON  interpreter to make the environment with (default: python3), 3.11 to 3.13
#   VENV    where it is (default: .venv)
#
# The exact versions are those of constraints.txt, the set that the tests pass with. Nothing is
# installed again while setup.cfg, constraints.txt and EXTRAS are as they were.
#
# Every step says by itself what follows when it fails: not all who source this have `set -e`.

PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"

if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
  echo "instap_jax needs Python 3.11 to 3.13; set PYTHON=/path/to/python3.11" >&2
  exit 2
fi
# Not bin/python: where Debian's python3-venv is missing, venv fails after having made that one.
if [ ! -e "$VENV/bin/activate" ] && ! "$PYTHON" -m venv "$VENV"; then
  echo "cannot make the environment $VENV (Debian, Ubuntu: apt install python3-venv)" >&2
  exit 2
fi
. "$VENV/bin/activate" || exit 1
stamp="$VENV/installed-$(cat setup.cfg constraints.txt | cksum | tr -d ' ')${EXTRAS:-}"
if [ ! -e "$stamp" ]; then
  echo "installing instap_jax${EXTRAS:-} into $VENV" >&2
  if ! python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${EXTRAS:-}"; then
    echo "installing instap_jax${EXTRAS:-} into $VENV failed" >&2
    exit 1
  fi
  touch "$stamp" || exit 1
fi
