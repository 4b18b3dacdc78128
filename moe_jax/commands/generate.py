"""`python -m moe_jax generate --workdir DIR --prompt TEXT`: text from a trained model.

Uses one device, whatever mesh the model was trained on. The text goes to standard output, the
prompt in front of it.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

import jax

from moe_jax.data.sources.characters import encoding, plain, wrong_bytes
from moe_jax.data.sources.packed import HEAD
from moe_jax.decoding.sample import Settings, check, make_sampler
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.run import open_run
from moe_jax.tasks import TASKS

# C0 and C1 control characters, which can steer a terminal.
CONTROL = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\n\t"
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax generate", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of the run that trained the model"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="may be repeated; none: the lines of standard input, if it is no terminal",
    )
    parser.add_argument(
        "--max_tokens", type=int, default=200, help="tokens per prompt (default 200)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = greedy (default 0.8)")
    parser.add_argument(
        "--top_k", type=int, help="draw from the k likeliest tokens; 0 = all (default)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        help="draw from the likeliest tokens that make up p; 1 = all (default 0.95)",
    )
    parser.add_argument("--seed", type=int, help="of what is drawn (default 0)")
    parser.add_argument(
        "--stop", action="append", default=[], help="text to stop before; may be repeated"
    )
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the parameters themselves, not their moving average (optim.ema_decay)",
    )
    parser.add_argument(
        "--no_stream",
        action="store_true",
        help="print a text when all are finished, not as it is made",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, also when the output's reader goes away; 130 when interrupted."""
    flags = parse(argv)
    # Warnings, such as of a prompt that is too long, stand on a line of their own.
    logging.basicConfig(format="\n%(message)s", level=logging.WARNING)
    settings = settings_of(flags)
    check(settings)
    try:
        run(flags, read_prompts(flags.prompt, sys.stdin), settings)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Or Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def settings_of(flags: argparse.Namespace) -> Settings:
    """Returns the settings that the flags ask for. Raises UserError for one that does nothing."""
    drawn = {"--top_k": flags.top_k, "--top_p": flags.top_p, "--seed": flags.seed}
    idle = [f"{name} {value}" for name, value in drawn.items() if value is not None]
    if flags.temperature == 0 and idle:
        raise UserError(
            f"--temperature 0 always takes the likeliest token, so {' and '.join(idle)} would do "
            "nothing: leave it out, or give a temperature above 0"
        )
    return Settings(
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k or 0,
        top_p=0.95 if flags.top_p is None else flags.top_p,
        seed=flags.seed or 0,
        stop=tuple(map(printable, flags.stop)),
    )


def run(flags: argparse.Namespace, prompts: list[str], settings: Settings) -> None:
    """Reads the run and prints a text for every prompt."""
    trained = open_run(flags.workdir, flags.step)
    cfg = trained.config
    if not TASKS[cfg.task].is_language:
        raise UserError(
            f'--workdir {flags.workdir} is a run of task = "{cfg.task}" (model.kind '
            f'"{cfg.model.kind}"), which has no text to continue: its outputs on held-out data are '
            "in predictions.jsonl there, and only a language model generates"
        )
    tokenizer = trained.tokenizer
    if flags.raw and not cfg.optim.ema_decay:
        raise UserError(
            "--raw: the run kept no moving average of its parameters (optim.ema_decay = 0): leave "
            "the flag out"
        )
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        params = trained.parameters if flags.raw else trained.judged
        sampler = make_sampler(cfg.model, tokenizer, cfg.data.seq_len)
        show = Printer(prompts, sys.stdout)
        stream = None if flags.no_stream else show
        texts = sampler(params, trained.router_state, prompts, settings, stream)
    if flags.no_stream:
        for row, text in enumerate(texts):
            show(row, text)
            # The end of the row.
            show(row, "")


def read_prompts(given: list[str] | None, stdin: TextIO) -> list[str]:
    """Returns the prompts of the command line, else the lines of a file or pipe on standard input,
    else one empty prompt.

    Raises UserError for standard input that is no text.
    """
    prompts = given
    if prompts is None and not stdin.isatty():
        text = text_of(stdin)
        prompts = text.removesuffix("\n").split("\n") if text else []
    return [printable(prompt) for prompt in prompts or [""]]


def text_of(stdin: TextIO) -> str:
    """Returns all of standard input, whatever the encoding of the shell.

    The rules are those of text files: UTF-8, or UTF-16 with its mark.
    """
    binary = getattr(stdin, "buffer", None)
    # A stream that someone else has put in place may be of text alone.
    if binary is None:
        return plain(stdin.read(), "standard input")
    data = binary.read()
    try:
        return plain(data.decode(encoding(data[:HEAD], "standard input")), "standard input")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input {wrong_bytes(error)}") from None


def printable(text: str) -> str:
    """Returns a text with U+FFFD in place of surrogates.

    Bytes of the command line that are no UTF-8 come as such, and no tokenizer takes them.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Printer:
    """Shows the texts in order: that of the first unfinished row as it comes, the others when it is
    their turn.
    """

    def __init__(self, prompts: list[str], out: TextIO):
        self._prompts, self._out, self._turn = prompts, out, 0
        # Text that came before it is the row's turn.
        self._waiting = [""] * len(prompts)
        self._ended = [False] * len(prompts)
        # A terminal that cannot show a letter shows a sign for it, and the run goes on.
        if hasattr(out, "reconfigure"):
            out.reconfigure(errors="replace")
        self._head()

    def __call__(self, row: int, text: str) -> None:
        """Takes more text of a row; "" ends it."""
        self._waiting[row] += text
        self._ended[row] |= not text
        # Whatever is there of the row whose turn it is; where it has ended, of the next ones too.
        while self._turn < len(self._prompts):
            self._write(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if not self._ended[self._turn]:
                return
            self._write("\n")
            self._turn += 1
            self._head()

    def _head(self) -> None:
        """Writes what stands before a text: a single prompt as it is, of several each as a
        heading.
        """
        if self._turn == len(self._prompts):
            return
        prompt = self._prompts[self._turn]
        if len(self._prompts) == 1:
            self._write(prompt)
            return
        blank_line = "\n" if self._turn else ""
        self._write(f"{blank_line}=== {self._turn + 1}: {prompt!r} ===\n")

    def _write(self, text: str) -> None:
        if text:
            # A model may say anything, but must not steer the terminal.
            self._out.write(text.translate(CONTROL) if self._out.isatty() else text)
            self._out.flush()
