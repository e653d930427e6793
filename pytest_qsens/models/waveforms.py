"""Short synthetic sounds: the default input of speech models.

Written as 16-bit integers, so that every machine produces the same samples whatever its math library rounds to.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

FULL_SCALE = 32768


@dataclass(frozen=True)
class Waveform:
    """A chirp with overtones under a slow envelope, and what to transcribe it as.

    ``start`` and ``stop`` are the fundamental's first and last frequency in Hz, ``rate`` the envelope's in Hz.
    """

    text: str
    start: float
    stop: float
    rate: float
    seconds: float = 1.0

    def samples(self, sampling_rate: int) -> array[int]:
        """Return ``seconds * sampling_rate`` signed 16-bit samples."""
        count = int(self.seconds * sampling_rate)
        values = array("h")
        for index in range(count):
            t = index / sampling_rate
            phase = 2 * math.pi * (self.start * t + (self.stop - self.start) * t * t / (2 * self.seconds))
            tone = 0.6 * math.sin(phase) + 0.25 * math.sin(2 * phase) + 0.15 * math.sin(5 * phase)
            envelope = 0.5 - 0.5 * math.cos(2 * math.pi * self.rate * t)
            values.append(round(0.7 * FULL_SCALE * tone * envelope))
        return values


CALIBRATION = (
    Waveform("good morning everyone", 110, 240, 3),
    Waveform("the number is forty two", 300, 180, 4),
    Waveform("turn left at the corner", 160, 160, 2),
    Waveform("it rained all week", 90, 400, 5),
)
"""The sounds observers see."""

EVALUATION = (
    Waveform("please call me back", 210, 130, 3.5),
    Waveform("seven apples and a pear", 130, 330, 2.5),
)
"""The sounds scores are measured on."""
