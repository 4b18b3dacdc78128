"""A writer of metrics in a directory."""

from moe_jax.report.metrics import PerStep, Writer

PER_STEP = PerStep(tokens=100, flops=7_000)


def open_writer(path, resume_step=0, active=True, started=0.0, **options):
    about = {"resume_step": resume_step, "started": started, "per_step": PER_STEP}
    return Writer(path, tensorboard=False, active=active, **about, **options)


def without_spent(row):
    """A row without the sums that every row has: what was written."""
    return {
        name: value for name, value in row.items() if name not in ("seconds", "tokens", "flops")
    }
