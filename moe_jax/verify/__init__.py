"""Proof that a config computes the same on every mesh:

`python -m moe_jax verify`. docs/verify.md tells what is checked.
"""
