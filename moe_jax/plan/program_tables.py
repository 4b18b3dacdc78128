"""Shows what a compiled step does as tables: FLOPs done and useful, collectives, and time."""

from rich.filesize import decimal

from moe_jax.parallel import chip_flags
from moe_jax.plan.card import Card
from moe_jax.plan.dispatch import three_digits
from moe_jax.plan.hlo.collectives import Collective
from moe_jax.plan.theory import Expected
from moe_jax.terminal.table import Table, names, numbers, prose
from moe_jax.terminal.units import readable

# Of many small collectives only the largest are shown one by one; --out has all.
MOST_COLLECTIVES = 12
# The products that take the most, and what moves the most, by where they come from.
MOST_SCOPES = 8
UNCOUNTED = (
    "An estimate: the program does not say how many rows its kernels and loops work on. Experts "
    "count as a balanced load with the padding of tiles; unknown kernels as the whole buffer."
)
NOT_FOUND = "Not found: the program sends it in another way or with other things."
TIME_NOTE = (
    "Time: published figures of the chip, nothing was run. Compute, memory and network are lower "
    "bounds; expected is the longer of compute and memory, and the network that is waited for."
)


def work_table(card: Card) -> Table:
    """Returns FLOPs of the compiled program beside the useful ones."""
    table = Table(
        [
            *names("a step, one device"),
            *numbers("FLOPs useful", "done", "done / useful", "share"),
            *prose(""),
        ]
    )
    total_done = sum(one.done for one in card.work)
    total_useful = sum(one.useful for one in card.work)
    for one in card.work:
        if one.done or one.useful:
            table.add(
                one.part,
                three_digits(one.useful) if one.useful else "",
                three_digits(one.done),
                f"{one.done / one.useful:.2f}" if one.useful else "",
                f"{one.done / total_done:.1%}" if total_done else "",
                "estimate" if one.is_estimate else "",
            )
    table.section()
    ratio = f"{total_done / total_useful:.2f}" if total_useful else ""
    table.add("all products", three_digits(total_useful), three_digits(total_done), ratio, "100%")
    most = card.compiled.program.most_flops
    if most > sum(card.compiled.program.products.flops.values()):
        table.add("worst load", "", three_digits(most), "", "", "every round of the dispatcher")
    return table


def scopes_table(card: Card) -> Table:
    """Returns the products that do the most, by where they come from."""
    scopes = card.compiled.program.products.scopes
    table = Table([*names("products, by where they come from"), *numbers("FLOPs done", "share")])
    for scope, count in scopes.most_common(MOST_SCOPES):
        table.add(scope, three_digits(count), f"{count / scopes.total():.1%}")
    return table


def traffic_table(card: Card) -> Table:
    """Returns what reads and writes the most memory, by where it comes from."""
    scopes = card.compiled.program.memory_traffic
    table = Table([*names("memory traffic, by where it comes from"), *numbers("bytes", "share")])
    for scope, count in scopes.most_common(MOST_SCOPES):
        table.add(scope or "not told", decimal(count), f"{count / scopes.total():.1%}")
    table.section()
    table.add("all", decimal(scopes.total()), "100%")
    if card.expected_traffic:
        table.add("what plan --search expects", decimal(card.expected_traffic))
    return table


def collectives_table(card: Card) -> Table:
    """Returns the collectives of the compiled program, and what theory says beside each cargo."""
    found = card.compiled.program.collectives
    # A column of its own only where something crosses.
    crosses = any(one.far for one in found)
    far = ["between slices or hosts"] if crosses else []
    table = Table(
        [
            *names("collectives of a step", "over", "what"),
            *numbers("number", "bytes", *far, "theory"),
            *names("waits"),
        ],
        keys=3,
    )

    def bytes_of(*group: Collective) -> list[str]:
        """Returns the cells of bytes, and of those that cross where there is a column of them."""
        sums = [sum(one.num_bytes for one in group)]
        sums += [sum(one.far or 0 for one in group)] if crosses else []
        return [decimal(total) for total in sums]

    for cargo, axes in dict.fromkeys((one.cargo, one.axes) for one in found):
        group = [one for one in found if (one.cargo, one.axes) == (cargo, axes)]
        theory = _theory(card, cargo, axes)
        # The cargo and what theory says stand once, in the first line of a group.
        named = (cargo, axes or "other groups")
        wanted = decimal(theory.num_bytes) if theory else ""
        for one in _largest(group):
            waits = "no" if one.is_async else "yes"
            table.add(*named, one.kind, f"{one.count:,}", *bytes_of(one), wanted, waits)
            named, wanted = ("", ""), ""
    for missing in not_found(card):
        empty = [""] * (2 + len(far))
        table.add(missing.cargo, missing.axes, "not found", *empty, decimal(missing.num_bytes))
    if not table.rows:
        table.add("nothing travels")
    table.section()
    table.add("all", "", "", "", *bytes_of(*found))
    return table


def not_found(card: Card) -> list[Expected]:
    """Returns what theory asks for and the program does not name: it is done in another way."""
    named = {(one.cargo, one.axes) for one in card.compiled.program.collectives}
    return [one for one in card.expected if (one.cargo, one.axes) not in named]


def _largest(group: list[Collective]) -> list[Collective]:
    """Returns the first ones of a group, which comes with the largest first."""
    return group[:MOST_COLLECTIVES]


def _theory(card: Card, cargo: str, axes: str) -> Expected | None:
    """Returns what theory says of a cargo over some axes; None where it says nothing."""
    for one in card.expected:
        if (one.cargo, one.axes) == (cargo, axes):
            return one
    return None


def time_table(card: Card) -> Table:
    """Returns the expected time of a step, what bounds it, and the speed."""
    time, chip = card.estimate, card.chip
    assert time is not None and chip is not None
    table = Table([*names(f"time of a step on {chip.name}"), *numbers("ms"), *prose("")])
    peak = readable(sum(one.done for one in card.work) / time.compute) if time.compute else "?"
    table.add("compute", _ms(time.compute), f"FLOPs done at {peak}FLOP/s")
    traffic = decimal(card.compiled.program.memory_traffic.total())
    table.add("memory", _ms(time.memory), f"{traffic} at {decimal(int(chip.memory_bandwidth))}/s")
    for axes, seconds in sorted(time.network.items(), key=lambda pair: -pair[1]):
        table.add(f"network over {axes}", _ms(seconds))
    table.add("of the network waited for", _ms(time.waited), "what is not asynchronous")
    table.section()
    table.add("expected", _ms(time.step), f"bound by {time.bound}")
    speed = f"{readable(time.tokens_per_second)} tokens/s, MFU {time.mfu:.1%}"
    table.add("speed", "", f"{speed}, if nothing else takes time")
    return table


def _ms(seconds: float) -> str:
    """Returns seconds as milliseconds, for a table."""
    return f"{1000 * seconds:,.2f}"


def flags_line(card: Card) -> str:
    """Returns the flags of the compiler in one line; "" where there are none."""
    text = chip_flags.text(card.flags)
    return f"Flags of XLA (chip_flags): {text}" if text else ""
