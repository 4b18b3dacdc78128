"""The exit codes of a run, which the launchers act on (docs/clusters.md)."""

DONE = 0  # trained to the end, or saved after SIGTERM or SIGHUP
CONFIG = 64  # a mistake of the user, which the message names: starting again does not help
INTERNAL = 70  # an exception that nobody expected: a fault of the program
RETRY = 75  # another process, a machine or a disk failed: start again, the run goes on
NOT_FINITE = 76  # the loss was not finite too often in a row
NO_CHECKPOINT = 77  # the workdir has checkpoints, and none of them can be read
DRIFT = 78  # the processes of the run were started with different configs, data or programs
