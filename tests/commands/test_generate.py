"""`python -m moe_jax generate`, on a run as training leaves it."""

import gzip
import io
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from sample_cases import one_device, raw_config, values

from moe_jax import config
from moe_jax.checkpoint import Checkpoints
from moe_jax.commands import generate
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.tokenizer import bytes_tokenizer
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.train_step import State


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run as training leaves it: two checkpoints of a model with scan and bytes, the second with
    other parameters.
    """
    folder = tmp_path_factory.mktemp("run")
    raw = raw_config(scan=True, vocab_size=256, prefix=(), repeats=1)
    cfg = config.build({**raw, "mesh": mesh.ONE.written()}, 1)
    (folder / "config.json").write_text(json.dumps(raw))
    bytes_tokenizer().save(folder / "tokenizer")
    saves = Checkpoints(folder / "checkpoints", every=0, keep=2, keep_best=0)
    with jax.set_mesh(one_device()):
        params, router_state = values(cfg.model)
        for step in (1, 2):
            state = State(
                jnp.int32(step),
                params,
                router_state,
                {"count": jnp.int32(step)},
                None,
                jnp.int32(0),
            )
            saves.save(step, state, metadata={"config": raw}, score=None, stacked=True)
            params = jax.tree.map(lambda x: -x, params)
    saves.close()
    return folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(workdir, *flags):
    return generate.main(["--workdir", str(workdir), "--max_tokens", "24", *flags])


def test_generate_prints_the_prompt_and_its_text(workdir, capsys):
    assert run(workdir, "--prompt", "To be", "--temperature", "0") == 0
    newest = capsys.readouterr().out
    assert newest.startswith("To be") and newest.endswith("\n") and len(newest) > 10
    assert run(workdir, "--prompt", "To be", "--temperature", "0", "--step", "1") == 0
    assert capsys.readouterr().out != newest


def test_several_prompts_have_headings_streamed_or_not(workdir, capsys, monkeypatch):
    assert run(workdir, "--prompt", "one", "--prompt", "", "--prompt", "3") == 0
    given = capsys.readouterr().out
    headings = ("=== 1: 'one' ===\n", "\n\n=== 2: '' ===\n", "\n\n=== 3: '3' ===\n")
    at = [given.index(heading) for heading in headings]
    assert at[0] == 0 and at == sorted(at)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n3\n"))
    assert run(workdir, "--no_stream") == 0
    assert capsys.readouterr().out == given


def test_where_prompts_come_from():
    assert generate.read_prompts(["a", "b"], io.StringIO("c\n")) == ["a", "b"]
    assert generate.read_prompts(None, io.StringIO("c\r\n\nd")) == ["c", "", "d"]
    assert generate.read_prompts(None, io.StringIO("")) == [""]
    assert generate.read_prompts(None, Terminal("not read\n")) == [""]
    assert generate.read_prompts(["caf\udce9"], io.StringIO()) == ["caf\N{REPLACEMENT CHARACTER}"]


def piped(data):
    return io.TextIOWrapper(
        io.BytesIO(data), encoding="ascii"
    )  # as where the shell says nothing of UTF-8


def test_prompts_that_are_piped_are_utf8_whatever_the_shell_says():
    for data in ("é\r\n\u2028b\n".encode(), "é\n\u2028b".encode("utf-16")):
        assert generate.read_prompts(None, piped(data)) == ["é", "\u2028b"]
    for data, message in (
        (
            "café\n".encode("latin1"),
            r"standard input is not UTF-8 \(byte 0xe9 after 'caf'\): convert it",
        ),
        ("plain".encode("utf-16-le"), "standard input is not UTF-8 but UTF-16LE without a mark"),
        (gzip.compress(b"text"), "standard input is no text but packed .*by gzip"),
        (b"a\0b", "standard input is not UTF-8 but no text"),
    ):
        with pytest.raises(UserError, match=message):
            generate.read_prompts(None, piped(data))


def test_texts_are_shown_in_order_whatever_order_they_come_in():
    for order in itertools.permutations([(0, "a"), (0, ""), (1, "b"), (1, "")]):
        if order.index((0, "a")) < order.index((0, "")) and order.index((1, "b")) < order.index(
            (1, "")
        ):
            out = io.StringIO()
            show = generate.Printer(["x", "y"], out)
            for row, text in order:
                show(row, text)
            assert out.getvalue() == "=== 1: 'x' ===\na\n\n=== 2: 'y' ===\nb\n"


def test_a_terminal_is_shown_no_control_characters():
    for out, expected in ((Terminal(), "p�[2J\té\n\n"), (io.StringIO(), "p\x1b[2J\té\n\n")):
        show = generate.Printer(["p"], out)
        show(0, "\x1b[2J\té\n")
        show(0, "")
        assert out.getvalue() == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature = -1.0 must be at least 0"),
        (
            ["--temperature", "0", "--top_k", "5", "--seed", "1"],
            "--top_k 5 and --seed 1 would do nothing",
        ),
        (["--top_p", "0"], "top_p = 0.0 must be above 0"),
        (["--step", "7"], "there is no checkpoint of step 7 in .*: it has 1, 2"),
        (
            ["--raw"],
            r"--raw: the run kept no moving average of its parameters \(optim.ema_decay = 0\)",
        ),
    ],
)
def test_generate_refuses_bad_flags(workdir, flags, message):
    with pytest.raises(UserError, match=message):
        run(workdir, "--prompt", "x", *flags)


def test_generate_says_what_a_workdir_lacks(workdir, tmp_path):
    with pytest.raises(
        UserError,
        match=r"--workdir .*nowhere holds no run, because .*config.json cannot be read \(No such",
    ):
        run(tmp_path / "nowhere", "--prompt", "x")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text()[:-30])
    with pytest.raises(UserError, match=r"config.json is damaged"):
        run(tmp_path, "--prompt", "x")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(UserError, match=r"there is no checkpoint in .*checkpoints yet"):
        run(tmp_path, "--prompt", "x")
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    with pytest.raises(UserError, match="tokenizer holds no complete tokenizer"):
        run(tmp_path, "--prompt", "x")
    tokenizer_lib.make("bpe:600", lambda: ["any text of another run " * 99]).save(
        tmp_path / "tokenizer"
    )
    with pytest.raises(
        UserError, match=r"tokenizer has \d+ ids \(bpe:600\), but the model of this run has 256"
    ):
        run(tmp_path, "--prompt", "x")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="holds no complete tokenizer"):
        run(tmp_path, "--prompt", "x")
    bytes_tokenizer().save(tmp_path / "tokenizer")
    assert run(tmp_path, "--prompt", "x") == 0


def copy_of(workdir, tmp_path, change):
    """The run with another config.json: `change` edits it. Returns its path."""
    for part in ("checkpoints", "tokenizer"):
        (tmp_path / part).symlink_to(workdir / part)
    raw = json.loads((workdir / "config.json").read_text())
    change(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def test_keys_added_since_the_run_have_their_defaults(workdir, tmp_path, capsys, monkeypatch):
    def older(raw):
        del (
            raw["model"]["norm_epsilon"],
            raw["profile"],
            raw["model"]["moe"]["dispatchers"]["dropless"],
        )

    assert run(workdir, "--prompt", "x", "--temperature", "0") == 0
    expected = capsys.readouterr().out
    old = copy_of(workdir, tmp_path, older)
    assert run(old, "--prompt", "x", "--temperature", "0") == 0
    out, err = capsys.readouterr()
    assert out == expected
    # Nothing of an option of the dispatcher that the run did not choose, and nothing of a key that
    # may change: it does not touch what was computed.
    assert err == "model.norm_epsilon is new since this run: taken as its default 1e-06\n"
    monkeypatch.chdir(tmp_path)  # from any directory
    assert run(old, "--prompt", "x", "--temperature", "0") == 0
    assert capsys.readouterr().out == expected


def test_keys_that_are_no_more_are_named(workdir, tmp_path):
    def newer(raw):
        raw["model"]["moe"]["jitter"], raw["glow"], raw["eval"]["extra"] = 0.5, "high", 1

    run_dir = copy_of(workdir, tmp_path, newer)
    with pytest.raises(
        UserError, match=r'has no more: glow = "high"; model.moe.jitter = 0.5. Use the version'
    ):
        run(run_dir, "--prompt", "x")


def test_a_closed_pipe_ends_quietly(workdir):
    program = "import sys; from moe_jax.commands.generate import main; sys.exit(main(sys.argv[1:]))"
    flags = ["--workdir", str(workdir), "--prompt", "x", "--max_tokens", "200"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout and child.stderr
        assert child.stdout.read(1) == b"x"  # and nobody reads on
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 0
