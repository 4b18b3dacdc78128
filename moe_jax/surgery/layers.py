"""The arrays of the layers that get experts of a dense network: their values, and their moments.

`was` is the name of a block in the dense run and `now` its name in the new one, as
"repeats/0/blocks/0/". A prefix names a tree that has an array for each parameter: "params/",
"ema/", "master/", "opt_state/direction/mu/".
"""

from collections.abc import Mapping

import numpy as np

from moe_jax.optim.optimizers import OPTIMIZERS
from moe_jax.schema.config import Config
from moe_jax.surgery import axes, upcycling
from moe_jax.surgery.snapshot import VALUES, Arrays
from moe_jax.surgery.upcycling import Change, Shares

# Below the name of a block.
DENSE, EXPERTS, ROUTER = "dense/weights/", "moe/experts/", "moe/router/"


class Layers:
    """Makes the arrays of the layers with experts.

    Args:
      cfg: of the new run.
      old, begin: the arrays of the dense run, and of a fresh new one.
      share, router_start, change: as in upcycling.py.

    Fields:
      factor: what w_out of every copy is multiplied with.
      reason: why that does not keep the function; "" = it does.
    """

    def __init__(
        self,
        cfg: Config,
        old: Arrays,
        begin: Arrays,
        share: Shares,
        router_start: str,
        change: Change,
    ):
        self._cfg, self._old, self._begin = cfg, old, begin
        self._share, self._start, self._change = share, router_start, change
        self._axes = axes.of_state(cfg)
        self.factor, self.reason = self._weight()

    def made(self, was: str, now: str, moments: float) -> Arrays:
        """Returns the arrays of a layer by their names on disk, values and moments.

        `moments`: the factor on those of the dense network; 0 = they begin anew.
        """
        ending = f"{now}{EXPERTS}w_in"
        found: Arrays = {}
        for name in self._begin:
            # Every tree that has an array for each parameter has this one of the block.
            prefix = name.removesuffix(ending)
            dense = self._dense(prefix, was)
            if prefix == name or not dense:
                continue
            if prefix.rstrip("/") in VALUES:
                arrays = self._values(prefix, now, dense)
            elif moments and prefix.startswith("opt_state/"):
                arrays = self._moments(prefix, dense, moments)
            else:
                continue
            found |= {f"{prefix}{now}{rest}": x for rest, x in arrays.items()}
        return found

    def _dense(self, prefix: str, was: str) -> dict[str, np.ndarray]:
        """Returns the arrays of the dense network below a prefix; {} where there are none that
        have the shapes of its parameters.
        """
        found = {}
        for name in ("w_in", "w_out"):
            x = self._old.get(f"{prefix}{was}{DENSE}{name}")
            if x is None or x.shape != self._old[f"params/{was}{DENSE}{name}"].shape:
                return {}
            # Rounded once, at the end.
            found[name] = x.astype(np.float64)
        return found

    def _values(
        self, prefix: str, now: str, dense: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Returns parameters, or their averages, by their names below the block."""
        experts = self._copies(dense)
        if self._share.shards:
            experts = upcycling.changed(experts, now, self._change)
            experts["w_out"] = experts["w_out"] * self.factor
        # Shared experts have all units: new experts begin as any, and add nothing at first.
        else:
            for name in ("w_in", "w_out"):
                experts[name] = self._begin[f"{prefix}{now}{EXPERTS}{name}"].astype(np.float64)
            experts["w_out"] = np.zeros_like(experts["w_out"])
        arrays = {EXPERTS + name: x for name, x in experts.items()}
        arrays |= self._shared(dense)
        gate = f"{prefix}{now}{DENSE}gate"
        if gate in self._begin:
            # The sigmoid of 0 is a half, so twice as much goes through it.
            arrays[f"{DENSE}gate"] = np.zeros(self._begin[gate].shape)
            arrays[f"{DENSE}w_out"] = 2 * arrays[f"{DENSE}w_out"]
        router = self._router(now)
        return arrays | {ROUTER + name: x for name, x in router.items()}

    def _moments(
        self, prefix: str, dense: Mapping[str, np.ndarray], factor: float
    ) -> dict[str, np.ndarray]:
        """Returns the moments of experts: those of the units that they are copies of."""
        squares = OPTIMIZERS[self._cfg.optim.optimizer].squares
        # Moments of squares grow with the square of a gradient.
        if any(part in squares for part in prefix.split("/")):
            factor = factor**2
        dense = {name: factor * x for name, x in dense.items()}
        arrays = {EXPERTS + name: x for name, x in self._copies(dense).items()}
        return arrays | self._shared(dense)

    def _copies(self, dense: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns what each expert copies; {} where shared experts have all."""
        if not self._share.shards:
            return {}
        num_experts = self._cfg.model.moe.num_experts
        return upcycling.experts(dense["w_in"], dense["w_out"], num_experts, self._share)

    def _shared(self, dense: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns what the shared experts take."""
        width = self._share.shared
        if not width:
            return {}
        # Hidden units are the last dimension of w_in [D, P, F] and the first of w_out [F, D].
        return {
            f"{DENSE}w_in": dense["w_in"][:, :, :width],
            f"{DENSE}w_out": dense["w_out"][:width],
        }

    def _router(self, now: str) -> dict[str, np.ndarray]:
        """Returns the first weights of the router of a block."""
        below = f"params/{now}{ROUTER}"
        weights = {n.removeprefix(below): x for n, x in self._begin.items() if n.startswith(below)}
        where = {name: self._axes[below + name].expert for name in weights}
        return upcycling.begun(weights, where, self._start, self._share, now, self._change.seed)

    def _weight(self) -> tuple[float, str]:
        """Returns the factor on w_out, and why it does not keep the function: asked of the router
        of one layer, for the sums of gates are those of all.
        """
        if not self._share.shards:
            return 1.0, ""
        ending = EXPERTS + "w_in"
        names = [n for n in self._begin if n.startswith("params/") and n.endswith(ending)]
        now = names[0].removeprefix("params/").removesuffix(ending)
        below = f"router_state/{now}moe/state/"
        state = {n.removeprefix(below): x for n, x in self._begin.items() if n.startswith(below)}
        return upcycling.weight_of_copies(self._cfg.model, self._router(now), state, self._share)
