"""Every command of the documentation works: they are read from the text (tests/documented.py), so a
new one is covered by being written.

Here all of them are parsed by bash and by their own flags, every training run and every cell of the
experiments is built, and some are
typed: a few steps each, by --smoke, in this process. `full`: every one is typed, in the order of
its page, in a directory that has what the placeholders name.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import documented
import jax
import pyarrow as pa
import pytest
import sample_data
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from moe_jax import __main__, config, main
from moe_jax.config import command_line, config_file, smoke
from moe_jax.data.corpora import documents
from moe_jax.instruments import leak
from moe_jax.verify import shrink

ROOT = documented.ROOT
# Which are not typed here, by their program, and why.
UNTYPED = {
    "venv": "makes an environment and fills it from the network",
    "pytest": "is this suite, or a part of it",
    "tensorboard": "is a server, which does not end",
    "experiments.redraw": "draws the plots of this very repository again: "
    "tests/experiments/test_plots.py draws each of them",
    "experiments.pays": "draws the picture of README again: "
    "tests/experiments/test_plots.py draws one",
    "moe_jax plan": "compiles for hardware, by libraries that need not be there: "
    "tests/plan/test_plan_command.py plans for a CPU",
    "experiments.run": "trains for minutes, and writes into this very repository: "
    "tests/experiments/test_studies.py tries every study",
    "experiments.scaling": "reads what experiments.run has trained",
    "moe_jax evaluate": "needs the extra [eval]: tests/harness types it where that is installed",
    "moe_jax data": "reads what publishers distribute: tests/data/test_data_publishers.py has "
    "small files of their formats",
}
# Mentioned by name, without what they need.
MENTIONED = {
    "python -m moe_jax",
    "python -m moe_jax NAME",
    "python -m moe_jax NAME ...",
    "python -m moe_jax bench",
    "python -m moe_jax plan",
    "python -m moe_jax prepare",
    "python -m moe_jax.main --config ... --workdir ...",
}
COMMANDS = [command for command in documented.found() if command.text not in MENTIONED]
# Words that stand for others. DATA, books/*.txt and other files are there by these names: see
# `world`.
PLACEHOLDERS = {
    "configs/x.py": "configs/quickstart.py",
    "RUN": "runs/books",
    "DIR": "runs/books",
    "TEXT": "Once",
    "[--config.KEY=VALUE": None,
    "[--dry_run]": None,
    "[DIR": None,
    "FILE": "runs/page.html",
    "...]": None,
}
# What makes a command short, by its program; `--smoke` for those that have it.
SHORT = {
    "moe_jax config": [],
    "moe_jax verify": ["--meshes", "1x1x2", "--steps", "1", "--processes", "1"],
    "moe_jax bench": [
        "--rounds",
        "1",
        "--config.model.d_model=64",
        "--config.model.vocab_size=256",
        "--config.data.seq_len=32",
    ],
    "moe_jax generate": ["--max_tokens", "4"],
    "moe_jax probe": ["--batches", "1", "--step", "3"],
    "moe_jax report": ["--batches", "1"],
    "moe_jax leak": [],
    "moe_jax convert": [],
    "moe_jax prepare": [],
    "moe_jax fsck": [],
}
DEVICES = 4  # of the rows of README that name a mesh and no devices


def resolved(command):
    """The flags of a command with what its placeholders stand for; of `probe`, as many steps of
    training as a test has time for.
    """
    placeholders = PLACEHOLDERS
    if command.module == "moe_jax fsck":
        # A run that is there already.
        placeholders = {**PLACEHOLDERS, "runs/x": "runs/books"}
    words = [placeholders.get(word, word) for word in command.flags]
    words = [word for word in words if word is not None]
    if command.module == "moe_jax probe" and "--steps" in words:
        words[words.index("--steps") + 1] = "1"
    if command.module == "moe_jax convert":
        # Both ways in the order of a page: what is exported is imported.
        made = {"--out": f"runs/{words[0]}", "--to": "models/books", "--from": "models/books"}
        for flag, name in made.items():
            if flag in words and words[words.index(flag) + 1] == "runs/books":
                words[words.index(flag) + 1] = name
    return words


def of(*modules):
    """The documented commands of some programs, and a name for each; the same words of several
    sources come once.
    """
    once = {}
    for command in COMMANDS:
        if command.module in modules:
            once.setdefault(tuple(resolved(command)), command)
    return [
        pytest.param(command, id=f"{command.source} {command.text}"[:100])
        for command in once.values()
    ]


OWN_FLAGS = (
    "workdir",
    "smoke",
    "dry_run",
    "coordinator",
    "num_processes",
    "process_id",
    "distributed",
    "preflight",
    "allow_change",
)


class Typist:
    """Types moe_jax.main in this process, with as many devices as a user has."""

    def __init__(self, monkeypatch):
        self._monkeypatch, self._devices = monkeypatch, jax.devices()
        self.cache = jax.config.jax_compilation_cache_dir

    def has(self, number):
        self._monkeypatch.setattr(jax, "devices", lambda *args: self._devices[:number])

    def program(self, words):
        """moe_jax.main as in a new process that was started with these words: absl's flags are
        those of a process.
        """
        for name in list(flags.FLAGS):
            if name.split(".")[0] in ("config", *OWN_FLAGS):
                delattr(flags.FLAGS, name)
        self._monkeypatch.setattr(sys, "argv", ["main", *words])
        return importlib.reload(main)

    def trains(self, *words):
        return self.program(words).main(["main", *words])


@pytest.fixture
def here(monkeypatch):
    """In the root of the repository, one device.

    What commands set for their process is put back at the end.
    """
    cache = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.chdir(ROOT)
    typist = Typist(monkeypatch)
    typist.has(1)
    yield typist
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_compilation_cache_dir", cache)


def train_flags(command):
    """(flags of moe_jax.main, devices) of a training command, or of one that is started by
    launch/local.sh.
    """
    words = resolved(command)
    if command.module == "launch/local.sh":
        processes, each, *words = words
        words.append(f"--config.simulate_devices={int(processes) * int(each)}")
    if not any(word.startswith("--workdir") for word in words):
        assert command.source == "README.md", f"{command.source}: {command.text} has no --workdir"
        words += ["--workdir", "runs/of_the_table"]
    simulated = [
        int(word.partition("=")[2])
        for word in words
        if word.startswith("--config.simulate_devices=")
    ]
    meshes = any(word.startswith("--config.mesh.") for word in words)
    return words, simulated[0] if simulated else 8 if {"configs/debug.py", "debug"} & {
        *words
    } else DEVICES if meshes else 1


# Every command is one that its program takes


def test_there_are_commands_in_every_kind_of_source():
    kinds = {command.source.split("/")[0] for command in COMMANDS}
    assert (
        kinds == {"README.md", "docs", "experiments", "configs", "moe_jax"} and len(COMMANDS) > 80
    )
    text = (
        "Type `python -m a b`:\n\n    X=1 python -m c 'd e' \\\n      f  # g\n\n"
        "| a | `--config.k=1 ...` |\n"
    )
    assert documented.read(text) == ["python -m a b", "python -m c 'd e'  f  # g"]
    assert documented.rows_of_flags(text) == [f"{documented.QUICKSTART} --config.k=1"]
    assert documented.Command("x", "python -m c 'd e' f  # g").flags == ["d e", "f"]


def test_bash_can_read_every_command():
    lines = "\n".join(command.text for command in COMMANDS)
    done = subprocess.run(["bash", "-n"], input=lines, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_every_program_is_one_that_is_there():
    for command in COMMANDS:
        module = command.module
        if module.startswith("moe_jax "):
            assert module.split()[1] in __main__.COMMANDS, command
        elif module.split()[0] not in ("moe_jax", *UNTYPED):
            there = ROOT / (module if "/" in module else module.replace(".", "/") + ".py")
            assert there.is_file(), command


@pytest.mark.parametrize("command", of("moe_jax.main", "launch/local.sh"))
def test_a_documented_run_is_one_that_the_rules_allow(command, here, tmp_path):
    """The flags are parsed and the config is built; what it begins from and reads need not be
    there.
    """
    words, devices = train_flags(command)
    program = here.program([*words, "--smoke"])
    raw = program.read_config(program.parse(sys.argv))
    cfg = config.build(raw, devices)
    assert cfg.smoke and cfg.train.steps <= smoke.STEPS


PARSED = tuple(f"moe_jax {name}" for name in __main__.COMMANDS)


@pytest.mark.parametrize("command", of(*PARSED))
def test_a_documented_command_has_flags_that_it_takes(command, here):
    module = importlib.import_module(f"moe_jax.commands.{command.module.split()[1]}")
    found = module.parse(resolved(command))
    if command.module in ("moe_jax leak", "moe_jax verify"):
        config.build(leak.shrink(command_line.read(found.config, found.changes)), 1)
    if command.module == "moe_jax bench":
        # Of one device: those of a config, and of each variant.
        importlib.import_module("moe_jax.commands.bench").read_variants(found)


def test_every_variant_is_one_that_the_rules_allow():
    """As it is written, and as --smoke, leak and verify make it small."""
    for name in variants():
        raw = config_file.read(Path(name))
        config.build(smoke.shorten(raw)[0], raw["simulate_devices"] or 1)
        config.build(leak.shrink(raw), 1)
        proven, _ = shrink.shrink(raw)
        assert all(
            shrink.accepted(one) for one in (proven, shrink.plain(proven), shrink.layout(proven)[0])
        ), name


# Of published sizes: no machine of a test has the memory for one.
PUBLISHED = ("configs/mixtral_8x7b.py", "configs/olmoe_1b7b.py", "configs/deepseek_v3_shape.py")


def variants():
    """configs/NAME.py of every config, or configs/NAME.py:VARIANT of every variant."""
    for path in sorted((ROOT / "configs").glob("[!_]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        yield from (f"configs/{path.name}:{name}" for name in getattr(module, "VARIANTS", ()))
        if not getattr(module, "VARIANTS", ()):
            yield f"configs/{path.name}"


# Commands that are typed


class World:
    """A directory as of a user who has the files that the commands name, and types them there."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("configs", "experiments", "launch", "tests"):
            (folder / name).symlink_to(ROOT / name)
        sample_data.write(folder / "DATA")
        (folder / "data").symlink_to("DATA")
        for name, domain in (("books", "verse"), ("notes", "novel")):
            (folder / name).mkdir()
            for i, text in enumerate(pieces(domain)):
                (folder / name / f"{i}.txt").write_text(text, encoding="utf-8")
        (folder / "corpus").mkdir()
        self._jsonl(pieces("novel"))

    def _jsonl(self, texts):
        lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
        (self.folder / "corpus" / "a.jsonl.zst").write_bytes(
            pa.compress(lines.encode(), codec="zstd", asbytes=True)
        )


def pieces(domain):
    """Fifty short texts of an embedded domain."""
    text = "".join(document.text for document in documents(domain, max_bytes=100_000))
    return [text[1000 * i : 1000 * (i + 1)] for i in range(50)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world")).folder


def typed(command, here, capsys, *more):
    """(exit code, output, errors) of a command in the current directory, made short."""
    if command.module in ("moe_jax.main", "launch/local.sh"):
        words, devices = train_flags(command)
        here.has(devices)
        code = here.trains(*words, "--smoke", *more)
    elif command.module in SHORT:
        here.has(8)
        code = __main__.main(
            [command.module.split()[1], *resolved(command), *SHORT[command.module], *more]
        )
    else:
        program = importlib.import_module(command.module.removesuffix(".py").replace("/", "."))
        code = program.main([*resolved(command), "--smoke", *more])
    # A command has its own process, and sets there where it keeps compiled programs.
    jax.config.update("jax_compilation_cache_dir", here.cache)
    compilation_cache.reset_cache()
    return code, *capsys.readouterr()


def on_page(source, *beginnings):
    """The commands of a source that begin so, in its order."""
    some = [
        command
        for command in COMMANDS
        if command.source == source and command.module not in UNTYPED
    ]
    return [c for c in some if c.text.startswith(beginnings)]


SMALLER = ("--config.model.repeats=1",)


@pytest.mark.full
def test_the_readmes_own_data_are_prepared_trained_on_and_continued(
    world, here, monkeypatch, capsys
):
    monkeypatch.chdir(world)
    (prepare,) = on_page("README.md", "python -m moe_jax prepare --source")
    (trained,) = (
        c for c in on_page("README.md", "python -m moe_jax.main") if "runs/books" in c.words
    )
    (generate,) = on_page("README.md", "python -m moe_jax generate")
    assert typed(prepare, here, capsys)[0] == 0
    code, said, _ = typed(trained, here, capsys, *SMALLER)
    assert code == 0 and "smoke run: all of it works" in said and "train.steps 380 -> 3" in said
    for name in ("summary.json", "metrics.jsonl", "predictions.jsonl", "routing.png"):
        assert (world / "runs/books" / name).stat().st_size > 0
    code, said, _ = typed(generate, here, capsys)
    assert code == 0 and said.startswith("Once")
    (head,) = (c for c in on_page("README.md", "python -m moe_jax.main") if "train_only" in c.text)
    sources = [
        word
        for word in trained.words
        if word.startswith(("--config.data.sources", "--config.model.vocab"))
    ]
    code, said, errors = typed(head, here, capsys, *SMALLER, *sources)
    assert code == 0 and "loaded   ends/head" in said, errors


def test_a_task_without_its_data_is_refused_in_one_line(world, here, monkeypatch, capsys):
    monkeypatch.chdir(world)
    for name, words in (
        ("recommendation.py:movielens", "movielens/1m-ratings"),
        ("speech.py", "data.folder = 'nowhere'"),
    ):
        typed_words = [
            "--config",
            f"configs/{name}",
            "--config.data.folder=nowhere",
            "--workdir",
            "runs/none",
            "--smoke",
        ]
        assert here.trains(*typed_words) == 64
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and words in said


# All of them, in the order of their page


def runs_of(source):
    return [command for command in on_page(source, "") if command.module == "moe_jax.main"]


NEEDED = ("runs/books", "runs/quickstart")  # by other pages than README


def make_needed(source, here, capsys):
    """The runs of README that a page begins from and does not train itself."""
    words = [word for command in on_page(source, "") for word in resolved(command)]
    trained = [word for command in runs_of(source) for word in command.words]
    for name in NEEDED:
        if name in trained or not any(word.endswith(name) for word in words):
            continue
        (command,) = (c for c in runs_of("README.md") if name in c.words)
        if name == "runs/books":
            (prepare,) = on_page("README.md", "python -m moe_jax prepare --source")
            assert typed(prepare, here, capsys)[0] == 0
        assert typed(command, here, capsys)[0] == 0


# What a command ends with where that is not 0.
CODES = {
    "tfds:": (64, "is not in"),  # nothing is downloaded
    "--config.model.period=depth:moe": (1, "leaks the future"),
}


@pytest.mark.full
@pytest.mark.parametrize("source", list(dict.fromkeys(command.source for command in COMMANDS)))
def test_every_command_of_a_page_is_typed(source, tmp_path_factory, here, monkeypatch, capsys):
    folder = World(tmp_path_factory.mktemp("page")).folder
    monkeypatch.chdir(folder)
    make_needed(source, here, capsys)
    for number, command in enumerate(on_page(source, "")):
        if command.module == "tests/maps.py":
            # trains for minutes; the maps are measured by tests/moe/routing/test_router_variants.py
            continue
        more = [f"--workdir=runs/of_the_table_{number}"] if "--workdir" not in command.text else []
        is_run = command.module in ("moe_jax.main", "launch/local.sh")
        code, said, errors = typed(command, here, capsys, *(more if is_run else []))
        wanted, words = expected(command)
        assert (code, words in errors) == (wanted, True), (
            f"{command.text}: {code}\n{said[-2000:]}\n{errors[-2000:]}"
        )


def expected(command):
    """(exit code, words of standard error) of a command."""
    words = resolved(command)
    if command.module == "moe_jax.main":
        raw = config_file.read(Path(words[words.index("--config") + 1]))
        if any(
            f"{name}:" in str(options)
            for name in ("tfds",)
            for options in raw["tasks"][raw["task"]].values()
        ):
            return CODES["tfds:"]
    return next(
        (found for text, found in CODES.items() if text in words or text in command.text), (0, "")
    )


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in variants() if name not in PUBLISHED])
def test_every_variant_runs(name, world, here, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(world)
    raw = config_file.read(Path(name))
    here.has(raw["simulate_devices"] or 1)
    words = [
        "--config",
        name,
        "--config.data.folder=DATA",
        "--workdir",
        str(tmp_path / "run"),
        "--smoke",
    ]
    absent = any("tfds:" in str(option) for option in raw["tasks"][raw["task"]].values())
    assert here.trains(*words) == (64 if absent else 0)
    assert ("is not in" in capsys.readouterr().err) == absent
