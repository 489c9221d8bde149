#!/usr/bin/env bash
# What one host of a Cloud TPU slice does; tpu.py calls it on all of them at once.
#
#   bash launch/host.sh setup              installs the package, with Python 3.11 where it is older
#   bash launch/host.sh run VERB [FLAG..]  ends what an earlier start left, then runs `instap VERB`
#   bash launch/host.sh stop               asks it to save and end (exit code 75), as preemption does
#
# Every line of output begins with the host's name, and goes to ~/instap.log, too. The last one says
# the exit code; ssh to many hosts gives back only one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
pid_file="${TMPDIR:-/tmp}/instap-$(id -u).pid" # gone after a reboot, as the process is
host=$(hostname)

# The process group of the run, if it is alive.
running() { [ -e "$pid_file" ] && kill -0 -- "-$(cat "$pid_file")" 2>/dev/null; }

# Asks it to end; after $1 seconds it has to.
end_run() {
  running || return 0
  kill -TERM -- "-$(cat "$pid_file")" 2>/dev/null
  for _ in $(seq "$1"); do
    running || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat "$pid_file")" 2>/dev/null
}

# Newest checkpoint of the --workdir among the arguments: --workdir=DIR, --workdir DIR.
newest() {
  local arg before= workdir=
  for arg in "$@"; do
    case "$before" in --workdir | -workdir) workdir="$arg" ;; esac
    case "$arg" in --workdir=* | -workdir=*) workdir="${arg#*=}" ;; esac
    before="$arg"
  done
  find "$workdir/checkpoints" -mindepth 1 -maxdepth 1 -name '[0-9]*' -printf '%f\n' 2>/dev/null |
    grep -E '^[0-9]+$' | sort -n | tail -n 1
}

case "${1:-}" in
  setup)
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python3 -m pip install --quiet --user uv || exit 1
      python3 -m uv python install --quiet 3.11 || exit 1
      PYTHON=$(python3 -m uv python find 3.11) || exit 1
    fi
    set -e
    EXTRAS="[tpu]"
    . launch/install.sh
    ;;
  run)
    shift
    end_run 15
    echo "[$host] start from checkpoint $(newest "$@")"
    # shellcheck disable=SC2016
    setsid --wait bash -c 'echo $$ >"$0"; exec .venv/bin/instap "$@"' "$pid_file" "$@" 2>&1 |
      tee -a ~/instap.log | sed --unbuffered "s/^/[$host] /"
    code=${PIPESTATUS[0]}
    echo "[$host] exit code $code, checkpoint $(newest "$@")"
    exit "$code"
    ;;
  stop)
    end_run 300
    ;;
  *)
    echo "launch/host.sh: setup, run or stop" >&2
    exit 2
    ;;
esac
