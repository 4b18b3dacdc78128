"""Compiled programs are kept: a second process finds them, and trusts only what was noted."""

import os
import subprocess
import sys

from moe_jax.parallel import compile_cache

SCRIPT = """
import sys
import jax, jax.numpy as jnp
from moe_jax.parallel import compile_cache
compile_cache.SETTLED = 0.0
cache = compile_cache.CompileCache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8))).sum()), cache.hits, cache.note)
cache.keep()
"""


def compiled(where):
    """(value, programs found in the cache, note) of a new process."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(where)],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    value, hits, note = done.stdout.strip("\n").split(" ", 2)
    return float(value), int(hits), note


def entries(where):
    return sorted(where.glob("*/*-cache"))


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    where = tmp_path / "cache"
    value, hits, note = compiled(where)
    assert hits == 0 and not note and entries(where)
    assert compiled(where) == (value, len(entries(where)), "")
    # A damaged entry is deleted, compiled again, and then found again.
    damaged = entries(where)[0]
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    foreign = damaged.with_name("foreign-0-cache")
    foreign.write_bytes(b"somebody else's")
    assert compiled(where) == (value, len(entries(where)) - 1, "")
    assert not foreign.exists()
    assert compiled(where) == (value, len(entries(where)), "")


def test_a_directory_that_others_may_write_to_is_not_used(tmp_path):
    where = tmp_path / "cache"
    where.mkdir()
    where.chmod(0o777)
    _, hits, note = compiled(where)
    assert "others may write to" in note and hits == 0 and not entries(where)
    where.chmod(0o700)
    assert compiled(where)[2] == ""
    assert (where.stat().st_mode & 0o077) == 0


def test_the_oldest_entries_are_deleted_beyond_a_size(tmp_path, monkeypatch):
    for number in range(4):
        path = tmp_path / f"{number}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (number, number))
    compile_cache.write_digests(tmp_path)
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 250)
    compile_cache.clean(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("*-cache"))] == ["2-cache", "3-cache"]


def test_it_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled("")[1:] == (0, "") and not list(tmp_path.iterdir())
    assert compiled("auto")[1:] == (0, "") and entries(tmp_path / "moe_jax/compiled")


def test_a_second_run_of_a_process_goes_on_with_it(tmp_path, monkeypatch):
    own = tmp_path / compile_cache.hardware()
    own.mkdir(mode=0o700)
    (own / "0-cache").write_bytes(b"a program")
    monkeypatch.setattr(compile_cache, "SETTLED", 0.0)
    for directory, keeps in ((str(own), True), ("/somewhere/else", False)):
        monkeypatch.setattr(compile_cache, "in_use", lambda directory=directory: directory)
        (own / compile_cache.DIGESTS).unlink(missing_ok=True)
        compile_cache.CompileCache(str(tmp_path)).keep()
        assert (own / compile_cache.DIGESTS).exists() == keeps
