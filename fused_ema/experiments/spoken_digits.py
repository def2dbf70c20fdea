"""Strings of spoken digits, from the Free Spoken Digit Dataset as log-mel features at 8 bits.

``python -m fused_ema.experiments.spoken_digits ARCHIVE OUT`` makes the file of features from the
data set's archive. A string is some recordings of one speaker, one after the other. It is
identified by a token of the epoch and by its index, and so are its random numbers.
"""

from __future__ import annotations

import math
import re
import sys
import tarfile
import wave
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .data import Key, Views

FEATURES = Path(__file__).parents[2] / "data" / "spoken-digits" / "features.npz"
RATE, WINDOW, HOP, MELS = 8000, 256, 100, 32
# The quietest and loudest log-mel value that 8 bits hold.
QUIET, LOUD = -12.0, 6.0
SPEAKERS, DIGITS, TEST_RECORDINGS = 6, 10, 5
NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav$")


def mel_filters(rate: int, window: int, mels: int) -> Tensor:
    """Triangular filters ``[mels, window//2 + 1]``, equally spaced on the mel scale."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    marks = torch.linspace(mel(20.0), mel(rate / 2), mels + 2, dtype=torch.float64)
    hertz = 700.0 * (10.0 ** (marks / 2595.0) - 1.0)
    bins = torch.linspace(0.0, rate / 2, window // 2 + 1, dtype=torch.float64)
    low, middle, high = (hertz[k : k + mels, None] for k in range(3))
    up, down = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return torch.minimum(up, down).clamp(min=0.0).float()


def log_mels(sound: Tensor, rate: int, window: int, hop: int, mels: int) -> Tensor:
    """Logarithmic mel spectrum ``[frames, mels]`` of samples in ``[-1, 1]``."""
    spectrum = torch.stft(sound, window, hop, window=torch.hann_window(window), return_complex=True)
    return (mel_filters(rate, window, mels) @ spectrum.abs().square()).clamp(min=1e-6).log().T


def build(archive: Path, out: Path) -> None:
    """Write the features of all recordings in the archive, sorted by speaker, digit and index."""
    import numpy as np

    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            match = NAME.search(member.name)
            file = tar.extractfile(member) if match else None
            if match and file is not None:
                with wave.open(file) as recording:
                    pcm = recording.readframes(recording.getnframes())
                digit, speaker, index = match.groups()
                found[speaker, int(digit), int(index)] = torch.frombuffer(
                    bytearray(pcm), dtype=torch.int16
                )
    features, about = [], []
    speakers = sorted({speaker for speaker, _, _ in found})
    for speaker, digit, index in sorted(found):
        sound = found[speaker, digit, index] / 32768.0
        mels = (log_mels(sound, RATE, WINDOW, HOP, MELS) - QUIET) / (LOUD - QUIET)
        features.append((255 * mels).round().clamp(0, 255).byte())
        about.append((speakers.index(speaker), digit, index, len(features[-1])))
    table = np.array(about, dtype=np.int32)
    np.savez_compressed(out, frames=torch.cat(features).numpy(), recordings=table)


class Recordings(NamedTuple):
    """Frames of all recordings, normalised, and where each recording lies.

    Attributes:
        frames: ``[total, mels]``.
        starts: first frame ``[speakers, digits, recordings]``.
        lengths: number of frames, in the same shape.
    """

    frames: Tensor
    starts: Tensor
    lengths: Tensor


@lru_cache(maxsize=1)
def recordings(path: Path = FEATURES) -> Recordings:
    """Read the file of features.

    Raises:
        ValueError: there is none, as in an installed wheel.
    """
    import numpy as np

    if not path.is_file():
        raise ValueError(
            f"data=spoken-digits: {path} is missing; it is in the repository, not in the wheel"
        )
    with np.load(path) as file:
        frames, table = torch.tensor(file["frames"]), torch.tensor(file["recordings"]).long()
    frames = frames.float()
    frames = (frames - frames.mean(0)) / frames.std(0)
    shape = SPEAKERS, DIGITS, -1
    lengths = table[:, 3].view(shape)
    return Recordings(frames, (table[:, 3].cumsum(0) - table[:, 3]).view(shape), lengths)


class Strings:
    """Strings of digits: features as they are and masked, lengths, and digits.

    Args:
        found: the recordings.
        size: number of strings.
        pools: for each string of an item, the recordings from which it is drawn: first and end.
        masked: mask bands and spans of the first features, as SpecAugment does.
    """

    def __init__(
        self, found: Recordings, size: int, pools: Sequence[tuple[int, int]], masked: bool
    ) -> None:
        self.found, self.size, self.pools, self.masked = found, size, pools, masked
        self.plans = lru_cache(maxsize=2)(self._plans)

    def __len__(self) -> int:
        return self.size

    def _plans(self, token: int) -> list[dict[str, Tensor]]:
        """Random choices for all strings of an epoch, for each pool."""
        generator = torch.Generator().manual_seed(token)
        result = []
        for first, end in self.pools:
            draw = partial(self._draw, generator)
            result.append(
                {
                    "count": draw(2, 6),
                    "speaker": draw(0, SPEAKERS),
                    "digits": draw(0, DIGITS, 5),
                    "picks": draw(first, end, 5),
                    "masks": torch.rand(self.size, 4, 2, generator=generator),
                }
            )
        return result

    def _draw(self, generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (self.size, *shape), generator=generator)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Views, Tensor]:
        """For each pool: masked features, features, lengths; and the first pool's digits + 1."""
        views: list[Tensor] = []
        for number, plan in enumerate(self.plans(keys[0][0])):
            strings = [self._string(plan, index) for _, index in keys]
            lengths = torch.tensor([len(string) for string in strings])
            clean = pad_sequence(strings, batch_first=True)
            masks = plan["masks"][[index for _, index in keys]]
            views += [masks_of(clean, lengths, masks) if self.masked else clean, clean, lengths]
            if number == 0:
                rows = [index for _, index in keys]
                digits = plan["digits"][rows] + 1
                places = torch.arange(digits.shape[1])
                targets = torch.where(places < plan["count"][rows, None], digits, 0)
        return tuple(views), targets

    def _string(self, plan: dict[str, Tensor], index: int) -> Tensor:
        count, speaker = int(plan["count"][index]), int(plan["speaker"][index])
        parts = []
        for digit, pick in zip(
            plan["digits"][index, :count].tolist(), plan["picks"][index].tolist(), strict=False
        ):
            start = int(self.found.starts[speaker, digit, pick])
            parts.append(
                self.found.frames[start : start + int(self.found.lengths[speaker, digit, pick])]
            )
        return torch.cat(parts)


def masks_of(clean: Tensor, lengths: Tensor, chances: Tensor) -> Tensor:
    """Features with two bands of mels and two spans of frames set to their mean, 0.

    Args:
        clean: ``[n, frames, mels]``.
        lengths: number of frames of each string.
        chances: ``[n, 4, 2]`` in ``[0, 1]``: width and place of each mask.
    """
    frames, mels = (torch.arange(size) for size in clean.shape[1:])
    keep = torch.ones_like(clean, dtype=torch.bool)
    for k in range(2):
        width = (chances[:, k, :1] * mels.numel() / 5).floor()
        first = (chances[:, k, 1:] * (mels.numel() - width)).floor()
        keep &= ~((mels >= first) & (mels < first + width))[:, None, :]
        width = (chances[:, k + 2, :1] * lengths[:, None] / 6).floor()
        first = (chances[:, k + 2, 1:] * (lengths[:, None] - width)).floor()
        keep &= ~((frames >= first) & (frames < first + width))[:, :, None]
    return clean * keep


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    build(source, target)
