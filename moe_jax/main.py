"""`python -m moe_jax.main --config configs/x.py --workdir runs/x [--config.KEY=VALUE ...]
[--dry_run]`: trains a model.

Exit codes: 0 done (or saved after SIGTERM or SIGHUP), 64 a mistake that the message names, 76
stopped by a non-finite loss, 130 saved after Ctrl-C, 128 + N ended by signal N when there was
nothing to save yet, or by a second signal.
"""

import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from moe_jax.runtime import shell, signals

if __name__ == "__main__":  # before jax is imported, which takes seconds
    shell.open_output(lasting=True)
    signals.LISTENER.start()

import jax
from absl import flags
from ml_collections import config_flags

from moe_jax import STARTED, config
from moe_jax.config import config_file, smoke
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.parallel.compiling import QUICK, as_flags

FLAGS = flags.FLAGS
HELP = {"--help", "-help", "-h"}
config_flags.DEFINE_config_file(
    "config", None, "config file; --config.KEY=VALUE changes a key", lock_config=True
)
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
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for a run of several processes")
flags.DEFINE_integer("num_processes", None, "processes of the run")
flags.DEFINE_integer("process_id", None, "number of this process, from 0")
flags.DEFINE_bool(
    "distributed", False, "several processes that jax finds by itself (SLURM, MPI, a TPU pod)"
)


def parse(argv: list[str]) -> None:
    """Reads the flags; whatever is wrong with them becomes one message."""
    if HELP & set(argv):
        print(f"{__doc__}\n{FLAGS.main_module_help()}")
        raise SystemExit(0)
    path = config_path(argv)
    config_file.load(
        path
    )  # says what is wrong with the file or its variant; ml_collections would not in one line
    try:
        rest = FLAGS(argv)
        FLAGS.config.to_dict()  # a file that cannot be executed shows itself at the first use only
    except ImportError as e:
        raise UserError(f"the config file {path} cannot be loaded: {e}") from e
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        SyntaxError,
    ) as e:
        raise UserError(
            f"{plain(e, argv)} (python -m moe_jax.main --help lists the flags, configs/base.py the "
            "keys)"
        ) from e
    if len(rest) > 1:
        raise UserError(f"what is {rest[1]!r}? Keys are written --config.{rest[1].lstrip('-')}")
    if not FLAGS.workdir and not FLAGS.dry_run:
        raise UserError(
            "--workdir is missing: name a directory for the run, such as --workdir runs/quickstart"
        )


def config_path(argv: list[str]) -> Path:
    """The file of --config.

    UserError when there is none or there are two: absl says it badly, or takes the one that it can
    read.
    """
    values = []
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


def plain(error: BaseException, argv: list[str]) -> str:
    """One line of what absl or ml_collections say; a misspelt key by its whole path."""
    if found := config_file.misspelt(error):
        return f"the config file: {found}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())
    text = text.replace("module 'config_config'", "the config file")  # what ml_collections calls it
    wrong = re.fullmatch(r"""\W*(\w+)\W*(?: Did you mean "(\w+)" instead of "\w+"\?)?\W*""", text)
    if not wrong:
        return text
    flag = next(
        (a.partition("=")[0] for a in argv if wrong[1] in a.partition("=")[0].split(".")), wrong[1]
    )
    return f"no key is called {flag}" + (f': did you mean "{wrong[2]}"?' if wrong[2] else "")


def start_devices(simulate: int) -> None:
    """Simulated devices and the other processes of the run, before jax looks for devices."""
    if simulate:
        mesh.simulate(simulate)
    if FLAGS.coordinator:
        if FLAGS.num_processes is None or FLAGS.process_id is None:
            raise UserError("--coordinator needs --num_processes and --process_id beside it")
        join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    elif FLAGS.distributed:
        join()


def join(*place: Any) -> None:
    """Meets the other processes.

    From here on none of them ends by itself: they agree in the loop of the run.
    """
    try:
        jax.distributed.initialize(*place)
    except (ValueError, RuntimeError) as error:
        flags = "--coordinator, --num_processes and --process_id" if place else "--distributed"
        text = " ".join(str(error).split())
        raise UserError(
            f"{flags}: jax cannot bring the processes together: {text}. --distributed is for a "
            "cluster that jax knows (SLURM, MPI, "
            "a TPU pod); elsewhere say --coordinator HOST:PORT --num_processes N --process_id I, "
            "or use launch/local.sh"
        ) from error
    if signals.LISTENER.started:
        signals.LISTENER.claim()
        signals.LISTENER.process = f"process {jax.process_index()}: "
        signals.LISTENER.note()


def read_config() -> dict[str, Any]:
    """The config as a nested dict of JSON values, so that what is compared on resume is what was
    saved.
    """
    raw = json.loads(json.dumps(FLAGS.config.to_dict()))
    if FLAGS.smoke or raw["smoke"]:
        raw = smoke_config(raw)
    if "float64" in (raw["model"]["dtype"], raw["model"]["param_dtype"]):
        jax.config.update("jax_enable_x64", True)
    return raw


def smoke_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of a few steps of the run.

    Says what it changed, and has programs compiled quickly, which is most of the time.
    """
    short, changed = smoke.shorten(raw)
    os.environ.setdefault("XLA_FLAGS", as_flags(QUICK))
    if not FLAGS.process_id:
        print(f"smoke run, to see that everything works: {', '.join(changed)}", flush=True)
    return short


def main(argv: list[str]) -> int:
    try:
        return launch(argv)
    except UserError as e:
        shell.tell(f"error: {e}", sys.stderr)
        return 64
    except OSError as e:  # a disk that is full, a directory that may not be written to
        shell.tell(f"error: {shell.reason(e)}", sys.stderr)
        return 64


def launch(argv: list[str]) -> int:
    parse(argv)
    raw = read_config()
    start_devices(raw["simulate_devices"])
    path = Path(config_flags.get_config_filename(FLAGS["config"]).partition(":")[0])
    defaults = json.loads(json.dumps(config_file.defaults(path).to_dict()))
    config.refuse_unchosen(raw, defaults)
    cfg = config.build(raw, len(jax.devices()))
    with jax.set_mesh(mesh.make(cfg.mesh)):
        if FLAGS.dry_run:
            return dry_run(cfg)
        return train(cfg, raw, defaults)


def dry_run(cfg: config.Config) -> int:
    from moe_jax.plan import card

    shell.console().print(card.render(card.card(cfg)))
    return 0


def train(cfg: config.Config, raw: dict[str, Any], defaults: dict[str, Any]) -> int:
    from moe_jax import train
    from moe_jax.report import summary
    from moe_jax.runtime.stopping import NonFinite

    workdir, main = Path(FLAGS.workdir), jax.process_index() == 0
    # Orbax logs a traceback for each of its threads when a save fails, which the error of the run
    # tells in one line.
    logging.getLogger("absl").addFilter(lambda record: "raised an exception" not in str(record.msg))
    try:
        result = train.run(
            cfg, raw, defaults, workdir, STARTED, config_flags.get_config_filename(FLAGS["config"])
        )
    except NonFinite as e:
        shell.tell(f"stopped: {e}", sys.stderr)
        return 76
    signals.LISTENER.saved = True
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
    if code not in (
        0,
        130,
    ):  # nothing is left to be done, and the other processes of the run are not waited for
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
