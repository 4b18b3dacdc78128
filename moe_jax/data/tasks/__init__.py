"""Readers of the data of every task but language modelling: one module per kind, one dict DATASETS in each.

Files lie in `data.folder`; each reader says where to get the one that it misses. Where a set has no test part of its own, an example is
held out by a hash of its key (split.py), so equal examples are always on the same side.
"""
