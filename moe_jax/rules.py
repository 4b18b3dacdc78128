"""The rules that tie config keys to each other. Each message names the keys, both values and the way out."""

from collections.abc import Iterator

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.moe import causality
from moe_jax.moe.routing import ROUTERS


def check(c: Config) -> None:
    """Raises a UserError for the first rule that the config breaks."""
    for rules in (_model, _moe, _mesh, _batch, _train):
        for message in rules(c):
            raise UserError(message)


def _choice(path: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
    if value not in allowed:
        yield f'{path} = "{value}" is not known: choose one of {", ".join(allowed)}'


def _positive(values: dict[str, float], least: float = 1) -> Iterator[str]:
    for path, value in values.items():
        if value < least:
            yield f"{path} = {value} must be at least {least}"


def _model(c: Config) -> Iterator[str]:
    m = c.model
    yield from _positive({"model.vocab_size": m.vocab_size, "model.d_model": m.d_model, "model.num_heads": m.num_heads})
    yield from _positive({"model.num_kv_heads": m.num_kv_heads, "model.ffn_hidden": m.ffn_hidden})
    yield from _positive({"model.repeats": m.repeats}, 0)
    for path, blocks in (("prefix", m.prefix), ("period", m.period), ("suffix", m.suffix)):
        for block in blocks:
            yield from _choice(f"model.{path}", block, ("dense", "moe"))
    if not m.blocks:
        yield "model.prefix, model.period x model.repeats and model.suffix make no block at all: a model needs one"
    if m.num_heads % m.num_kv_heads:
        yield f"model.num_heads ({m.num_heads}) must be divisible by model.num_kv_heads ({m.num_kv_heads})"
    if m.head_dim % 2:
        yield f"model.head_dim ({m.head_dim}) must be even: rotary embeddings turn pairs"
    if not 0 <= m.dropout < 1:
        yield f"model.dropout = {m.dropout} must be at least 0 and below 1"
    yield from _choice("model.activation", m.activation, ("swiglu", "gelu"))
    yield from _choice("model.remat", m.remat, ("none", "full", "dots", "dispatch"))
    for path, dtype in (("model.param_dtype", m.param_dtype), ("model.dtype", m.dtype)):
        yield from _choice(path, dtype, ("float32", "bfloat16", "float64"))


def _moe(c: Config) -> Iterator[str]:
    e = c.model.moe
    if not c.model.num_moe_layers:
        return
    yield from _positive({"model.moe.num_experts": e.num_experts, "model.moe.expert_hidden": e.expert_hidden})
    yield from _positive({"model.moe.group_rows": e.group_rows})
    yield from _positive({"model.moe.shared_experts": e.shared_experts}, 0)
    k = e.router_options.get("k", 1)
    if not 1 <= k <= e.num_experts:
        yield f"model.moe.routers.{e.router}.k ({k}) must lie between 1 and model.moe.num_experts ({e.num_experts})"
    if e.router == "top_k":
        yield from _choice("model.moe.routers.top_k.softmax", e.router_options["softmax"], ("before", "after"))
    if e.dispatcher == "capacity" and e.dispatcher_options["factor"] <= 0:
        yield f"model.moe.dispatchers.capacity.factor = {e.dispatcher_options['factor']} must be positive"
    if e.dispatcher == "dropless" and not (e.dispatcher_options["buffer"] == 0 or e.dispatcher_options["buffer"] >= 1):
        value = e.dispatcher_options["buffer"]
        yield f"model.moe.dispatchers.dropless.buffer = {value} must be 0 (the worst case at once) or at least 1"
    if ROUTERS[e.router].own_capacity and e.dispatcher != "dropless":
        yield (
            f'model.moe.router = "{e.router}" fixes the capacity of each expert itself; with model.moe.dispatcher = "{e.dispatcher}" it '
            "would be dropped a second time: set model.moe.dispatcher=dropless"
        )
    yield from _leak(c)
    yield from _choice("eval.dispatcher", c.eval.dispatcher, ("same", "dropless", e.dispatcher))


def _leak(c: Config) -> Iterator[str]:
    seen = causality.sees(c.model.moe)
    if c.model.allow_leak or not (seen.future or seen.batch):
        return
    what = "a later token" if seen.future else "another sequence"
    yield (
        f"{'; '.join(causality.reasons(c.model.moe))}: {what} would change what an earlier token's output is, so the loss of this causal "
        "model would be of a model that cannot be decoded (docs/routers.md has the measured leaks). Choose another, or set model.allow_leak=True"
    )


def _mesh(c: Config) -> Iterator[str]:
    m, mesh, e = c.model, c.mesh, c.model.moe
    batch = mesh.data * mesh.expert
    needs = [
        ("model.d_model", m.d_model, "mesh.data x mesh.expert", batch),
        ("model.num_heads", m.num_heads, "mesh.model", mesh.model),
        ("model.num_kv_heads", m.num_kv_heads, "mesh.model", mesh.model),
        ("model.vocab_size", m.vocab_size, "mesh.model", mesh.model),
    ]
    if "dense" in m.blocks:
        needs.append(("model.ffn_hidden", m.ffn_hidden, "mesh.model", mesh.model))
    if m.num_moe_layers:
        needs.append(("model.moe.num_experts", e.num_experts, "mesh.expert", mesh.expert))
        needs.append(("model.moe.expert_hidden", e.expert_hidden, "mesh.model", mesh.model))
    for path, value, axis, length in needs:
        if value % length:
            yield f"{path} ({value}) must be divisible by {axis} ({length})"


def _batch(c: Config) -> Iterator[str]:
    t, mesh = c.train, c.mesh
    devices = mesh.data * mesh.expert
    yield from _positive({"train.batch_size": t.batch_size, "eval.batch_size": c.eval.batch_size})
    if t.batch_size % t.micro_batch_size:
        yield f"train.batch_size ({t.batch_size}) must be divisible by train.micro_batch_size ({t.micro_batch_size})"
    for path, rows in (("train.micro_batch_size", t.micro_batch_size), ("eval.batch_size", c.eval.batch_size)):
        if rows % devices:
            yield f"{path} ({rows} rows) must be divisible by mesh.data x mesh.expert ({mesh.data} x {mesh.expert})"
        if c.model.num_moe_layers and (rows // devices) % c.model.moe.group_rows:
            yield (
                f"model.moe.group_rows ({c.model.moe.group_rows}) must divide the rows of one device "
                f"({rows // devices} = {path} {rows} / (mesh.data {mesh.data} x mesh.expert {mesh.expert}))"
            )


def _train(c: Config) -> Iterator[str]:
    yield from _positive({"train.steps": c.train.steps, "data.seq_len": c.data.seq_len, "log.every": c.log.every})
    yield from _positive({"checkpoint.keep": c.checkpoint.keep, "log.histogram_every": c.log.histogram_every})
    yield from _positive({"eval.every": c.eval.every, "checkpoint.every": c.checkpoint.every}, 0)
    yield from _positive({"train.nonfinite_patience": c.train.nonfinite_patience, "train.stop_at": c.train.stop_at}, 0)
    yield from _positive({"data.heldout_every": c.data.heldout_every}, 2)
    yield from _positive({"data.prefetch": c.data.prefetch})
    if c.optim.warmup_steps > c.train.steps:
        yield f"optim.warmup_steps ({c.optim.warmup_steps}) must not exceed train.steps ({c.train.steps})"
    yield from _choice("optim.decay_mask", c.optim.decay_mask, ("matrices", "all", "none"))
    if not c.data.sources:
        yield 'data.sources is empty: name at least one, as in (("embedded", 1.0),)'
