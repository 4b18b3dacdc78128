"""Names the packages of the wheel; all else about it is in pyproject.toml.

The top-level folder `configs` is installed as `moe_jax.configs`, which a list that setuptools makes
by itself cannot say.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moe_jax", "moe_jax.*"]), "moe_jax.configs"],
    package_dir={"moe_jax.configs": "configs"},
)
