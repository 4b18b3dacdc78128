#!/usr/bin/env bash
# Several processes on this machine, each with simulated CPU devices, through jax.distributed:
#
#     launch/local.sh PROCESSES DEVICES --config configs/debug.py --workdir runs/two [any flag of moe_jax.main]
#
# Process 0 prints here; errors of every process do too. Ctrl-C reaches all of
# them. The exit code is that of the first process that failed.
set -u
if [ $# -lt 3 ]; then
  echo "usage: $0 PROCESSES DEVICES_PER_PROCESS --config FILE --workdir DIR [flags]" >&2
  exit 64
fi
MOE_JAX_COMMAND=$(printf "%q " "$0" "$@") # what to type to go on
export MOE_JAX_COMMAND
processes=$1 devices=$2
shift 2
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
pids=()
for ((i = processes - 1; i >= 0; i--)); do
  output=/dev/stdout
  [ "$i" -eq 0 ] || output=/dev/null
  "$python" -m moe_jax.main --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$i" \
    "$@" --config.simulate_devices="$devices" >"$output" &
  pids+=($!)
done
trap ':' INT # the terminal signals the whole group; each process saves and ends by itself
code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  status=$?
  # a trapped signal ends `wait` early: ask again
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; status=$?; done
  [ "$status" -eq 0 ] || { [ "$code" -ne 0 ] || code=$status; }
done
exit "$code"
