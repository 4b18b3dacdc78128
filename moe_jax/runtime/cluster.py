"""The processes of one run: how they meet, what they compare before the first step, and how each
of them learns that another one has failed.

The engine is jax.distributed: process 0 runs its coordination service, a small key-value store
that every process reaches over the network. Keys are used here for three things:

    moe_jax/beat/I    counts up while process I lives. Process 0 reads them
    moe_jax/end/first why the run ends now, written by whoever finds a fault first. All read it
    moe_jax/same/...  what the processes compare before the first step

JAX has heartbeats of its own, but it ends a process by an abort under a C++ stack, after 100 s.
The ones here come first, and say in one line who is missing.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from moe_jax import exit_codes
from moe_jax.errors import UserError
from moe_jax.runtime import signals
from moe_jax.runtime.stacks import STACKS

ROOT = "moe_jax"
# Directories of keys, which is why they end with a slash.
BEATS, END = f"{ROOT}/beat/", f"{ROOT}/end/"
# The beat of a process whose run is over.
DONE = "done"
# JAX's own heartbeats are the second line: they speak when the thread here cannot.
JAX_LATER = 2.0
# Time for the others to read why the run ends, before a process is gone.
READ_BY_OTHERS = 1.0
# How the text of an error of XLA begins: the name of its status.
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")


def join(
    address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    timeout: float,
    heartbeat: float,
) -> None:
    """Meets the other processes of the run, and begins to watch them.

    Args:
      address: HOST:PORT of process 0; None = the cluster says it (SLURM, MPI, a TPU pod), and
        the two numbers too.
      num_processes: how many there are.
      process_id: the number of this one.
      timeout: seconds to wait for all of them.
      heartbeat: seconds after which a process that is not heard from counts as dead.

    Raises UserError when they do not meet.
    """
    # JAX's preemption service would take SIGTERM for itself: moe_jax.runtime.signals hears it.
    jax.config.update("jax_enable_preemption_service", False)
    # A launcher that shares the GPUs of a machine names those of this process.
    local_devices = os.environ.get("JAX_LOCAL_DEVICE_IDS", "")
    numbers = [int(number) for number in local_devices.split(",") if number]
    devices: Sequence[int] | None = numbers or None
    if address is None:
        address, num_processes, process_id, devices = detect(timeout)
    _past_proxies(address)
    _explain_abort(
        f"process {process_id}: the {num_processes} processes did not meet at {address} within "
        f"{timeout:.0f} s (limits.join): one was not started, or cannot reach process 0"
    )
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        local_device_ids=devices,
        # What is not given is meant: under SLURM, JAX would take one GPU of a process that has
        # the whole node.
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=int(JAX_LATER * heartbeat + 5),
        # JAX would listen on every interface of the machine, and whoever reaches the port can end
        # the run (SECURITY.md).
        coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address),
    )
    PEERS.start(heartbeat)


def _past_proxies(address: str) -> None:
    """Has gRPC reach process 0 without a proxy, which knows no way to it.

    The variables of the proxies stay as they are: a tracker may need them.
    """
    host = address.rpartition(":")[0].strip("[]")
    if any(os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        without = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
        os.environ["no_grpc_proxy"] = f"{without},{host}" if without else host


def detect(timeout: float) -> tuple[str, int, int, Sequence[int] | None]:
    """Returns what the cluster says: HOST:PORT of process 0, how many processes there are, the
    number of this one, and its devices (None = all of its machine).

    JAX's own detection (SLURM, Open MPI, a TPU pod, ...), called here because the address is
    needed to listen on that interface alone. Raises UserError when it finds no cluster.
    """
    from jax._src.clusters import ClusterEnv

    address, number, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(timeout)
    )
    if address is None or number is None or process is None:
        raise UserError(
            "--distributed: jax knows no cluster here (SLURM's srun, Open MPI, a TPU pod, ...): "
            "say --coordinator HOST:PORT --num_processes N --process_id I, or use launch/local.sh"
        )
    # JAX gives a task of SLURM one GPU, also when it is alone on its node.
    alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    return address, number, process, None if alone else devices


class Peers:
    """Watches the other processes of the run, from a thread, and tells them when this one fails.

    A process that finds a fault writes why to a key below END. Every process reads that key a few
    times per heartbeat, prints the reason and ends with its exit code, whatever its main thread
    is in: a collective that waits for a dead peer never returns by itself.
    """

    def __init__(self) -> None:
        self._client: Any = None
        self._heartbeat = 0.0
        # time.monotonic() of the coordinator's last answer.
        self._answered = 0.0
        self._lock = threading.Lock()
        # The run is done here, or this process ends: nothing that happens to others is a fault now.
        self._over = False
        # A thread ends this process.
        self._ending = False

    @property
    def started(self) -> bool:
        return self._client is not None

    @property
    def patience(self) -> float:
        """Returns the seconds within which the failure of another process is known here."""
        return self._heartbeat + 2 * READ_BY_OTHERS

    def start(self, heartbeat: float) -> None:
        """Begins to watch; `heartbeat` seconds of silence count as a death."""
        # The public API has no key-value store.
        from jax._src import distributed

        self._client = distributed.global_state.client
        self._heartbeat = heartbeat
        self._answered = time.monotonic()
        # All have met, so an abort has another reason from here on. In process 0 it shows its
        # stack.
        if jax.process_index() > 0:
            _explain_abort(f"process {jax.process_index()}: process 0, the coordinator, is gone")
        else:
            # SIG_DFL, the default of C.
            ctypes.CDLL(None).signal(int(signal.SIGABRT), None)
        threading.Thread(target=self._beat, name="peers", daemon=True).start()
        threading.Thread(target=self._watch_answers, name="coordinator", daemon=True).start()

    def finish(self) -> None:
        """Says that the run is done in this process: what happens to the others is no fault now."""
        with self._lock:
            self._over = True
        if self.started:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.set(_beat_of(jax.process_index()), DONE)

    def end(self, code: int, reason: str, last_words: str = "", *, is_stuck: bool = False) -> None:
        """Ends this process, and tells the others why, which end with the same code.

        Does not return. Whatever JAX would do at the end of Python (a barrier with all processes)
        is left out.

        Args:
          code: the exit code of this process and of the others.
          reason: what the others read.
          last_words: printed just before the end. The main thread may print until then, and the
            last line of a log has to say why the run ended.
          is_stuck: whether the run does not move. Then the others keep their stacks, too: the one
            that holds up all of them may be any of them.
        """
        with self._lock:
            tells = self.started and not self._over
            is_second, self._ending = self._ending, True
            self._over = True
        if is_second:
            # Another thread ends this process, and has its last words.
            time.sleep(2 * READ_BY_OTHERS)
        if tells:
            message = {
                "process": jax.process_index(),
                "code": code,
                "reason": reason,
                "is_stuck": is_stuck,
            }
            # The coordinator may be what has failed.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                # The first reason counts. Later ones are mostly its echo.
                self._client.key_value_set(
                    f"{END}first", json.dumps(message), allow_overwrite=False
                )
            # Process 0 holds the store: when it is gone, nobody can read the key any more.
            if jax.process_index() == 0:
                time.sleep(READ_BY_OTHERS)
        if last_words:
            signals.say(last_words)
        for stream in (sys.stdout, sys.stderr):
            # A stream may be full, gone or closed.
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    def set(self, key: str, value: str) -> None:
        """Writes a key of the store, in the place of what it had."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def wait_for(self, key: str, timeout: float) -> str | None:
        """Returns a key of the store; None when nobody writes it within `timeout` seconds."""
        try:
            return self._client.blocking_key_value_get(key, int(timeout * 1000))
        except jax.errors.JaxRuntimeError:
            return None

    def beats(self) -> dict[str, str] | None:
        """Returns the last beat of every process by its key; None when process 0 is silent."""
        try:
            return dict(self._client.key_value_dir_get(BEATS))
        except jax.errors.JaxRuntimeError:
            return None

    def meet(self, name: str, timeout: float) -> None:
        """Waits for all processes to be here. Raises UserError when one is not in time."""
        try:
            self._client.wait_at_barrier(f"{ROOT}/{name}", int(timeout * 1000))
        except jax.errors.JaxRuntimeError:
            raise UserError(
                f"not every process came to compare its {name} within {timeout:.0f} s: look at "
                "their logs"
            ) from None

    def _interval(self) -> float:
        """Returns the seconds between two beats."""
        # Short enough to read a reason before its process is gone, and to miss no beat.
        return min(READ_BY_OTHERS / 3, self._heartbeat / 5)

    def _beat(self) -> None:
        """Counts up the key of this process, and reads those of the others."""
        me, count = jax.process_index(), 0
        # The last beat of a process, and when it changed.
        heard: dict[int, tuple[str, float]] = {}
        while not self._over:
            count += 1
            try:
                self.set(_beat_of(me), str(count))
                ended = self._client.key_value_dir_get(END)
                # One watcher is enough: it tells the others.
                beats = self._client.key_value_dir_get(BEATS) if me == 0 else []
            except jax.errors.JaxRuntimeError:
                # The coordinator does not answer. JAX's own thread or `_watch_answers` says so.
                time.sleep(self._interval())
                continue
            self._answered = now = time.monotonic()
            for _, message in ended:
                self._obey(json.loads(message))
            for key, beat in beats:
                process = int(key.rpartition("/")[2])
                if heard.get(process, ("", 0.0))[0] != beat:
                    # The time of this machine: clocks of two machines differ.
                    heard[process] = beat, now
            for process, (_, when) in heard.items():
                done = heard[process][0] == DONE
                if now - when > self._heartbeat and not (done or self._over):
                    self._miss(process, now - when)
            time.sleep(self._interval())

    def _watch_answers(self) -> None:
        """Ends this process when the coordinator lives but does not answer, or when this process
        itself was stopped for so long that the others have given it up.
        """
        while not self._over:
            silent = time.monotonic() - self._answered
            if silent > self._heartbeat and not self._over:
                self._say(f"process 0, the coordinator, has not answered for {silent:.0f} s")
                os._exit(exit_codes.RETRY)
            time.sleep(self._interval())

    def _miss(self, process: int, seconds: float) -> None:
        """Ends the run, because a process is silent."""
        reason = (
            f"process {process} has not been heard from for {seconds:.0f} s: it was killed or "
            "stopped, or its machine is gone"
        )
        self.end(exit_codes.RETRY, reason, f"process {jax.process_index()}: {reason}")

    def _obey(self, message: Mapping[str, Any]) -> None:
        """Ends this process, because another one wrote why the run ends."""
        with self._lock:
            if self._over or message["process"] == jax.process_index():
                return
            self._over = self._ending = True
        if message["is_stuck"]:
            STACKS.write(f"process {message['process']}: {message['reason']}")
        # The others read the reason from process 0, too.
        if jax.process_index() == 0:
            time.sleep(READ_BY_OTHERS)
        # Last: the main thread may have printed meanwhile.
        self._say(f"ending, because process {message['process']} ended: {message['reason']}")
        os._exit(int(message["code"]))

    def _say(self, text: str) -> None:
        """Tells a line, with the number of this process."""
        signals.say(f"process {jax.process_index()}: {text}")


def _beat_of(process: int) -> str:
    """Returns the key that a process counts up."""
    return f"{BEATS}{process}"


PEERS = Peers()


def may_be_echo(error: Exception) -> bool:
    """Returns whether an exception may come from the failure of another process: whether XLA's
    runtime raised it.
    """
    # A compiled function that is called when the peer is gone already raises ValueError, and not
    # JaxRuntimeError, as it does when it reads a result.
    is_value_error = type(error) is ValueError and _STATUS.match(str(error)) is not None
    return is_value_error or isinstance(error, jax.errors.JaxRuntimeError)


def wait_for_reason() -> None:
    """Gives the thread that watches the peers the time to say which of them has failed.

    To be called after an exception that `may_be_echo` of a failure elsewhere: a collective that
    lost its peer raises before the silence of that peer is long enough. Returns when nobody
    else has failed; else the process ends here.
    """
    if not PEERS.started:
        return
    before = PEERS.beats()
    time.sleep(PEERS.patience)
    # The thread may be late, on a machine that is busy: a silence is waited for once more.
    until = time.monotonic() + PEERS.patience
    while somebody_silent(before, PEERS.beats()) and time.monotonic() < until:
        time.sleep(READ_BY_OTHERS / 3)


def somebody_silent(before: dict[str, str] | None, now: dict[str, str] | None) -> bool:
    """Returns whether a process has not beaten since `before`, or process 0 does not answer."""
    if before is None or now is None:
        return True
    return any(beat == now.get(process) != DONE for process, beat in before.items())


def _explain_abort(reason: str) -> None:
    """Ends the process with one line and RETRY where C++ would end it with an abort.

    When the processes do not meet, or the coordinator is gone, JAX logs a stack and calls abort():
    0.1 s later nothing of Python runs any more. So the handler of SIGABRT is a C callback.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number: int) -> None:
        del number
        signals.say(reason)
        os._exit(exit_codes.RETRY)

    # ctypes does not keep a callback alive: this does.
    _KEPT.append(aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), aborted)


_KEPT: list[Callable[[int], None]] = []
