"""Every wrong key is one message that names the key, both values and the way out; nothing is
compiled before it.
"""

import ast
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
from absl import flags as absl_flags
from ml_collections import config_flags
from suites import normal

from moe_jax import __main__, config, main
from moe_jax.config import advice, command_line, config_file
from moe_jax.errors import UserError
from moe_jax.parallel import mesh

ROOT = Path(__file__).parents[2]


def refused(changes, shape=(1, 1, 1)):
    with pytest.raises(UserError) as error:
        tiny.build(shape, changes)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        (
            {"model.moe.num_experts": 6},
            (1, 4, 1),
            "model.moe.num_experts (6) must be divisible by mesh.expert (4)",
        ),
        (
            {"model.moe.expert_hidden": 18, "model.num_kv_heads": 4},
            (1, 1, 4),
            "model.moe.expert_hidden (18) must be divisible by mesh.model (4)",
        ),
        ({}, (1, 1, 4), "model.num_kv_heads (2) must be divisible by mesh.model (4)"),
        (
            {"model.d_model": 20, "model.num_heads": 2},
            (8, 1, 1),
            "model.d_model (20) must be divisible by mesh.data x mesh.expert (8)",
        ),
        (
            {"train.batch_size": 12},
            (4, 2, 1),
            "train.micro_batch_size (12 rows) must be divisible by mesh.data x mesh.expert (4 x 2)",
        ),
        (
            {"train.micro_batch_size": 5},
            (1, 1, 1),
            "train.batch_size (16) must be divisible by train.micro_batch_size (5)",
        ),
        (
            {"model.moe.group_rows": 4},
            (4, 2, 1),
            "model.moe.group_rows (4) must divide the rows of one device (2 =",
        ),
        (
            {"model.moe.routers.top_k.k": 9},
            (1, 1, 1),
            "model.moe.routers.top_k.k (9) must lie between 1 and model.moe.num_experts (8)",
        ),
        (
            {"model.moe.router": "top"},
            (1, 1, 1),
            'model.moe.router = "top" is not known: choose one of ',
        ),
        (
            {"model.moe.dispatcher": "none"},
            (1, 1, 1),
            'model.moe.dispatcher = "none" is not known: choose one of capacity, dropless',
        ),
        (
            {"model.activation": "tanh"},
            (1, 1, 1),
            'model.activation = "tanh" is not known: choose one of swiglu, gelu',
        ),
        (
            {"model.num_kv_heads": 3},
            (1, 1, 1),
            "model.num_heads (4) must be divisible by model.num_kv_heads (3)",
        ),
        (
            {"model.remat": "full", "model.remat_offload": True},
            (1, 1, 1),
            'model.remat = "full" names nothing: set model.remat=attention or dispatch or experts',
        ),
        ({"profile": "5"}, (1, 1, 1), 'profile = "5" is no range of steps: write FIRST:LAST'),
        ({"mesh.expert": -1, "mesh.data": -1}, (1, 1, 1), "mesh.data and mesh.expert are both -1"),
        ({"mesh.data": 3}, (1, 1, 1), "does not make 1 devices"),
        ({"model.repeats": 0}, (1, 1, 1), "make no block at all"),
        ({"optim.clip_norm": -1.0}, (1, 1, 1), "optim.clip_norm = -1.0 must be at least 0"),
        (
            {"optim.ema_decay": 1.5},
            (1, 1, 1),
            "optim.ema_decay = 1.5 must be at least 0 and below 1",
        ),
        (
            {"optim.optimizers.adamw.b1": 1.5},
            (1, 1, 1),
            "optim.optimizers.adamw.b1 = 1.5 must be at least 0 and below",
        ),
        ({"model.rope_theta": 0.0}, (1, 1, 1), "model.rope_theta = 0.0 must be above 0"),
        (
            {"optim.learning_rate": float("nan")},
            (1, 1, 1),
            "optim.learning_rate = nan must be finite and at",
        ),
        (
            {"train.micro_batch_size": -8},
            (1, 1, 1),
            "train.micro_batch_size = -8 must be at least 1",
        ),
        ({"eval.batches": -1}, (1, 1, 1), "eval.batches = -1 must be at least 0"),
        ({"seed": -1}, (1, 1, 1), "seed = -1 must be at least 0"),
        (
            {"data.sources": (("embedded", -1.0),)},
            (1, 1, 1),
            "the weight of 'embedded' (-1.0) must be a number above",
        ),
        (
            {"data.sources": ("embedded", 1.0)},
            (1, 1, 1),
            "has 'embedded' in it: write pairs of a source and its weight",
        ),
        (
            {"profile": "100:103"},
            (1, 1, 1),
            "profile = 100:103 begins after the last step (train.steps = 100)",
        ),
        (
            {"record.steps": "200,every 300"},
            (1, 1, 1),
            'record.steps = "200,every 300" begins after the last step',
        ),
        (
            {"model.moe.losses.balance": float("nan")},
            (1, 1, 1),
            "losses.balance = nan must be finite and at least 0",
        ),
        (
            {"train.init_rename": (("a", "b"),)},
            (1, 1, 1),
            "train.init_rename renames what train.init_from loads",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(changes, shape, message):
    assert message in refused(changes, shape)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"router": "relu"},
            "is balanced by its own L1 loss, and model.moe.losses.balance = 0.01 and "
            "model.moe.losses.z",
        ),
        ({"router": "relu", "losses.balance": 0.0, "losses.z": 0.0}, None),
        (
            {"router": "sigmoid"},
            "is balanced by its bias, and model.moe.losses.balance = 0.01 on top of it",
        ),
        (
            {"router": "sigmoid", "losses.balance": 0.0, "losses.sequence_balance": 1e-4},
            None,
        ),  # DeepSeek-V3
        ({"router": "sigmoid", "routers.sigmoid.bias_rate": 0.0}, None),  # DeepSeek-V2
        (
            {"router": "hash"},
            "has no weights: model.moe.losses.balance = 0.01 and model.moe.losses.z",
        ),
        ({"routers.top_k.k": 1}, "its gate is always 1"),
        ({"routers.top_k.k": 1, "routers.top_k.renormalize": False}, None),
        ({"router": "switch"}, None),
        ({"ordering": "k_major", "dispatcher": "dropless"}, '"dropless" drops nothing'),
        ({"group_rows": 2, "dispatcher": "dropless"}, "group_rows = 2 rows share capacity"),
        ({"ordering": "token_major"}, None),
        ({"overlap_chunks": 2}, "model.moe.overlap_chunks = 2 makes 1 of"),
        ({"dispatchers.dropless.slices": 2, "dispatcher": "dropless"}, "slices = 2 does nothing"),
    ],
    ids=str,
)
def test_a_run_is_told_what_is_hardly_ever_meant(changes, said):
    found = list(
        advice.notes(
            tiny.build((1, 1, 1), {f"model.moe.{key}": value for key, value in changes.items()})
        )
    )
    assert (not found) if said is None else (len(found) == 1 and said in found[0]), found


def test_an_option_of_what_is_not_chosen_is_refused():
    changed, default = tiny.raw({"model.moe.dispatchers.capacity.factor": 2.0}), tiny.raw()
    with pytest.raises(
        UserError,
        match=r"model.moe.dispatchers.capacity.factor = 2.0 does nothing, because "
        r"model.moe.dispatcher is",
    ):
        config.refuse_unchosen(changed, default)
    config.refuse_unchosen(
        tiny.raw(
            {"model.moe.dispatcher": "capacity", "model.moe.dispatchers.capacity.factor": 2.0}
        ),
        default,
    )


def test_wrong_types_and_missing_keys():
    raw = tiny.raw({"mesh.data": 1})
    raw["train"]["steps"] = "many"
    with pytest.raises(UserError, match=r"train.steps = 'many' is a str; it must be a int"):
        config.build(raw, 1)
    raw = tiny.raw({"mesh.data": 1})
    raw["model"]["widht"] = 3
    with pytest.raises(UserError, match=r"unknown key model.widht"):
        config.build(raw, 1)
    del raw["model"]["widht"], raw["model"]["d_model"]
    with pytest.raises((UserError, KeyError), match="d_model"):
        config.build(raw, 1)


def test_minus_one_takes_the_rest():
    assert mesh.resolve(mesh.Lengths(data=-1, expert=2, model=2), 8) == (1, 2, 2, 1, 2)


WRONG_FLAGS = [
    (
        ["--config.train.stepz=5"],
        'no key is called --config.train.stepz: did you mean "steps"?',
    ),
    (
        ["--config.train.steps=five"],
        "--config.train.steps=five: invalid literal for int() with base 10: 'five'",
    ),
    (["train.steps=5"], "--config.train.steps=5"),
    (["--stepz=5"], "Unknown command line flag 'stepz'"),
    (["--config=configs/nope.py"], "error: the config file configs/nope.py does not exist\n"),
    (
        ["--config=configs"],
        "error: the config file configs is a directory: name a file in it\n",
    ),
    (["--config=README.md"], "error: the config file README.md, line "),
    (["--config=tests/oracle.py"], "the config file has no attribute 'get_config'"),
    (
        ["--config"],
        "error: --config has no value: name a config file, such as --config "
        "configs/quickstart.py\n",
    ),
    (["--config="], "error: --config has no value"),
    (
        ["--config=configs/debug.py", "--dry_run"],
        "error: --config is given 2 times (configs/quickstart.py, configs/debug.py)",
    ),
    (["--config.mesh.expert=3"], "does not make 1 devices"),
]


@pytest.mark.parametrize(
    ("flags", "message"),
    # Each is a process of its own: every third one is in the normal suite.
    normal(WRONG_FLAGS[::3], WRONG_FLAGS),
)
def test_a_wrong_flag_is_one_line_and_a_code(tmp_path, flags, message):
    command = [sys.executable, "-m", "moe_jax.main", "--workdir", str(tmp_path / "run")]
    if not flags[-1].startswith("--config=") and flags != ["--config"]:
        command.append("--config=configs/quickstart.py")
    done = subprocess.run(command + flags, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 64 and message in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_flags_and_help():
    for flags, code, words in (
        ([], 64, "error: --config is missing: name a config file"),
        (["--help"], 0, "--workdir"),
    ):
        line = [sys.executable, "-m", "moe_jax.main", *flags]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and words in done.stderr + done.stdout
        assert len(done.stderr.strip().splitlines()) == (1 if code else 0)


# The rooms of moe_jax in the order of their dependencies: each may import those before it, and no
# other.
ROOMS = (
    "exit_codes",
    "errors",
    "extras",
    "names",
    "precision",
    "version",
    "runtime",
    "terminal",
    "parallel",
    "weights",
    "schema",
    "layout",
    "checkpoint",
    "data",
    "moe",
    "optim",
    "models",
    "decoding",
    "tasks",
    "accumulation",
    "pipeline",
    "config",
    "library",
    "train_step",
    "evaluate",
    "plan",
    "report",
    "meaning",
    "begin",
    "run",
    "interchange",
    "surgery",
    "harness",
    "instruments",
    "verify",
    "publish",
    "preflight",
    "loop",
    "train",
    "bench",
    "study",
    "commands",
    "main",
    "__main__",
)
APART = {"data", "models"}  # tasks bring them together


def modules():
    """(room, dotted name without "moe_jax.", path) of every module but the package itself."""
    for path in sorted((ROOT / "moe_jax").rglob("*.py")):
        parts = path.relative_to(ROOT / "moe_jax").with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], ".".join(parts).removesuffix(".__init__"), path


def imported(path):
    """Dotted names, without "moe_jax.", that a module imports wherever in it; those of configs and
    experiments as they are.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("moe_jax.") for alias in node.names if "." in alias.name
            )
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        package, _, module = node.module.partition(".")
        if package in ("configs", "experiments"):
            yield package
        if package == "moe_jax":
            yield from (f"{module}.{alias.name}".removeprefix(".") for alias in node.names)


def test_dependencies_run_one_way():
    level = {room: i for i, room in enumerate(ROOMS)}
    for room, name, path in modules():
        assert room in level, f"{path}: a new room needs its line in ROOMS"
        for other in imported(path):
            assert other not in ("configs", "experiments"), f"{path} imports {other}"
            target = other.partition(".")[0]
            if target in level and target != room:
                assert level[target] < level[room], f"{name} imports {other}, which is above it"
                assert {target, room} != APART, (
                    f"{name} imports {other}: the task brings data and model together"
                )


def test_manual_parallelism_has_few_doors():
    doors = {"moe/layer.py", "models/attention.py", "parallel/context.py", "preflight.py"} | {
        f"tasks/{name}.py" for name in ("cross_entropy", "chunked_loss")
    }
    # Manual over `stage` alone.
    doors |= {"pipeline/totals.py", "parallel/stages.py"}
    exchange = re.compile(r"lax\.(all_to_all|all_gather|psum_scatter|ragged_all_to_all)\(")
    for _, _, path in modules():
        text, where = path.read_text(), str(path.relative_to(ROOT / "moe_jax"))
        if "jax.shard_map(" in text:
            assert where in doors, f"{where} opens a shard_map"
        if exchange.search(text):
            # The preflight moves numbers that are thrown away, a pipeline what its blocks read
            # beside activations.
            others = ("moe/layer.py", "preflight.py", "pipeline/totals.py")
            moves = where in others or where.startswith("moe/dispatch/")
            assert moves, f"{where} moves tokens"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vision.py:mnist",
            "configs/vision.py has no variant 'mnist': it has digits, fashion_mnist",
        ),
        ("vision.py:", "configs/vision.py has no variant '': it has digits, fashion_mnist"),
        ("translation.py:prefex", "did you mean configs/translation.py:prefix?"),
        ("quickstart.py:foo", "configs/quickstart.py:foo: the config file has no variants"),
        ("base.py:foo", "configs/base.py:foo: the config file has no variants"),
    ],
)
def test_an_unknown_variant_is_one_line_everywhere(monkeypatch, tmp_path, capsys, name, message):
    monkeypatch.chdir(ROOT)
    flags = ["--config", f"configs/{name}"]
    training = [*flags, "--workdir", str(tmp_path / "run")]
    bench = ["--variant", "a:"]
    for run in (
        lambda: main.main(["main", *training]),
        *(lambda of=of: __main__.main([of, *flags]) for of in ("leak", "verify")),
        lambda: __main__.main(["bench", *flags, *bench]),
    ):
        assert run() == 64
        said = capsys.readouterr().err
        assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [".", "tests"])
def test_a_shipped_config_has_a_name(monkeypatch, folder):
    monkeypatch.chdir(ROOT / folder)
    for name, file in (("quickstart", "quickstart.py"), ("vision:digits", "vision.py:digits")):
        by_name = config_file.read(Path(name))
        assert by_name == config_file.read(ROOT / "configs" / file)
    assert "quickstart" in config_file.shipped() and "__init__" not in config_file.shipped()
    for name, message in (
        (
            "quickstrat",
            "no shipped config is called 'quickstrat', and no file; did you mean quicks",
        ),
        ("vison:digits", "did you mean vision:digits?"),
        ("xyzzy", "choose one of article, base, "),
        ("vision:digit", "has no variant 'digit': it has digits, fashion_mnist"),
    ):
        with pytest.raises(UserError) as error:
            config_file.load(Path(name))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_file_is_executed_without_a_change_of_the_path(tmp_path, monkeypatch):
    """It imports moe_jax everywhere, and `configs` in a directory that has it."""
    (tmp_path / "mine.py").write_text(
        "import sys\nPATH = list(sys.path)\nfrom configs import base\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".") != ROOT])
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    monkeypatch.delitem(sys.modules, "configs.base", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        config_file.load(Path("mine.py"))
    assert "take `from moe_jax.config import defaults`" in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--config.train.steps=7"],
        ["--config.train.steps", "7"],
        ["--config.optim.learning_rate=1"],
        ["--config.model.scan", "--noconfig.log.tensorboard"],
        ["--config.model.period=dense", "--config.model.period=moe"],
        ['--config.data.sources=(("embedded:verse", 2.0),)'],
        ["--config.eval.sample_prompt=it's = 3"],
        ["--config.mesh.expert", "-1"],
    ],
)
def test_keys_are_changed_alike_in_every_command(words):
    """As ml_collections changes them, whose flags stand in other programs."""
    own = absl_flags.FlagValues()
    argv = ["x", "--config", str(ROOT / "configs/base.py"), *words]
    with warnings.catch_warnings():  # its loader is old
        warnings.simplefilter("ignore", DeprecationWarning)
        config_flags.DEFINE_config_file("config", None, flag_values=own, sys_argv=argv)
        own(argv)
        theirs = own.config.to_dict()
    changes, others = command_line.split([*words, "--rounds", "3"])
    assert others == ["--rounds", "3"]
    ours = config_file.load(Path("base"))
    command_line.changed(ours, changes)
    assert ours.to_dict() == theirs != config.defaults().to_dict()
    name, again = command_line.named("a: " + shlex.join(words), "--variant")
    assert (name, again) == ("a", words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def get_config(arg=None):\n    return base.get_config(arg)\n",
            "mine.py has no variant 'foo'",
        ),
        (
            "def get_config(arg=None):\n    return 1 / 0\n",
            "mine.py, line 3: ZeroDivisionError: division by zero",
        ),
        ("SETS = {}['foo']\n", "mine.py, line 2: KeyError: 'foo'"),
        (
            "def get_config(arg=None):\n    pass\n",
            "mine.py: get_config() returns a NoneType, not the ConfigDict",
        ),
    ],
)
def test_whatever_goes_wrong_in_a_config_file_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text("from configs import base\n" + text)
    with pytest.raises(UserError) as error:
        config_file.load(Path(f"{tmp_path}/mine.py" + (":foo" if "arg" in text else "")))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_a_list_of_variants_makes_of_its_argument_what_it_likes(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import base\n\n\ndef get_config(arg='1'):\n    c = base.get_config()\n"
        "    c.train.steps = int(arg)\n    return c\n"
    )
    assert config_file.load(Path(f"{path}:7")).train.steps == 7


def test_a_misspelt_key_in_a_file_is_one_line(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n    "
        "c.train.stpes = 3\n    return c\n"
    )
    with pytest.raises(UserError) as error:
        config_file.load(path)
    assert (
        str(error.value)
        == f'the config file {path}: no key is called "stpes": did you mean "steps"?'
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--config", "x"],
            "a model is trained by `python -m moe_jax.main --config configs/quickstart.py",
        ),
        (["main"], "a model is trained by `python -m moe_jax.main"),
        (["trian"], "a model is trained by `python -m moe_jax.main"),
        (
            ["eval"],
            "a run evaluates itself: `python -m moe_jax.main` with the flags of a finished run",
        ),
        (["sample"], "a trained model writes text by `python -m moe_jax generate"),
        (["verfy"], "did you mean `python -m moe_jax verify`?"),
        (["--config", "x"], "--config comes before a command ("),
        (["xyzzy"], "choose one of "),
    ],
)
def test_a_command_that_there_is_not_names_what_to_type(capsys, words, message):
    assert __main__.main(words) == 64
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
