#!/usr/bin/env bash
# What one host of a Cloud TPU slice does; tpu.py calls it on all of them at once.
#
#   bash launch/host.sh setup                installs the package, with Python 3.11 where it is older
#   bash launch/host.sh run START VERB ...   ends what an earlier start left, then runs `instap VERB`;
#                                            START is a number that grows
#   bash launch/host.sh stop                 asks it to save and end (exit code 75), as preemption does
#
# The run does not depend on the connection. When that breaks, gcloud repeats its command: `run` of
# a START that has begun shows how it goes on, and `stop` asks a start once only.
#
# Every line of output begins with the host's name, and goes to ~/instap.log, too. The last one says
# the exit code; ssh to many hosts gives back only one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
state="${TMPDIR:-/tmp}/instap-$(id -u)" # .start .pid .asked .code; gone after a reboot, as the run
log=~/instap.log
host=$(hostname)

begun() { [ -f "$state.pid" ] && cat "$state.start" 2>/dev/null; }

# The process group of the run, if it is alive.
running() { [ -e "$state.pid" ] && kill -0 -- "-$(cat "$state.pid")" 2>/dev/null; }

# Asks it to end; after five minutes it has to.
end_run() {
  running || return 0
  # Once: a second signal would mean "at once".
  if (set -o noclobber && : >"$state.asked") 2>/dev/null; then
    kill -TERM -- "-$(cat "$state.pid")" 2>/dev/null
  fi
  for _ in $(seq 300); do
    running || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat "$state.pid")" 2>/dev/null
}

# Runs `instap`, by itself, and writes down its exit code.
begin() {
  # shellcheck disable=SC2016
  setsid bash -c '
    trap : TERM INT # theirs is the process that runs here
    echo $$ >"$0.pid" || exit 1 # a run that cannot be found again would never be ended
    .venv/bin/instap "$@"
    echo $? >"$0.code"
  ' "$state" "$@" >>"$log" 2>&1 </dev/null 9>&- &
  for _ in $(seq 100); do
    [ -f "$state.pid" ] && [ -s "$state.pid" ] && return
    sleep 0.1
  done
  echo "[$host] cannot write $state.pid"
  exit 1
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
    # JAX asks for it on v5e and newer: the runtime starts and ends faster.
    sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' 2>/dev/null
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
    start="${2:?START}"
    shift 2
    exec 9>"$state-lock" || exit 1
    flock 9 # the same command may come twice
    if [ "$start" -lt "$(begun || echo 0)" ]; then
      echo "[$host] a later start has taken the place of $start"
      exit 1
    fi
    [ "$(begun)" = "$start" ] || end_run
    touch "$log"
    from=$(stat --format=%s "$log")
    if [ "$(begun)" = "$start" ]; then
      echo "[$host] connected again"
    else
      rm -f "$state".*
      echo "[$host] start from checkpoint $(newest "$@")" # may end us: nothing has begun yet
      echo "$start" >"$state.start"
      begin "$@"
    fi
    exec 9>&-
    tail --pid="$(cat "$state.pid")" --sleep-interval=0.2 --bytes=+"$((from + 1))" --follow "$log" |
      sed --unbuffered "s/^/[$host] /"
    code=$(cat "$state.code" 2>/dev/null || echo 137) # killed, with the shell that writes it
    echo "[$host] exit code $code, checkpoint $(newest "$@")"
    exit "$code"
    ;;
  stop)
    exec 9>"$state-lock" && flock 9 && exec 9>&- # a run that is just beginning has begun
    end_run
    ;;
  *)
    echo "launch/host.sh: setup, run or stop" >&2
    exit 2
    ;;
esac
