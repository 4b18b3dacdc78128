#!/usr/bin/env bash
# Starts one process of a run in a container: launch/kubernetes/start.sh [any flag of moe_jax.main]
#
#     COORDINATOR            HOST:PORT of process 0
#     PROCESSES              how many there are
#     JOB_COMPLETION_INDEX   the number of this one, which Kubernetes sets in a pod of an indexed Job
#     POD_IP                 the address of this pod, where process 0 listens
#
# SIGTERM is passed on as SIGINT, because the exit code of the run is then 130 in all of its pods,
# also in those that no signal reached. After SIGTERM it would be 0, which Kubernetes takes for the
# end of the run: the pod would not be started again.
set -u
if [ -z "${COORDINATOR:-}" ] || [ -z "${PROCESSES:-}" ] || [ -z "${JOB_COMPLETION_INDEX:-}" ]; then
  echo "error: start.sh needs COORDINATOR, PROCESSES and JOB_COMPLETION_INDEX (docs/clusters.md)" >&2
  exit 64
fi
# The name of a pod is known to the cluster's DNS a little after the pod has started. Its address is
# known at once.
if [ "$JOB_COMPLETION_INDEX" -eq 0 ] && [ -n "${POD_IP:-}" ]; then
  case $POD_IP in *:*) POD_IP="[$POD_IP]" ;; esac
  export JAX_COORDINATOR_BIND_ADDRESS=$POD_IP:${COORDINATOR##*:}
fi

set -m # without it, bash starts a job in the background with SIGINT ignored
"${PYTHON:-python}" -m moe_jax.main --coordinator="$COORDINATOR" --num_processes="$PROCESSES" \
  --process_id="$JOB_COMPLETION_INDEX" "$@" &
run=$!
trap 'kill -INT "$run" 2>/dev/null' TERM INT
# A trapped signal ends `wait` early: wait until the process is gone, then ask once more. bash keeps
# its code.
wait "$run"
while kill -0 "$run" 2>/dev/null; do wait "$run"; done
wait "$run"
exit "$?"
