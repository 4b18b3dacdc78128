"""How many held-out tokens each expert of a run gets."""

import jax
import numpy as np

from moe_jax.evaluate import make_evaluate
from moe_jax.parallel import mesh as meshes
from moe_jax.run import Run
from moe_jax.tasks import TASKS
from moe_jax.train_step import State


def counted(run: Run, batches: int) -> np.ndarray:
    """Returns assignments [L, E] of held-out rows of the run's own data.

    `batches`: of eval.batch_size rows; 0 = all. Raises UserError where the data is not there.
    """
    cfg = run.config
    data = TASKS[cfg.task].open(cfg)
    with jax.set_mesh(meshes.make(meshes.ONE, jax.devices()[:1])):
        none = jax.numpy.int32(0)
        # What is evaluated of a state: the parameters, or their average, and the routers' state.
        state = State(none, run.parameters, run.router_state, {}, run.moving_average, none)
        routing_LZE = make_evaluate(cfg, data)(state, batches)["routing"]
    load_LE = np.asarray(routing_LZE, np.float64).sum(1)
    # Null experts lie behind the real ones.
    return load_LE[:, : cfg.model.moe.num_experts]
