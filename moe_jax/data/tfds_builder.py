"""The TFDS dataset of packed rows.

Imported only while a directory is prepared: importing TFDS takes half a second.
"""

import itertools
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from moe_jax.data.pack import SPLITS
from moe_jax.data.tfds_import import tfds

# Of rows in one file, before compression.
SHARD_BYTES = 1 << 28
# TFDS writes its description anew each time.
ROWS_AT_ONCE = 4096

# Split -> rows by the names of their fields.
Splits = dict[str, Iterable[dict[str, np.ndarray]]]


class PackedText(tfds.core.GeneratorBasedBuilder):
    """The rows of `moe_jax.data.pack`, in the order of packing.

    They are shuffled when they are read, anew in each epoch.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, *, seq_len: int, dtype: np.dtype, splits: Splits, has_quiet: bool, **kwargs: Any
    ):
        self._has_quiet = has_quiet
        self._seq_len = seq_len
        self._dtype = dtype
        self._splits = splits
        super().__init__(**kwargs)

    def _tensor(self, dtype: np.dtype) -> tfds.features.Tensor:
        # TFDS would store each number of a plain tensor as a varint, which is three times slower to
        # write than bytes.
        return tfds.features.Tensor(
            shape=(self._seq_len,), dtype=dtype, encoding=tfds.features.Encoding.BYTES
        )

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "inputs": self._tensor(self._dtype),
            "targets": self._tensor(self._dtype),
            # the largest segment number (pack._segments)
            "segment": self._tensor(np.min_scalar_type(self._seq_len // 2 + 1)),
            "domain": self._tensor(np.dtype(np.uint8)),
        }
        if self._has_quiet:
            features["quiet"] = self._tensor(np.dtype(np.uint8))
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        return enumerate(self._splits[split])

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig,
    ) -> None:
        """Writes each row as it comes.

        TFDS itself would keep a split in memory, and beyond 1 GB call TensorFlow.
        """
        # TFDS writes into another folder, which it renames at the end. So self.info, which was made
        # before, has the wrong folder.
        info = self._info()
        # Four fields a row, each taken to be as wide as the tokens.
        most_rows = max(1, SHARD_BYTES // (4 * self._seq_len * self._dtype.itemsize))
        sequential = tfds.core.SequentialWriter(
            info, max_examples_per_shard=most_rows, file_format="array_record"
        )
        sequential.initialize_splits(list(SPLITS))
        for split, examples in self._split_generators(dl_manager).items():
            # A split is never whole in memory.
            while rows := [row for _, row in itertools.islice(examples, ROWS_AT_ONCE)]:
                sequential.add_examples({split: rows})
        sequential.close_all()
        self.info.set_splits(info.splits)


def build_packed_text(
    folder: pathlib.Path, seq_len: int, dtype: np.dtype, splits: Splits, has_quiet: bool
) -> dict[str, int]:
    """Writes the splits as ArrayRecord files under `folder`; returns the number of rows of each."""
    tfds.disable_progress_bar()
    builder = PackedText(
        data_dir=folder,
        file_format="array_record",
        seq_len=seq_len,
        dtype=dtype,
        splits=splits,
        has_quiet=has_quiet,
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    # TFDS makes it, and it is empty.
    shutil.rmtree(folder / "downloads")
    return {name: split.num_examples for name, split in builder.info.splits.items()}
