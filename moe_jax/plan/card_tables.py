"""Shows a resource card as tables within 80 columns, the same in a file as on a terminal."""

from rich.console import Group
from rich.filesize import decimal
from rich.padding import Padding

from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.plan import program_tables
from moe_jax.plan.card import Card
from moe_jax.plan.dispatch import Dispatch, three_digits
from moe_jax.terminal.table import Table, names, numbers, prose

FLOPS_NOTE = "FLOPs: of the matrix products, 2 for a multiply-add."
LAYER_NOTE = "An MoE layer: for one micro-batch, without what the backward pass repeats."
# What travels over each mesh axis; over any other, and over several together, it is gradients.
TRAFFIC = {
    "expert": "tokens, and back",
    "data": "expert weights",
    "model": "sums over hidden columns",
}


def render(card: Card) -> Group:
    """Returns the card as rich tables."""
    # Tables one below the other, and then the notes that belong to those that are there.
    tables, notes = [_model_table(card), _memory_table(card)], [FLOPS_NOTE]
    if card.dispatch:
        tables += [_dispatch_table(card, card.dispatch), _traffic_table(card.dispatch)]
        notes += [LAYER_NOTE]
    tables += [program_tables.work_table(card), program_tables.scopes_table(card)]
    tables += [program_tables.traffic_table(card)]
    tables += [program_tables.collectives_table(card)]
    if any(one.is_estimate for one in card.work):
        notes += [program_tables.UNCOUNTED]
    if program_tables.not_found(card):
        notes += [program_tables.NOT_FOUND]
    if card.estimate:
        tables += [program_tables.time_table(card)]
        notes += [program_tables.TIME_NOTE]
    if flags := program_tables.flags_line(card):
        notes += [flags]
    spaced = [Padding(table, (1, 0, 0, 0)) for table in tables]
    return Group(_heading(card), *spaced, "", *notes)


def _heading(card: Card) -> str:
    """Returns the lines above all tables: devices, blocks, and what a step has."""
    axes = card.mesh.split()
    split = f" ({axes})" if axes else ""
    micro = f", in {card.num_micro_batches} micro-batches" if card.num_micro_batches > 1 else ""
    dense, moe = card.num_layers
    return (
        f"{card.mesh.num_devices} x {card.platform}{split}, {dense} dense and {moe} MoE blocks\n"
        f"a step: {card.batch_size} rows x {card.seq_len} tokens = {card.tokens_per_step:,} "
        f"tokens{micro}{_pipeline(card)}"
    )


def _pipeline(card: Card) -> str:
    """Returns the line of a pipeline, and nothing without one."""
    sizes, name = card.pipeline, card.pipeline_schedule
    if sizes is None:
        return ""
    chunks = f" of {sizes.chunks} chunks" if sizes.chunks > 1 else ""
    return (
        f"\na pipeline: {sizes.stages} stages{chunks}, {name}; "
        f"{sizes.works} works in {sizes.ticks} ticks, a bubble of {sizes.bubble:.1%}"
    )


def _model_table(card: Card) -> Table:
    """Returns the table of the parameters, beside the FLOPs that they cost."""
    counts, work = card.parameters, card.forward
    # A tied embedding is the head's matrix too, so the head's work stands in its row.
    tied = not counts.head
    rows = (
        (
            "embedding and head" if tied else "embedding",
            counts.embedding,
            counts.embedding,
            work.head if tied else 0,
        ),
        (
            "attention projections",
            counts.attention,
            counts.attention,
            work.attention_projections,
        ),
        ("attention scores, causal", 0, 0, work.attention_scores),
        ("dense feed-forward", counts.dense, counts.dense, work.dense),
        ("shared experts", counts.shared, counts.shared, work.shared),
        ("routed experts", counts.experts, counts.experts_active, work.experts),
        ("routers", counts.router, counts.router, work.router),
        ("norms", counts.norms, counts.norms, 0),
        ("latent projections", counts.latent, counts.latent, work.latent),
        ("joins of further tokens", counts.joins, counts.joins, work.joins),
        ("head", counts.head, counts.head, 0 if tied else work.head),
    )
    table = _table("model", "parameters", "active", "FLOPs a token", "share")
    for name, total, active, flops in rows:
        # What the model does not have gets no line.
        if total or flops:
            share = f"{flops / work.total:.1%}" if flops else ""
            table.add(name, _number(total), _number(active), _number(flops), share)
    table.section()
    table.add("all, forward", f"{counts.total:,}", f"{counts.active:,}", f"{work.total:,}", "100%")
    table.add("without embedding and head", f"{counts.total_body:,}", f"{counts.active_body:,}")
    table.add("training, 3 x forward", "", "", f"{card.train_per_token:,}")
    table.add("training, of a step", "", "", three_digits(card.train_per_step))
    return table


def _number(number: int) -> str:
    """Returns a number with commas, and nothing for 0."""
    return f"{number:,}" if number else ""


def _memory_table(card: Card) -> Table:
    """Returns the table of a device's memory: the state by its parts, then the compiler's plan."""
    memory, compiled = card.memory, card.compiled
    # A result that takes the memory of a donated argument needs none of its own.
    new_outputs = compiled.output - compiled.alias
    rows = (
        ("parameters", memory.parameters, ""),
        ("optimizer state", memory.optimizer, ""),
        ("moving average", memory.ema, ""),
        ("master copy", memory.master, "of the parameters, in float32"),
        ("gradients", memory.gradients, "estimate: as much as the parameters"),
        ("compiled step: arguments", compiled.argument, "state and batch"),
        ("compiled step: new outputs", new_outputs, "those not written over the state"),
        ("compiled step: temporary", compiled.temporary, "gradients, activations, buffers"),
    )
    table = _table("memory of one device", "bytes", "")
    for name, size, note in rows:
        if size:
            table.add(name, decimal(size), note)
    table.section()
    note = f"by the compiler, after {compiled.seconds:.0f} s"
    table.add("compiled step: peak", decimal(compiled.peak), note)
    table.add("logged step: peak", decimal(card.peak_logged), "with a copy of the parameters")
    if card.chip:
        verdict = "fits" if card.fits else "DOES NOT FIT"
        table.add(f"{card.chip.name}: memory", decimal(card.chip.memory), verdict)
    return table


def _dispatch_table(card: Card, dispatch: Dispatch) -> Table:
    """Returns the table of the rows that a dispatcher holds, beside two loads."""
    overflows = dispatch.rows_held < dispatch.rows_worst
    filled = dispatch.rows_balanced / dispatch.rows_held
    rows = (
        (
            f"{card.dispatcher} buffer",
            dispatch.rows_held,
            DISPATCHERS[card.dispatcher].overflow if overflows else "never too small",
        ),
        ("balanced load", dispatch.rows_balanced, f"fills {filled:.0%} of the buffer"),
        ("worst case", dispatch.rows_worst, "all choose this device"),
    )
    table = _table("an MoE layer, one device", "rows", "bytes (estimate)", "")
    for name, number, note in rows:
        table.add(name, f"{number:,}", decimal(number * dispatch.row_bytes), note)
    return table


def _traffic_table(dispatch: Dispatch) -> Table:
    """Returns the table of the bytes that a device receives over each axis of the mesh."""

    def rank(axis: str) -> tuple[bool, str]:
        """Puts the axes whose traffic has a name first."""
        return axis not in TRAFFIC, axis

    table = _table("an MoE layer, one device", "forward", "backward", "bytes received")
    for axis in sorted({*dispatch.forward, *dispatch.backward}, key=rank):
        passes = (dispatch.forward, dispatch.backward)
        sizes = [decimal(part[axis]) if axis in part else "" for part in passes]
        table.add(f"over {axis}", *sizes, TRAFFIC.get(axis, "sums of small gradients"))
    if not table.rows:
        table.add("nothing travels")
    return table


def _table(title: str, *columns: str) -> Table:
    """Returns an empty table, whose first column is named by what the table is about.

    The last column holds notes where it is not a number.
    """
    has_notes = columns[-1] in ("", "bytes received")
    figures = columns[:-1] if has_notes else columns
    return Table([*names(title), *numbers(*figures), *prose(*columns[len(figures) :])])
