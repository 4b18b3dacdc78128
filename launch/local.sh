#!/usr/bin/env bash
# Several processes on this machine, each with simulated CPU devices, through jax.distributed:
#
#     launch/local.sh PROCESSES DEVICES --config configs/debug.py --workdir runs/two [any flag of moe_jax.main]
#
# Process 0 prints here; errors of every process do too. Ctrl-C, SIGTERM and
# SIGHUP are passed on to all of them, which save and end. The exit code is
# that of the first process that failed.
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

pids=() heard=
pass_on() {
  heard=$1
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$heard" "$pid" 2>/dev/null; done
}
for name in INT TERM HUP; do trap "pass_on $name" "$name"; done # under nohup HUP stays ignored

# Each process in a process group of its own: what the terminal sends to the
# whole group would otherwise reach it twice, and a second signal ends it at once.
set -m
for ((i = processes - 1; i >= 0; i--)); do
  command=("$python" -m moe_jax.main --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$i")
  command+=("$@" --config.simulate_devices="$devices")
  if [ "$i" -eq 0 ]; then
    "${command[@]}" &
  else
    "${command[@]}" >/dev/null &
  fi
  pids+=($!)
  [ -z "$heard" ] || kill -s "$heard" $! # it came while the processes were being started
done

code=0
for pid in "${pids[@]}"; do
  # A trapped signal ends `wait` early: wait until the process is gone, then ask once more. bash
  # keeps its code.
  wait "$pid"
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid"
  status=$?
  [ "$status" -eq 0 ] || { [ "$code" -ne 0 ] || code=$status; }
done
exit "$code"
