"""Two processes digest and verify a checkpoint together, each a part of its files."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.checkpoint import manifest

# Each process writes what it saw to a file: {what: [file, ...]} and {what: text}.
WORKER = """
import json, os, sys
os.environ["PJRT_NPROC"] = "64"
import jax, numpy as np
from jax.experimental import multihost_utils
address, index, path, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(address, 2, index, coordinator_bind_address=address)
from pathlib import Path
from moe_jax.checkpoint import Checkpoints, SaveFailed, manifest
from moe_jax.errors import UserError
jax.set_mesh(jax.make_mesh((2,), ("data",)))
seen, reads = {}, []
digest = manifest._digest
def counted(file):
    reads.append("/".join(Path(file).parts[Path(file).parts.index("state"):]
                          if "state" in Path(file).parts else Path(file).parts[-1:]))
    return digest(file)
manifest._digest = counted
def tell(what):
    seen[what] = sorted(reads)
    reads.clear()
def state(step):
    want = np.arange(40000.0, dtype=np.float32).reshape(2, 20000) + step
    place = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("data"))
    split = jax.make_array_from_callback(want.shape, place, lambda i: want[i])
    return {"split": split, "step": jax.numpy.int32(step)}
def open_dir(keep=9):
    return Checkpoints(path, every=1, keep=keep, keep_best=0)
def save(checkpoints, step):
    checkpoints.save(step, state(step), metadata={}, score=None, stacked=False)
    checkpoints.steps()

first = open_dir()
for step in (1, 2, 3):
    save(first, step)
    tell(f"save {step}")
first.close()
seen["latest"] = open_dir().latest()
tell("verify")

# A save where one process cannot read what it wrote is none.
failing = open_dir()
if index == 1:
    whole = manifest.digests
    def broken(*_):
        raise OSError(5, "Input/output error")
    manifest.digests = broken
try:
    save(failing, 4)
except SaveFailed as error:
    seen["failed"] = str(error)
if index == 1:
    manifest.digests = whole
seen["after failure"] = failing.steps()

# Damage in a file that process 1 verifies sends both processes one step back.
files = manifest.read(Path(path) / "step_00000003")["files"]
if index == 0:
    file = Path(path) / "step_00000003" / manifest.shares(files, 2)[1][0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
multihost_utils.sync_global_devices("damaged")
again = open_dir()
seen["latest with damage"] = again.latest()
try:
    again.restore(3, state(0), stacked=False)
except UserError as error:
    seen["damage"] = str(error)
got = again.restore(2, state(0), stacked=False)
seen["restored"] = bool((np.asarray(got["split"].addressable_data(0)) % 20000)[0, 0] == 2)
reads.clear()
# Older ones are verified before any is deleted, together as well.
last = open_dir(keep=2)
save(last, 5)
tell("prune")
seen["left"] = last.steps()
last.close()
json.dump(seen, open(out, "w"))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The directory that two processes wrote, and what each of them saw."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{end.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("XLA_FLAGS", None)
    processes = []
    for index in (0, 1):
        command = [sys.executable, "-c", WORKER, address, str(index)]
        command += [str(folder / "checkpoints"), str(folder / f"{index}.json")]
        processes.append(
            subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        )
    logs = [process.communicate(timeout=100)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)[-4000:]
    seen = [json.loads((folder / f"{index}.json").read_text()) for index in (0, 1)]
    return folder / "checkpoints", seen, logs


def all_files(path):
    return manifest.read(path)["files"]


def test_each_process_digests_what_it_wrote(two):
    path, (first, second), _ = two
    files = all_files(path / "step_00000002")
    own = [name for name in files if "ocdbt.process_1/" in name]
    # Half of the large array is in them.
    assert sum(files[name][0] for name in own) > 40000
    assert second["save 1"] and second["save 2"] == sorted(own)
    assert first["save 2"] == sorted(files.keys() - set(own))


def test_each_process_verifies_half(two):
    path, (first, second), _ = two
    assert first["latest"] == second["latest"] == 3
    reads = first["verify"], second["verify"]
    files = all_files(path / "step_00000002")
    # Names of files are random: those of step 3 are not those of step 2.
    assert not set(reads[0]) & set(reads[1]) and len(reads[0]) + len(reads[1]) == len(files)
    assert min(map(len, reads)) >= 2


def test_a_process_that_cannot_read_its_files_fails_the_save_in_all(two):
    _, (first, second), _ = two
    assert "process 1: OSError: [Errno 5] Input/output error" in first["failed"]
    assert "Input/output error" in second["failed"]
    assert first["after failure"] == second["after failure"] == [1, 2, 3]


def test_damage_that_one_process_finds_is_that_of_all(two):
    _, (first, second), logs = two
    assert first["latest with damage"] == second["latest with damage"] == 2
    assert first["damage"] == second["damage"]
    assert "step_00000003 is damaged (state/" in first["damage"]
    assert [log.count("going back to the one before it") for log in logs] == [1, 0]
    assert first["restored"] and second["restored"]


def test_old_checkpoints_are_verified_together_before_one_is_deleted(two):
    path, (first, second), _ = two
    assert first["left"] == second["left"] == [2, 5]
    assert (path / "step_00000003.damaged0").exists()
    # Beside its own files of step 5, a process read others.
    assert any("ocdbt.process_0/" in name for name in second["prune"])


def test_a_hundred_flipped_bits_are_found_by_one_part_or_the_other(two):
    path = two[0] / "step_00000005"
    content = manifest.read(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = np.array([file.stat().st_size for file in files])
    random = np.random.RandomState(2)
    # Half of them by size, half over all files, so that small ones are among them.
    numbers = [
        *random.choice(len(files), 50, p=sizes / sizes.sum()),
        *random.choice(np.flatnonzero(sizes), 50),
    ]
    for number in numbers:
        raw = files[number].read_bytes()
        flipped = bytearray(raw)
        flipped[random.randint(len(raw))] ^= 1 << random.randint(8)
        files[number].write_bytes(flipped)
        found = [bool(manifest.damage(path, part, 2)) for part in (0, 1)]
        if files[number].name == manifest.MANIFEST:
            assert all(found) or manifest.read(path) == content
        else:
            assert sum(found) == 1, files[number]
        files[number].write_bytes(raw)
    assert not manifest.damage(path)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shares_are_all_files_once_and_even(parts):
    random = np.random.RandomState(parts)
    sizes = (random.pareto(1.0, 60) * 1000).astype(int)
    files = {f"state/{number}": [int(size), ""] for number, size in enumerate(sizes)}
    shares = manifest.shares(files, parts)
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name][0] for name in share) for share in shares]
    assert max(loads) <= sum(loads) / parts + max(sizes)
    # Each process computes it by itself, from a manifest that may be read in any order.
    assert manifest.shares(dict(reversed(files.items())), parts) == shares
