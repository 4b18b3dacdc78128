"""Optimizers. A new one is one file here and one line in OPTIMIZERS; see contract.py."""

from moe_jax.optim.optimizers import adafactor, adamw, lion, muon, sgd
from moe_jax.optim.optimizers.contract import Optimizer

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": adamw.OPTIMIZER,
    "lion": lion.OPTIMIZER,
    "adafactor": adafactor.OPTIMIZER,
    "muon": muon.OPTIMIZER,
    "sgd": sgd.OPTIMIZER,
}
