"""Small files in the formats that the readers of the tasks' data take, and all rows of a split at
once.
"""

import gzip

import numpy as np


def packed(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode()))


def all_train(data):
    index = np.arange(data.rows["train"])
    return data.batch("train", 0 * index, index, index.astype(np.int32), index >= 0)
