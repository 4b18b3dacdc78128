"""Every table that a command prints, at 80 and 120 columns: no number is cut or folded, and nothing
is wider than the terminal.
"""

import dataclasses
import io
import os
import pty
import re
from collections import Counter

import numpy as np
import pytest
import tiny
from rich.cells import cell_len
from rich.console import Console, Group

from experiments import writing
from moe_jax.bench import results
from moe_jax.bench.contract import Timing
from moe_jax.commands import leak, prepare, verify
from moe_jax.instruments import interference, knockout, tables
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.parallel.mesh import Lengths
from moe_jax.pipeline.schedule import Schedule
from moe_jax.plan import card, card_tables, chips, flops
from moe_jax.plan.estimate import Estimate
from moe_jax.plan.hlo.collectives import Collective
from moe_jax.plan.hlo.products import Products
from moe_jax.plan.hlo.program import Program
from moe_jax.plan.theory import Expected
from moe_jax.plan.work import Work
from moe_jax.runtime import shell
from moe_jax.terminal.table import Table, names, numbers, prose
from moe_jax.verify.alone import Check
from moe_jax.verify.compare import Deviation, Rounded
from moe_jax.verify.run import Result, empty
from moe_jax.verify.shrink import Rule

DOMAINS = [
    "drama",
    "scripture_en",
    "[red]no markup[/]",
    "common_crawl_2019_to_2024_deduplicated_and_filtered_english",
]
DOMAINS += [f"domain_{i}" for i in range(16)]
LAYERS, EXPERTS = 32, 3


def of_replay():
    figures = {"bits_per_byte": 12.3456, "gap/bits_per_byte": -10.1234}
    for domain in DOMAINS:
        figures |= {
            f"domain/{domain}/bits_per_byte": 12.5,
            f"gap/domain/{domain}/bits_per_byte": 10.5,
        }
    result = {
        "own": figures,
        "balanced": {"note": "this router has no linear gate"},
        "frozen 1000000": figures,
    }
    return tables.replay(
        result, "held-out bits per byte after 3000 steps under another routing, from step 1000000"
    )


def of_precision():
    layers = [0.12345] * LAYERS
    flips = {"router": layers, "model": layers}
    return tables.precision(
        {"flips": flips, "margins": {"0.01": layers, "0.5": layers}, "notes": {"size": "odd"}}
    )


def worth():
    change_LEZ = np.random.default_rng(0).normal(size=(LAYERS, EXPERTS, len(DOMAINS)))
    change_LEZ[:, :, 1] = np.nan
    mean_LE, load_LE = np.nanmean(change_LEZ, -1), np.full((LAYERS, EXPERTS), 1 / EXPERTS)
    low, high = change_LEZ - 0.5, change_LEZ + 0.5
    means = mean_LE, mean_LE - 0.1, mean_LE + 0.1
    return knockout.Worth(
        np.ones(len(DOMAINS)), change_LEZ, low, high, *means, np.ones_like(change_LEZ), load_LE
    )


def of_knockout():
    return tables.knockout(worth(), DOMAINS, "around")


def of_interference():
    places = [f"layer_{i}/{part}" for i in (0, 31) for part in interference.PARTS] + ["outside"]
    losses = ("auxiliary", "balance", "balance_sequence", "importance", "z", "l1")
    result = {
        f"interference/{p}/{loss}_{k}": -1.2345e-10
        for p in places
        for loss in losses
        for k in ("cosine", "ratio")
    }
    return tables.interference(result)


def of_leak():
    cells, rows = ["1.2e-16, 100%"] * 4, []
    for router, ordering, dispatcher in zip(
        max_of(ROUTERS), max_of(ORDERINGS), max_of(DISPATCHERS)
    ):
        moe = dataclasses.replace(
            tiny.build().model.moe, router=router, ordering=ordering, dispatcher=dispatcher
        )
        cfg = tiny.build()
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
        rows.append((cfg, cells, "leaks the future and the batch (not seen here: future, batch)"))
    return [leak.table(rows)]


def max_of(registered):
    return [max(registered, key=len)]


def of_verify():
    deviations = {
        check: Deviation(check, 1.2e-13, "params/repeats/blocks", 0) for check in verify.COLUMNS
    }
    good = empty("1x1x1 accumulate+scan+remat")._replace(
        deviations=deviations, rounded=Rounded(1e-7, 12, 20), reader="1x1x1"
    )
    rows = [
        good,
        good._replace(name="2x2x2, 2 processes", unequal=["a"] * 100),
        empty("3x1x1", refused="because"),
    ]
    rule = Rule(
        "model.moe.dispatchers.capacity.factor",
        (1, 2),
        12.5,
        "the smallest that keeps every rule that there is",
    )
    check = Check(
        "padding at the end of a row changes nothing before it",
        1e-13,
        1e-9,
        "4 of 120 assignments dropped",
        True,
    )
    found = Result([rule], [check], rows, 5, [])
    return [
        verify.rules_table(found.rules),
        verify.meshes_table(found),
        verify.alone_table(found.alone),
    ]


def of_bench():
    facts = {
        "tokens": 2048,
        "flops": 1e10,
        "logged": 0.0123,
        "active": 6.3e6,
        "total": 1e8,
        "loss": 8.3,
        "dtype": "float32",
    }
    names = {"64 experts, dropless, with a name that goes on": 123.456, "dense": 0.001}
    timed = {name: Timing(facts, (seconds,), 10**9) for name, seconds in names.items()}
    rows = [results.Row(name, timing, timing) for name, timing in timed.items()]
    return [results.training(rows, {"float32": timed["dense"]}), results.decoding(rows, "title")]


def of_prepare():
    counts = {
        "train": dict.fromkeys(DOMAINS, 123_456_789_012),
        "heldout": dict.fromkeys(DOMAINS, 1_234_567_890),
    }
    return [prepare.table({"domains": DOMAINS, "documents": counts, "text_bytes": counts})]


MANY = 123_456_789_012_345


def filled(kind):
    return kind(*(MANY for _ in kind._fields))


def of_program():
    exchange = Collective("ragged-all-to-all", "expert", 64, "tokens", True, MANY, MANY, MANY)
    sums = Collective("all-reduce", "data x expert x model", 64, "gradients and sums", False, 1, 1)
    flops_of = Products(Counter(other=MANY), Counter({"backward a/b": MANY}), Counter(kernel=1))
    traffic = Counter(
        {"backward transpose(jvp(jit(forward)))/attention/convert_element_type": MANY}
    )
    return Program(flops_of, 2 * MANY, (exchange, sums), traffic, ("experts/while",))


def of_card():
    """Of a model of trillions of parameters."""
    sizes = {
        "platform": "cpu",
        "mesh": Lengths(stage=16, data=8, expert=64, model=8),
        "num_layers": (1, 100),
        "pipeline": Schedule(16, 4096, 4),
        "pipeline_schedule": "1f1b",
    }
    sizes |= {
        "batch_size": 4096,
        "seq_len": 8192,
        "num_micro_batches": 16,
        "dispatcher": "capacity",
    }
    work = {"train_per_token": MANY, "train_per_step": MANY, "forward": filled(flops.Breakdown)}
    made = {
        "parameters": filled(flops.Counts),
        "memory": filled(card.Memory),
        "compiled": filled(card.Compiled)._replace(program=of_program()),
        "chip": chips.CHIPS["v5p"],
        "flags": {"xla_tpu_a_flag_of_a_long_name": True},
        "work": (Work("routed experts", MANY, MANY, is_estimate=True), Work("other", 0, MANY)),
        "expected": (Expected("tokens", "expert", MANY),),
        "expected_traffic": MANY,
        "estimate": Estimate(1e4, 1e4, {"data x expert": 1e4}, 1e4, MANY, 1e3),
    }
    traffic = {"data": MANY, "expert": MANY, "model": MANY}
    dispatch = filled(card.Dispatch)._replace(forward=traffic, backward=traffic)
    found = card.Card(**sizes, **work, **made, dispatch=dispatch)
    return [card_tables.render(found)]


def of_experiments():
    row = {f"figure number {i} (95 %)": "-0.0465 ± 0.0583" for i in range(11)}
    return [writing.table({"threshold_flops_1_16": row, "moe": row}, "cell")]


PRINTED = {
    function.__name__: function
    for function in (
        of_replay,
        of_precision,
        of_knockout,
        of_interference,
        of_leak,
        of_verify,
        of_bench,
        of_prepare,
        of_card,
        of_experiments,
    )
}


def drawn(part, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(part)
    return console.file.getvalue()


def inner(part):
    """The tables of a group."""
    if isinstance(part, Group):
        return [
            table for one in part.renderables for table in inner(getattr(one, "renderable", one))
        ]
    return [part] if isinstance(part, Table) else []


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", PRINTED)
def test_no_number_of_any_command_is_cut_or_folded(name, width):
    found = [table for part in PRINTED[name]() for table in inner(part)]
    assert found
    for table in found:
        text = drawn(table, width)
        assert max(map(cell_len, text.splitlines())) <= width
        assert "…" not in text and "..." not in text
        whole = set(re.split(r"\s{2,}|\n", text))
        for i, column in enumerate(table.columns):
            cells = [str(row.cells[i]) for row in table.rows if str(row.cells[i])]
            if column.kind == "number":
                assert all(line in whole for cell in cells for line in cell.split("\n")), (
                    column.name,
                    cells[:3],
                )

            def letters(text):
                return re.sub(r"\s", "", text)

            assert (
                i < table.keys
                or set(column.name.split()) <= set(text.split())
                or letters(column.name) in letters(text)
            )


def test_a_wide_table_is_several_that_all_name_their_rows():
    table = Table([*names("routing"), *numbers(*(f"gap, d{i}" for i in range(9)))])
    table.add("own", *(f"{i}.0001" for i in range(9)))
    lines = drawn(table, 40).splitlines()
    assert [line.split()[0] for line in lines if "0001" in line] == ["own"] * 3
    assert re.findall(r"\d\.0001", " ".join(lines)) == [f"{i}.0001" for i in range(9)]
    assert len([line for line in drawn(table, 120).splitlines() if "0001" in line]) == 1


def test_prose_breaks_between_words_and_markup_is_none():
    table = Table([*names("key"), *numbers("value"), *prose("why")])
    table.add(
        "model.moe.num_experts",
        "16",
        "the first multiple of eight from twice the choices of a token on, [red]no more[/]",
    )
    text = drawn(table, 60)
    assert "[red]no" in text and set(
        "the first multiple of eight from twice the choices".split()
    ) <= set(text.split())
    assert table.markdown().splitlines()[1] == "|---|---:|---|"


def read_from_terminal(write, columns):
    """What a terminal of so many columns gets from a function that writes to a file."""
    leader, follower = pty.openpty()
    with open(follower, "w") as terminal:
        write(terminal)
    found = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        found += part
        if not part:
            break
    os.close(leader)
    return found.decode().replace("\r\n", "\n")


def test_sentences_break_between_words_on_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "error: data.seq_len = 3 is too short for "
    text += "/a/path/that/is/longer/than/a/line/and/stays/whole.npz"
    text += "\n  a command to copy, longer than forty columns"
    shown = read_from_terminal(lambda terminal: shell.tell(text, terminal), 40)
    assert (
        shown.split() == text.split()
        and "\n  a command to copy, longer than forty columns\n" in shown
    )
    assert shown.splitlines()[0] == "error: data.seq_len = 3 is too short for"
    plain = io.StringIO()
    shell.tell(text, plain)
    assert plain.getvalue() == text + "\n"


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert shell.console().width == 80
    monkeypatch.delenv("COLUMNS")
    assert shell.console().width == 160
