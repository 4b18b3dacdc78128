"""`python -m moe_jax data` as the tests call it."""

import gzip
import hashlib

from moe_jax.__main__ import main


def data(capsys, *arguments):
    """Runs the command; returns the exit code, and the lines of both streams."""
    code = main(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def refusal(capsys, *arguments):
    """Returns the one line of a command that is refused."""
    code, out, err = data(capsys, *arguments)
    assert code == 64 and not out and len(err) == 1, (code, out, err)
    return err[0]


def unpacked(path):
    return gzip.decompress(path.read_bytes()).decode()


def sha256(content):
    return hashlib.sha256(content).hexdigest()
