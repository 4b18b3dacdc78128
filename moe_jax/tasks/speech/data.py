"""Spoken digits as log-mel frames: the Free Spoken Digit Dataset (FSDD), 8 kHz, six speakers.

Its own rule: recordings 0 to 4 of each digit and speaker are the test part, all others are for
training. Frames are computed by kaldi-native-fbank (25 ms every 10 ms); `stack` of them side by
side are one place of a row.

Shapes: B recordings of a batch, F frames, M mel bins, S places, P = stack M.
"""

import io
import itertools
import pathlib
import re
import tarfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data import examples
from moe_jax.data.examples import Classes, Examples, Fields, Ragged
from moe_jax.data.records import folder as files
from moe_jax.errors import UserError

KIND = "speech"
# Digit, speaker, index.
NAME = re.compile(r"(\d)_(\w+)_(\d+)\.wav")
# Indices below it are the test part.
TESTED = 5
# Of a recording of any length, whose means are what a classical baseline sees.
PIECES = 8


class Recording(NamedTuple):
    """A recording, and the side that it is on."""

    # float32, in units of a 16-bit sample.
    wave: np.ndarray
    # Samples a second.
    rate: int
    label: str
    speaker: str
    heldout: bool


def read_fsdd(folder: str) -> list[Recording]:
    """Returns the recordings of fsdd_900.tar.gz, or of a folder `recordings` of wav files.

    They are in the order of their names.
    """
    # A folder of recordings comes first: a user who has both has chosen by unpacking.
    try:
        path = files.find(folder, KIND, "recordings", "fsdd")
    except UserError:
        path = files.find(folder, KIND, "fsdd_900.tar.gz", "fsdd")
    content = _files(path)
    # An archive and a folder list their files in orders of their own.
    names = [name for name in sorted(content) if NAME.fullmatch(name)]
    recordings = [_recording(name, content[name]) for name in names]
    if {recording.heldout for recording in recordings} != {True, False}:
        raise UserError(
            f"{path} has no recordings DIGIT_SPEAKER_INDEX.wav with indices below {TESTED} and "
            "above"
        )
    return recordings


def _files(path: pathlib.Path) -> dict[str, bytes]:
    """Returns {name without folders: content} of the files of a folder or an archive."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.glob("*.wav")}
    try:
        content: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                # None for a folder.
                if file := archive.extractfile(member):
                    content[member.name.rpartition("/")[2]] = file.read()
        return content
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read, it may be damaged: {error}") from None


def _recording(name: str, data: bytes) -> Recording:
    """Returns the recording of a wav file DIGIT_SPEAKER_INDEX.wav.

    Raises UserError if it is none.
    """
    from scipy.io import wavfile

    label, speaker, index = name.removesuffix(".wav").split("_")
    try:
        rate, wave = wavfile.read(io.BytesIO(data))
    except ValueError as error:
        raise UserError(f"recording {name} is no wav file: {error}") from None
    return Recording(wave.astype(np.float32), rate, label, speaker, int(index) < TESTED)


DATASETS: dict[str, Callable[[str], list[Recording]]] = {"fsdd": read_fsdd}


def open_speech(
    name: str,
    folder: str,
    *,
    seq_len: int,
    mel_bins: int,
    stack: int,
    copies: int,
    tempo: float,
    noise: float,
    seed: int,
) -> Examples:
    """Opens a key of DATASETS as rows `examples.LabelledVectors` of `stack` frames each; the domain
    is the speaker.

    Each mel bin is standardised over the training frames. A recording of more than seq_len * stack
    frames is cut. The training part holds `copies` of each recording: the first as it is, the
    others resampled to 1 / (1 +- `tempo`) of their length and with Gaussian noise of up to `noise`
    of their root mean square, as `seed` decides.
    """
    if name not in DATASETS:
        raise files.unknown(KIND, name, list(DATASETS))
    if not 0 <= tempo < 1:
        raise UserError(
            f"tempo = {tempo} must be at least 0 and below 1: 0.1 changes the length by up to a "
            "tenth"
        )
    recordings = DATASETS[name](folder)
    train = [recording for recording in recordings if not recording.heldout]
    heldout = [recording for recording in recordings if recording.heldout]
    random = np.random.default_rng((seed, 2))
    # The originals come first, then all second copies, and so on.
    changed = [
        changed_copy(recording, tempo, noise, random)
        for _ in range(copies - 1)
        for recording in train
    ]
    parts = {"train": [*train, *changed], "heldout": heldout}
    mels = standardised(
        {
            split: [log_mel(recording.wave, recording.rate, mel_bins) for recording in part]
            for split, part in parts.items()
        }
    )
    return _examples(name, parts, mels, num_originals=len(train), seq_len=seq_len, stack=stack)


def standardised(mels: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Returns the frames [F, M] of both splits, standardised by mean and deviation of training."""
    frames = np.concatenate(mels["train"])
    mean_M = frames.mean(0)
    # A band without any energy has no deviation to divide by.
    deviation_M = frames.std(0) + 1e-3
    return {split: [(mel - mean_M) / deviation_M for mel in part] for split, part in mels.items()}


def _examples(
    name: str,
    parts: dict[str, list[Recording]],
    mels: dict[str, list[np.ndarray]],
    *,
    num_originals: int,
    seq_len: int,
    stack: int,
) -> Examples:
    """Returns the rows of recordings; the first `num_originals` training ones are no copies."""
    recordings = [recording for part in parts.values() for recording in part]
    labels = tuple(sorted({recording.label for recording in recordings}))
    speakers = tuple(sorted({recording.speaker for recording in recordings}))
    rows: dict[str, Ragged] = {}
    label: dict[str, np.ndarray] = {}
    domain: dict[str, np.ndarray] = {}
    for split, part in parts.items():
        vectors = [stacked(mel, stack) for mel in mels[split]]
        rows[split] = examples.ragged(vectors)
        label_index = [labels.index(recording.label) for recording in part]
        label[split] = np.array(label_index, np.int32)
        speaker_index = [speakers.index(recording.speaker) for recording in part]
        domain[split] = np.array(speaker_index, np.int32)

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        values_BSP, valid_BS = examples.padded(rows[split], index_B, seq_len)
        return {
            "values_BSP": values_BSP,
            **examples.one_segment(valid_BS),
            **examples.labelled(label[split][index_B], domain[split][index_B]),
        }

    # The order is part of the fingerprint, which old runs are compared by.
    arrays = [array for split in parts for array in (*rows[split], label[split], domain[split])]
    num_cut = sum(len(mel) > seq_len * stack for mel in mels["train"][:num_originals])
    note = f"{num_cut} of {num_originals} training recordings are cut to {seq_len * stack} frames"
    return Examples(
        spec=name,
        batch_type=examples.LabelledVectors,
        seq_len=seq_len,
        domains=speakers,
        rows={split: len(part) for split, part in parts.items()},
        fetch=fetch,
        heldout_domain_R=domain["heldout"],
        fingerprint=examples.fingerprint([name, seq_len, stack, labels, speakers], arrays),
        about=Classes(
            labels=labels,
            tokenizer=None,
            width=rows["train"].flat.shape[1],
            raw=_raw(mels, label, num_originals),
        ),
        notes=(note,) if num_cut else (),
    )


def _raw(
    mels: dict[str, list[np.ndarray]], label: dict[str, np.ndarray], num_originals: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {split: (vectors [N, F], label_N)} for classical baselines.

    They learn from the originals alone, and from as many numbers of each recording.
    """
    raw: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split, of_split in mels.items():
        number = num_originals if split == "train" else len(of_split)
        vectors = [in_pieces(mel) for mel in of_split[:number]]
        raw[split] = np.stack(vectors), label[split][:number]
    return raw


def log_mel(wave: np.ndarray, rate: int, mel_bins: int) -> np.ndarray:
    """Returns log energies in mel bands, float32 [F, M]; F = samples / (rate / 100), rounded."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = rate
    # No dither, which is noise that differs from run to run.
    options.frame_opts.dither = 0.0
    # Frames may reach over the edges, so that the shortest recording has one too.
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = mel_bins
    computer: Any = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(rate, wave)
    computer.input_finished()
    return np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])


def changed_copy(
    recording: Recording, tempo: float, noise: float, random: np.random.Generator
) -> Recording:
    """Returns the recording at another speed (and pitch) and with noise."""
    from scipy.signal import resample

    wave = recording.wave
    # Played at the old rate, fewer samples are faster and higher.
    length = max(1, round(len(wave) / random.uniform(1 - tempo, 1 + tempo)))
    wave = np.asarray(resample(wave, length), np.float32)
    root_mean_square = np.sqrt(np.mean(wave**2))
    level = random.uniform(0, noise) * root_mean_square
    added = level.astype(np.float32) * random.standard_normal(length, np.float32)
    return recording._replace(wave=wave + added)


def stacked(frames_FM: np.ndarray, stack: int) -> np.ndarray:
    """Returns frames [F, M] side by side: [ceil(F / stack), stack M] float32.

    The last place is filled up with zeros, which is the mean of a standardised bin.
    """
    missing = -len(frames_FM) % stack
    filled = np.pad(frames_FM, ((0, missing), (0, 0)))
    return filled.reshape(-1, stack * frames_FM.shape[1]).astype(np.float32)


def in_pieces(frames_FM: np.ndarray) -> np.ndarray:
    """Returns the means of PIECES equal pieces of a recording, [PIECES M], whatever its length.

    A frame that an edge cuts counts in both pieces.
    """
    means = []
    edges = np.linspace(0, len(frames_FM), PIECES + 1)
    for start, end in itertools.pairwise(edges):
        first = int(start)
        # A piece of a very short recording is within one frame.
        last = max(first + 1, int(np.ceil(end)))
        means.append(frames_FM[first:last].mean(0))
    return np.concatenate(means)
