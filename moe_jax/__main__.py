"""`python -m moe_jax NAME ...`: the table of commands. Training is `python -m moe_jax.main --config ... --workdir ...`."""

import importlib
import sys

from moe_jax import shell
from moe_jax.errors import UserError

COMMANDS = {
    "data": "make the files of a task's data set from what its publisher distributes",
    "prepare": "make a token dataset from text, once",
    "bench": "time the steps of several configs against each other",
    "generate": "continue a prompt with a trained model",
    "verify": "prove that a config computes the same on every mesh",
    "leak": "measure whether later tokens or other sequences change earlier outputs",
    "convert": "make another checkpoint of a trained model: without its zeros",
    "probe": "what a trained model's routing and experts are worth",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m moe_jax COMMAND ...\n")
        print("\n".join(f"  {name:10} {about}" for name, about in COMMANDS.items()))
        print("\n  python -m moe_jax.main --config configs/quickstart.py --workdir runs/quickstart   trains a model")
        return 0 if argv else 64
    if argv[0] not in COMMANDS:
        print(f"error: {argv[0]!r} is no command: {', '.join(COMMANDS)}", file=sys.stderr)
        return 64
    try:
        return importlib.import_module(f"moe_jax.commands.{argv[0]}").main(argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 64


if __name__ == "__main__":
    sys.exit(shell.run_command(main, sys.argv[1:]))
