"""Converts what publishers of data sets distribute into the files that moe_jax/tasks reads.

Nothing is downloaded: a user gives the files. `table.SETS` lists the sets; each publisher's format
has a file of its own. `given.py` finds and checks the files, `written.py` writes the results.
"""
