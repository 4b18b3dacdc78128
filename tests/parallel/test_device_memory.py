"""What does not fit into the memory of a device is told in one line, without a traceback."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax import __main__, main, train
from moe_jax.commands import generate
from moe_jax.errors import UserError
from moe_jax.parallel import device_memory


def too_much(*args):
    """Asks for more bytes than an address has numbers."""
    jnp.zeros(2**47).block_until_ready()


class Accelerator:
    """A device that says how much memory it has, and how much of it jax may take."""

    platform = "gpu"

    def memory_stats(self):
        return {"bytes_limit": 80_000_000_000}


@pytest.mark.parametrize("begin", ["a run", "a command"])
def test_what_jax_says_is_one_line_with_the_way_out(begin, monkeypatch, capsys):
    if begin == "a run":
        monkeypatch.setattr(main, "launch", too_much)
        code = main.main([])
    else:
        monkeypatch.setattr(generate, "main", too_much)
        code = __main__.main(["generate"])
    said = capsys.readouterr().err
    assert code == 64 and "Traceback" not in said
    for words in ("error: this does not fit", "memory allocating", "train.micro_batch_size"):
        assert words in " ".join(said.split())


def test_another_error_is_none_of_memory():
    assert device_memory.exhausted(RuntimeError("INTERNAL: a fault")) == ""


def test_the_devices_of_a_cpu_share_the_machine():
    one, all_of_them = jax.devices()[:1], jax.devices()
    alone, shared = device_memory.of_each(one), device_memory.of_each(all_of_them)
    assert shared == alone // len(all_of_them) and alone > 2**28


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device_memory, "_CONTAINER", limit)
    machine = device_memory.of_each(jax.devices()[:1])
    limit.write_text("max\n")
    assert device_memory.of_each(jax.devices()[:1]) == machine
    limit.write_text("1048576\n")
    assert device_memory.of_each(jax.devices()[:1]) == 2**20


def test_a_state_that_no_device_holds_is_refused_before_it_is_made(tmp_path):
    """Linux would kill the process while it fills the arrays."""
    device_memory.refuse_too_large(79_000_000_000, [Accelerator()])
    with pytest.raises(UserError, match=r"takes 81.0 GB of each device, which has 80.0 GB"):
        device_memory.refuse_too_large(81_000_000_000, [Accelerator()])
    with pytest.raises(UserError, match=r"parameters and moments, takes .* TB"):
        train.from_config("debug", tmp_path / "run", "--config.model.moe.expert_hidden=8589934592")
