"""Prints the figures of docs/interchange.md; it needs requirements-dev.txt, as the tests do.

    python tools/interchange_figures.py families [FAMILY ...]
    python tools/interchange_figures.py import [--gb 2] [--mesh 2x2x2 --simulate_devices 8]

`families`: tiny models of transformers with random weights, one for each option of a family
(tests/interchange/hf_cases.py). Each is imported, exported and loaded again. A row tells how many
were imported and exported, how many came back bit for bit, the largest differences of logits, ours
from theirs and theirs after the export from theirs before it, and of how many the greedy text is
the same in both.

`import`: a Mixtral of random weights in bfloat16 is written, imported and exported, each in a
process of its own, of which the seconds and the most memory are told.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 400 * 10**6
# Tokens that are written, and the rows that they follow.
NEW, PROMPT = 12, (2, 6)


class Found(NamedTuple):
    """What became of one model."""

    imported: float
    exported: float
    same_bits: bool
    same_text: bool


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("families").add_argument("names", nargs="*", help="of families; none = all")
    of_import = what.add_parser("import")
    of_import.add_argument("--gb", type=float, default=2.0, help="size of the model")
    of_import.add_argument("--mesh", default="", help="DATAxEXPERTxMODEL")
    of_import.add_argument("--simulate_devices", type=int, default=0)
    flags = parser.parse_args(words)
    if flags.what == "families":
        print_families(flags.names)
    else:
        print_import(flags)
    return 0


# Families.


def print_families(names: list[str]) -> None:
    # The models and what is compared are those of the tests.
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "interchange")]
    import hf_cases

    print("| family | import | export | bit for bit | logits, ours | logits, exported | text |")
    print("|---|---|---|---|---|---|---|")
    for family in names or (*hf_cases.CONFIGS, *hf_cases.SEQ2SEQ):
        cases = [changes for name, changes in hf_cases.CASES.values() if name == family]
        found = [of_model(family, changes) for changes in cases]
        number = len(found)
        print(
            f"| `{family}` | {number} of {number} | {number} of {number} "
            f"| {sum(one.same_bits for one in found)} of {number} "
            f"| {max(one.imported for one in found):.1e} "
            f"| {max(one.exported for one in found):.1e} "
            f"| {sum(one.same_text for one in found)} of {number} |",
            flush=True,
        )


def of_model(family: str, changes: dict[str, Any]) -> Found:
    """Takes one model both ways. Raises UserError where one way is refused."""
    import hf_cases

    from moe_jax.interchange.exporting import export_model

    model = hf_cases.theirs(family, changes)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, back = (Path(folder) / name for name in ("theirs", "ours", "back"))
        hf_cases.saved(model, theirs)
        run = hf_cases.imported(theirs, ours)
        back.mkdir()
        export_model(run, back, shard_bytes=SHARD_BYTES)
        again = hf_cases.loaded(back)
        id_BS = hf_cases.ids()
        want = hf_cases.their_logits(model, id_BS)
        logits = hf_cases.our_logits(run, id_BS)
        text = hf_cases.their_greedy(model, hf_cases.ids(shape=PROMPT), NEW)
        texts = (
            hf_cases.our_greedy(run, hf_cases.ids(shape=PROMPT), NEW),
            hf_cases.their_greedy(again, hf_cases.ids(shape=PROMPT), NEW),
        )
        return Found(
            float(np.abs(logits - want).max()),
            float(np.abs(hf_cases.their_logits(again, id_BS) - want).max()),
            hf_cases.bits(back) == hf_cases.bits(theirs),
            all(np.array_equal(text, other) for other in texts),
        )


# Import.


def print_import(flags: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours, back = (Path(folder) / name for name in ("theirs", "ours", "back"))
        size = write_model(theirs, flags.gb)
        print(f"a Mixtral of {size / 1e9:.2f} GB in bfloat16, in shards of {SHARD_BYTES / 1e9} GB")
        more = ["--mesh", flags.mesh] if flags.mesh else []
        if flags.simulate_devices:
            more += ["--simulate_devices", str(flags.simulate_devices)]
        words = ["import", "--from", str(theirs), "--out", str(ours), *more]
        print("import", " ".join(more), measured(words), flush=True)
        words = ["export", "--workdir", str(ours), "--to", str(back), "--shard_mb", "400"]
        print("export", measured(words))


def measured(words: list[str]) -> str:
    """Returns the seconds and the most memory of a command."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "moe_jax", "convert", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds, cpu = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
    # Kilobytes, and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    memory = f"{usage.ru_maxrss * unit / 1e9:.2f} GB of memory at most"
    return f"{seconds:.0f} s ({cpu:.0f} s of a core), {memory}"


def write_model(folder: Path, gigabytes: float) -> int:
    """Writes a Mixtral of about so many bytes, and returns how many they are."""
    import ml_dtypes

    from moe_jax.interchange import tensors
    from moe_jax.interchange.exporting import write_json

    hidden, width, num_experts, vocab_size = 1024, 3584, 8, 32000
    layer_bytes = 2 * (3 * num_experts * hidden * width + 2 * hidden * hidden + hidden * hidden)
    num_layers = max(1, round((gigabytes * 1e9 - 4 * vocab_size * hidden) / layer_bytes))
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": num_layers,
        "num_local_experts": num_experts,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
    }
    folder.mkdir()
    write_json(folder / "config.json", config)
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    def made():
        yield "model.embed_tokens.weight", random(vocab_size, hidden)
        for layer in range(num_layers):
            before = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{before}{name}.weight", random(hidden)
            for name, rows in (
                ("q", hidden),
                ("k", hidden // 2),
                ("v", hidden // 2),
                ("o", hidden),
            ):
                yield f"{before}self_attn.{name}_proj.weight", random(rows, hidden)
            yield f"{before}block_sparse_moe.gate.weight", random(num_experts, hidden)
            for expert in range(num_experts):
                at = f"{before}block_sparse_moe.experts.{expert}."
                yield f"{at}w1.weight", random(width, hidden)
                yield f"{at}w2.weight", random(hidden, width)
                yield f"{at}w3.weight", random(width, hidden)
        yield "model.norm.weight", random(hidden)
        yield "lm_head.weight", random(vocab_size, hidden)

    return tensors.write(folder, made(), SHARD_BYTES)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
