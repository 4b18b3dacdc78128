#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud, with one process on each of its machines:
#
#     launch/tpu_pod.sh create NAME ZONE TYPE VERSION [--spot, or another flag of gcloud]
#     launch/tpu_pod.sh install NAME ZONE
#     launch/tpu_pod.sh run NAME ZONE --config configs/quickstart.py --workdir /mnt/runs/quickstart [flags of moe_jax.main]
#     launch/tpu_pod.sh stop NAME ZONE
#     launch/tpu_pod.sh delete NAME ZONE
#
# create asks for the slice by a queued resource and waits until it is there. install copies the
# last commit of this repository to all machines, with the libraries. run starts the processes,
# prints what they print, and starts them again when one of them was lost (MOE_JAX_MAX_RESTARTS, 50).
# stop, Ctrl-C and SIGTERM let the run save and end. The workdir has to lie where all machines see it
# (NFS, Filestore). docs/clusters.md tells the rest.
set -u

say() { echo "tpu_pod.sh: $*" >&2; }

usage() {
  sed -n '4,8s/^# *//p' "$0" >&2
  exit 64
}

# Runs a line of shell on every machine of the slice; the exit code is one that is not 0, if any is.
on_all() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

create() {
  [ $# -ge 2 ] || usage
  local type=$1 version=$2 state
  shift 2
  gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$version" "$@" || exit
  while true; do
    state=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
      --format='value(state.state)') || exit
    say "$name is $state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING) exit 75 ;;
    esac
    sleep "${MOE_JAX_POLL:-30}"
  done
}

install() {
  local here code
  here=$(cd "$(dirname "$0")/.." && pwd)
  code=$(mktemp --suffix=.tar.gz)
  git -C "$here" archive --format=tar.gz --output="$code" HEAD &&
    gcloud compute tpus tpu-vm scp "$code" "$name":moe_jax.tar.gz --zone="$zone" --worker=all &&
    on_all "rm -rf moe_jax && mkdir moe_jax && tar -xzf moe_jax.tar.gz -C moe_jax && cd moe_jax \
&& python3 -m pip install --user --quiet uv && python3 -m uv venv --quiet --python 3.11 .venv \
&& python3 -m uv pip install --quiet --python .venv -r requirements.txt -r requirements/tpu.txt \
-c constraints/py311.txt"
  local status=$?
  rm -f "$code"
  exit "$status"
}

# A second signal would end the run unsaved: `stop` sends one to each process. The brackets keep
# pkill from finding the shell that it was started by.
stop() { on_all "pkill -TERM -f '[m]oe_jax.main'"; }

told=''
pass_on() {
  [ -z "$told" ] || return
  told=told
  say "the run saves and ends"
  stop
}

run() {
  local line code connection restarts=0
  line="cd moe_jax && exec .venv/bin/python -m moe_jax.main --distributed $(printf '%q ' "$@")"
  # gcloud in a process group of its own: Ctrl-C would cut the connection, and not reach the run.
  set -m
  trap pass_on INT TERM HUP
  while true; do
    on_all "$line" </dev/null &
    connection=$!
    # A trapped signal ends `wait` early: wait until the process is gone, then ask once more. bash
    # keeps its code.
    wait "$connection"
    while kill -0 "$connection" 2>/dev/null; do wait "$connection"; done
    wait "$connection"
    code=$?
    say "the run ended with exit code $code"
    case $code in
      75 | 134 | 137) [ -z "$told" ] && [ "$restarts" -lt "${MOE_JAX_MAX_RESTARTS:-50}" ] || exit "$code" ;;
      255)
        say "a connection was lost: the run may go on there. Say $0 stop $name $zone, then run again"
        exit 75
        ;;
      *) exit "$code" ;;
    esac
    restarts=$((restarts + 1))
    say "start $((restarts + 1))"
  done
}

[ $# -ge 3 ] || usage
command=$1 name=$2 zone=$3
shift 3
case $command in
  create | install | run | stop) "$command" "$@" ;;
  delete) gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force ;;
  *) usage ;;
esac
