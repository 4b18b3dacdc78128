"""`python -m moe_jax.main --config configs/x.py --workdir runs/x [--config.KEY=VALUE ...]
[--dry_run]`: trains a model.

Exit codes: 0 done (or saved after SIGTERM or SIGHUP), 64 a mistake that the message names, 70 a
fault of the program, 75 another process or a machine failed (start again), 76 stopped by a
non-finite loss, 77 every checkpoint is damaged, 78 the processes differ, 130 saved after Ctrl-C,
128 + N ended by signal N when there was nothing to save yet, or by a second signal.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.runtime import memory, shell, signals

if __name__ == "__main__":  # before jax is imported, which takes seconds
    memory.keep()
    memory.collect_rarely()
    shell.open_output(lasting=True)
    signals.LISTENER.start()

import jax
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_jax import STARTED, config, exit_codes, version
from moe_jax.config import command_line, config_file, smoke
from moe_jax.errors import UserError
from moe_jax.parallel import device_memory, mesh
from moe_jax.parallel.compiling import QUICK, as_flags
from moe_jax.runtime import agreement, cluster
from moe_jax.schema.beside import LimitsConfig

FLAGS = flags.FLAGS
HELP = {"--help", "-help", "-h"}
flags.DEFINE_string("config", None, command_line.HELP)
flags.DEFINE_string(
    "workdir",
    None,
    "where checkpoints, metrics and samples go; the same command again goes on from there",
)
flags.DEFINE_bool(
    "smoke",
    False,
    "train a few steps only, with a small evaluation, to see that the whole run works",
)
flags.DEFINE_bool(
    "dry_run", False, "print the resource card of the config (parameters, FLOPs, memory) and exit"
)
flags.DEFINE_multi_string(
    "allow_change",
    [],
    "key that may differ from the config this run was started with, such as optim.learning_rate; "
    "may be given several times",
)
flags.DEFINE_bool(
    "preflight", False, "look at every process, its disk and the network between them, and exit"
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for a run of several processes")
flags.DEFINE_integer("num_processes", None, "processes of the run")
flags.DEFINE_integer("process_id", None, "number of this process, from 0")
flags.DEFINE_bool(
    "distributed", False, "several processes that jax finds by itself (SLURM, MPI, a TPU pod)"
)


def parse(argv: list[str]) -> ConfigDict:
    """Reads the flags and returns the config; whatever is wrong with them becomes one message."""
    if HELP & set(argv):
        print(f"{__doc__}\n{FLAGS.main_module_help()}")
        raise SystemExit(0)
    # The config is read first: it says which --config.KEY flags there are.
    config = config_file.load(config_path(argv))
    changes, words = command_line.split(argv)
    try:
        rest = FLAGS(words)
    except flags.Error as error:
        raise UserError(command_line.plain(error, words) + command_line.HINT) from error
    if len(rest) > 1:
        raise UserError(f"what is {rest[1]!r}? Keys are written --config.{rest[1].lstrip('-')}")
    command_line.changed(config, changes)
    shell.refuse_address(FLAGS.workdir or "", "--workdir")
    # A resource card is printed, and writes nothing.
    if not FLAGS.workdir and not FLAGS.dry_run:
        raise UserError(
            "--workdir is missing: name a directory for the run, such as --workdir runs/quickstart"
        )
    return config


def config_path(argv: list[str]) -> Path:
    """Returns the file of --config.

    UserError when there is none or there are two: absl says it badly, or takes the one that it can
    read.
    """
    values = []
    # A flag is written --config FILE, or --config=FILE.
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            values.append(value if equals else following)
            if not values[-1] or (not equals and values[-1].startswith("-")):
                raise UserError(
                    "--config has no value: name a config file, such as --config "
                    "configs/quickstart.py"
                )
    if not values:
        raise UserError(
            "--config is missing: name a config file, such as --config configs/quickstart.py"
        )
    if len(values) > 1:
        raise UserError(
            f"--config is given {len(values)} times ({', '.join(values)}): name one file"
        )
    return Path(values[0])


def start_devices(raw: Mapping[str, Any]) -> None:
    """Sets up simulated devices and joins the other processes, before jax looks for devices."""
    if raw["simulate_devices"]:
        mesh.simulate(raw["simulate_devices"])
    if FLAGS.coordinator and (FLAGS.num_processes is None or FLAGS.process_id is None):
        raise UserError("--coordinator needs --num_processes and --process_id beside it")
    if FLAGS.coordinator or FLAGS.distributed:
        join(raw)


def join(raw: Mapping[str, Any]) -> None:
    """Meets the other processes, and refuses a run whose processes were started differently.

    From here on none of them ends by itself: they agree in the loop of the run.
    """
    limits = LimitsConfig(**raw["limits"])
    where = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if not FLAGS.coordinator:
        # jax finds all three by itself.
        where = (None, None, None)
    try:
        cluster.join(*where, timeout=limits.join, heartbeat=limits.heartbeat)
    except (ValueError, RuntimeError) as error:
        flags = "--coordinator, --num_processes and --process_id"
        if not FLAGS.coordinator:
            flags = "--distributed"
        # Messages of jax have several lines.
        text = " ".join(str(error).split())
        raise UserError(
            f"{flags}: jax cannot bring the processes together: {text}. --distributed is for a "
            "cluster that jax knows (SLURM, MPI, "
            "a TPU pod); elsewhere say --coordinator HOST:PORT --num_processes N --process_id I, "
            "or use launch/local.sh"
        ) from error
    if signals.LISTENER.started:
        signals.LISTENER.process = f"process {jax.process_index()}: "
        signals.LISTENER.note()
    # Every process must have been started with the same config, directory and code.
    said = {**flatten_dict(dict(raw), sep="."), "--workdir": FLAGS.workdir}
    agreement.compare("config", said, limits.join)
    agreement.compare("code", version.made_by(), limits.join)


def read_config(tree: ConfigDict) -> dict[str, Any]:
    """Returns the config as a nested dict of JSON values, so that what is compared on resume is
    what was saved.
    """
    raw = config_file.values(tree)
    if FLAGS.smoke or raw["smoke"]:
        raw = smoke_config(raw)
    config.allow_float64(raw)
    return raw


def smoke_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of a few steps of the run.

    Says what it changed, and has programs compiled quickly, which is most of the time.
    """
    short, changed = smoke.shorten(raw)
    # Flags that the user has set stay.
    os.environ.setdefault("XLA_FLAGS", as_flags(QUICK))
    # Process 0 alone says it, or the only one.
    if not FLAGS.process_id:
        print(f"smoke run, to see that everything works: {', '.join(changed)}", flush=True)
    return short


def main(argv: list[str]) -> int:
    """Returns the exit code. In a run of several processes, one that fails ends all of them."""
    try:
        return launch(argv)
    except UserError as error:
        code, reason = error.code, str(error)
        shell.tell(f"error: {reason}", sys.stderr)
    except OSError as error:  # a disk that is full, a directory that may not be written to
        code, reason = exit_codes.CONFIG, shell.reason(error)
        shell.tell(f"error: {reason}", sys.stderr)
    except Exception as error:
        if reason := device_memory.exhausted(error):
            code = exit_codes.CONFIG
            shell.tell(f"error: {reason}", sys.stderr)
        else:
            if cluster.may_be_echo(error):
                cluster.wait_for_reason()
            # Printed here: nothing may come after it in the log of this process.
            code, reason = exit_codes.INTERNAL, f"{type(error).__name__}: {error}"
            traceback.print_exc()
    # The others must not wait for a process that is gone.
    if cluster.PEERS.started:
        cluster.PEERS.end(code, reason)
    return code


def launch(argv: list[str]) -> int:
    raw = read_config(parse(argv))
    start_devices(raw)
    cfg = config.build(raw, len(jax.devices()))
    # From here on jax has its devices.
    with jax.set_mesh(mesh.make(cfg.mesh, slow_axis=cfg.mesh_slow_axis)):
        if FLAGS.dry_run:
            return dry_run(cfg)
        if FLAGS.preflight:
            return preflight(cfg)
        return train(cfg, raw)


def dry_run(cfg: config.Config) -> int:
    from moe_jax.plan import card, card_tables

    shell.console().print(card_tables.render(card.card(cfg)))
    return 0


def preflight(cfg: config.Config) -> int:
    from moe_jax import preflight

    report = preflight.run(cfg, Path(FLAGS.workdir), version.made_by())
    if jax.process_index() == 0:
        shell.console().print(preflight.render(report), highlight=False)
    cluster.PEERS.finish()
    return report.code


def train(cfg: config.Config, raw: dict[str, Any]) -> int:
    from moe_jax import train
    from moe_jax.report import summary
    from moe_jax.runtime.stopping import NonFinite

    workdir, main = Path(FLAGS.workdir), jax.process_index() == 0
    # Orbax logs a traceback for each of its threads when a save fails, which the error of the run
    # tells in one line.
    logging.getLogger("absl").addFilter(lambda record: "raised an exception" not in str(record.msg))
    try:
        result = train.run(cfg, raw, workdir, STARTED, FLAGS.config, tuple(FLAGS.allow_change))
    except NonFinite as e:
        shell.tell(f"stopped: {e}", sys.stderr)
        if cluster.PEERS.started:
            cluster.PEERS.end(exit_codes.NOT_FINITE, str(e))
        return exit_codes.NOT_FINITE
    signals.LISTENER.saved = True
    cluster.PEERS.finish()
    if result.signal:
        if main:
            command = shell.going_on(result.step, cfg.train.stop_at)
            shell.tell(
                f"saved step {result.step} of {cfg.train.steps} in {workdir}; go on with:\n  "
                f"{command}"
            )
        return signals.exit_code(result.signal, saved=True)
    if main:
        summary.show(cfg, workdir, result, time.monotonic() - STARTED)
        if cfg.smoke:
            shell.tell(
                f"smoke run: all of it works, and nothing was learned. Remove {workdir}, or name "
                "another --workdir, "
                "before you type the command without --smoke"
            )
    return 0


if __name__ == "__main__":
    code = main(sys.argv)
    if code not in (0, 130):
        # Nothing is left to be done, and the other processes of the run are not waited for.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
