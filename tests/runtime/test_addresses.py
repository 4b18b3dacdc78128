"""The address of a bucket is refused, and never becomes a folder called "gs:"."""

from pathlib import Path

import pytest

from moe_jax import train
from moe_jax.errors import UserError
from moe_jax.runtime import shell


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_an_address_is_refused_and_makes_no_folder(address, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # A Path has one slash less.
    for written in (address, Path(address)):
        with pytest.raises(UserError, match=r"workdir \w+:/.* is no path"):
            with shell.held(Path(written), "--workdir"):
                pass
    assert not list(tmp_path.iterdir())


def test_training_from_python_refuses_it_too(monkeypatch, tmp_path):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no path"):
        train.from_config(
            f"{root}/configs/quickstart.py", "gs://bucket/run", "--config.mesh.data=1"
        )
    assert not list(tmp_path.iterdir())


def test_a_path_with_a_colon_is_a_path(tmp_path):
    with shell.held(tmp_path / "12:30", "--workdir"):
        assert (tmp_path / "12:30").is_dir()
