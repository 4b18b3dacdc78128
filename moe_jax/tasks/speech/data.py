"""Spoken digits as log-mel frames: the Free Spoken Digit Dataset (FSDD), 8 kHz, six speakers.

Its own rule: recordings 0 to 4 of each digit and speaker are the test part, all others are for
training. Frames are computed by kaldi-native-fbank (25 ms every 10 ms); `stack` of them side by
side are one place of a row. Shapes: N recordings, F frames, M mel bins, S places, P = stack M.
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
from moe_jax.data.examples import Classes, Examples, Fields
from moe_jax.data.records import folder as files
from moe_jax.errors import UserError

KIND = "speech"
NAME = re.compile(r"(\d)_(\w+)_(\d+)\.wav")  # digit, speaker, index
TESTED = 5  # indices below it are the test part
PIECES = 8  # of a recording of any length, whose means are what a classical baseline sees


class Recording(NamedTuple):
    wave: np.ndarray  # float32, in units of a 16-bit sample
    rate: int  # Hz
    label: str
    speaker: str
    heldout: bool


def read_fsdd(folder: str) -> list[Recording]:
    """The recordings of fsdd_900.tar.gz, or of a folder `recordings` of wav files, in the order of
    their names.
    """
    try:
        path = files.find(folder, KIND, "recordings", "fsdd")
    except UserError:
        path = files.find(folder, KIND, "fsdd_900.tar.gz", "fsdd")
    found = _files(path)
    recordings = [_recording(name, found[name]) for name in sorted(found) if NAME.fullmatch(name)]
    if {recording.heldout for recording in recordings} != {True, False}:
        raise UserError(
            f"{path} has no recordings DIGIT_SPEAKER_INDEX.wav with indices below {TESTED} and "
            "above"
        )
    return recordings


def _files(path: pathlib.Path) -> dict[str, bytes]:
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.glob("*.wav")}
    try:
        with tarfile.open(path) as archive:
            opened = {
                member.name.rpartition("/")[2]: archive.extractfile(member) for member in archive
            }
            return {name: file.read() for name, file in opened.items() if file is not None}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read, it may be damaged: {error}") from None


def _recording(name: str, data: bytes) -> Recording:
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
    found = DATASETS[name](folder)
    random = np.random.default_rng((seed, 2))
    parts = {
        "train": [r for r in found if not r.heldout],
        "heldout": [r for r in found if r.heldout],
    }
    changed = [
        changed_copy(r, tempo, noise, random) for _ in range(copies - 1) for r in parts["train"]
    ]
    whole = {"train": [*parts["train"], *changed], "heldout": parts["heldout"]}
    mels = {
        split: [log_mel(r.wave, r.rate, mel_bins) for r in some] for split, some in whole.items()
    }
    frames = np.concatenate(mels["train"])
    mean_M, std_M = frames.mean(0), frames.std(0) + 1e-3
    mels = {split: [(mel - mean_M) / std_M for mel in some] for split, some in mels.items()}
    cut = sum(len(mel) > seq_len * stack for mel in mels["train"][: len(parts["train"])])
    return _rows(name, whole, mels, len(parts["train"]), seq_len, stack, cut)


def _rows(
    name: str,
    parts: dict[str, list[Recording]],
    mels: dict[str, list[np.ndarray]],
    originals: int,
    seq_len: int,
    stack: int,
    cut: int,
) -> Examples:
    every = [recording for part in parts.values() for recording in part]
    labels = tuple(sorted({r.label for r in every}))
    speakers = tuple(sorted({r.speaker for r in every}))
    rows = {
        split: examples.ragged([stacked(mel, stack) for mel in some])
        for split, some in mels.items()
    }
    label = {
        split: np.array([labels.index(r.label) for r in part], np.int32)
        for split, part in parts.items()
    }
    domain = {
        split: np.array([speakers.index(r.speaker) for r in part], np.int32)
        for split, part in parts.items()
    }

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        values_BSP, there_BS = examples.padded(rows[split], index_B, seq_len)
        known = examples.labelled(label[split][index_B], domain[split][index_B])
        return {"values_BSP": values_BSP, **examples.one_segment(there_BS), **known}

    first = {"train": originals, "heldout": len(parts["heldout"])}
    raw = {
        s: (np.stack([in_pieces(mel) for mel in mels[s][:n]]), label[s][:n])
        for s, n in first.items()
    }
    arrays = [a for split in parts for a in (*rows[split], label[split], domain[split])]
    return Examples(
        spec=name,
        batch_type=examples.LabelledVectors,
        seq_len=seq_len,
        domains=speakers,
        rows={split: len(part) for split, part in parts.items()},
        fetch=fetch,
        heldout_domain_R=domain["heldout"],
        fingerprint=examples.fingerprint([name, seq_len, stack, labels, speakers], arrays),
        about=Classes(labels, None, rows["train"].flat.shape[1], raw),
        notes=(f"{cut} of {originals} training recordings are cut to {seq_len * stack} frames",)
        if cut
        else (),
    )


def log_mel(wave: np.ndarray, rate: int, mel_bins: int) -> np.ndarray:
    """Returns log energies in mel bands, float32 [F, M]; F = samples / (rate / 100), rounded."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0.0  # noise that differs from run to run
    options.frame_opts.snip_edges = False  # the shortest recording has a frame too
    options.mel_opts.num_bins = mel_bins
    computer: Any = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(rate, wave)
    computer.input_finished()
    return np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])


def changed_copy(
    recording: Recording, tempo: float, noise: float, random: np.random.Generator
) -> Recording:
    """The recording at another speed (and pitch) and with noise."""
    from scipy.signal import resample

    wave = recording.wave
    length = max(1, round(len(wave) / random.uniform(1 - tempo, 1 + tempo)))
    wave = np.asarray(resample(wave, length), np.float32)
    level = random.uniform(0, noise) * np.sqrt(np.mean(wave**2))
    return recording._replace(
        wave=wave + level.astype(np.float32) * random.standard_normal(length, np.float32)
    )


def stacked(frames_FM: np.ndarray, stack: int) -> np.ndarray:
    """[F, M] -> [ceil(F / stack), stack M]; the last place is filled up with zeros, the mean."""
    missing = -len(frames_FM) % stack
    return (
        np.pad(frames_FM, ((0, missing), (0, 0)))
        .reshape(-1, stack * frames_FM.shape[1])
        .astype(np.float32)
    )


def in_pieces(frames_FM: np.ndarray) -> np.ndarray:
    """[PIECES M]: the means of PIECES equal pieces of a recording, whatever its length."""
    place = np.linspace(0, len(frames_FM), PIECES + 1)
    spans = [(int(a), max(int(a) + 1, int(np.ceil(b)))) for a, b in itertools.pairwise(place)]
    return np.concatenate([frames_FM[a:b].mean(0) for a, b in spans])
