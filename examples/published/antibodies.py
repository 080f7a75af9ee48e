"""A published language model of antibodies, made faster: AntiBERTy, its weights as they come from PyPI, nothing fine-tuned.

    pip install --no-deps antiberty==0.1.3 abstar==0.8.0
    pip install 'lamina[zoo]'
    python examples/published/antibodies.py

AntiBERTy (Ruffolo, Gray and Sulam 2021) fills in masked residues of antibody sequences: a BERT of 26 million parameters. It is
calibrated on mouse sequences, and tested on human ones: germline V genes joined to germline J genes, as the package abstar
carries them. Of each, every seventh residue is masked; counted are the residues that it tells right, and its perplexity.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from packages import folder_of
from torch import Tensor, nn

import lamina

CODONS = dict(zip(
    map("".join, itertools.product("TCAG", repeat=3)),
    "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
    strict=True,
))  # fmt: skip
"""The standard genetic code."""
CHAINS = ("H", "K", "L")
BATCH, EVERY = 16, 7


class Masked(nn.Module):
    """The scores of residues alone, of all that the model tells: ``(B, T, 25)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits


def published() -> tuple[nn.Module, dict[str, int]]:
    """The model with its published weights, and its vocabulary."""
    from transformers import BertConfig, BertForMaskedLM

    folder = folder_of("antiberty") / "trained_models"
    told = json.loads((folder / "AntiBERTy_md_smooth" / "config.json").read_text())
    model = BertForMaskedLM(BertConfig(**{name: told[name] for name in told if name not in ("architectures", "_name_or_path")}))
    state = torch.load(folder / "AntiBERTy_md_smooth" / "pytorch_model.bin", map_location="cpu", weights_only=True)
    wanted = model.state_dict()
    missing = set(wanted) - set(state)
    if missing - {"cls.predictions.decoder.bias"}:
        raise SystemExit(f"antiberty holds other weights than expected: {', '.join(sorted(missing))}")
    model.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
    words = (folder / "vocab.txt").read_text().split()
    return Masked(model.eval()), {word: at for at, word in enumerate(words)}


def read(path: Path) -> dict[str, str]:
    """Sequences of a FASTA file without gaps, by the gene's name."""
    entries = path.read_text().split(">")[1:]
    return {name.split("*")[0]: re.sub(r"[^ACGT]", "", "".join(rest).upper()) for name, *rest in map(str.splitlines, entries)}


def translated(nucleotides: str) -> str:
    return "".join(CODONS[nucleotides[at : at + 3]] for at in range(0, len(nucleotides) - 2, 3))


def sequences(species: str, seed: int, number: int) -> list[str]:
    """Variable domains: V genes in turn, each joined to a J gene that is drawn, in the frame that has no stop."""
    folder = folder_of("abstar") / "germline_dbs" / "bcr" / species / "imgt_gapped"
    v, j = (read(folder / f"{segment}.fasta") for segment in "vj")
    draw, found = random.Random(seed), []
    genes = sorted(name for name in v if len(v[name]) > 270)
    draw.shuffle(genes)
    for gene in genes:
        chain = gene[2]
        joining = sorted(name for name in j if name[2] == chain)
        if chain not in CHAINS or not joining:
            continue
        tail = j[draw.choice(joining)]
        head = v[gene][: len(v[gene]) // 3 * 3]
        whole = next(
            (w for at in range(3) if "*" not in (w := translated(head + tail[at:])) and re.search("[FW]G.G", w[90:])), ""
        )
        if whole and whole not in found:
            found.append(whole)
    return found[:number]


def batches(texts: list[str], vocabulary: dict[str, int], masked: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, the mask of what is no padding, and which positions are to be filled in."""
    found = []
    for start in range(0, len(texts) // BATCH * BATCH, BATCH):
        some = texts[start : start + BATCH]
        length = max(map(len, some)) + 2
        ids = torch.full((BATCH, length), vocabulary["[PAD]"])
        asked = torch.zeros(BATCH, length, dtype=torch.bool)
        for row, text in enumerate(some):
            words = ["[CLS]", *text, "[SEP]"]
            ids[row, : len(words)] = torch.tensor([vocabulary[word] for word in words])
            asked[row, 1 + row % EVERY : len(text) + 1 : EVERY] = masked
        found.append((ids, (ids != vocabulary["[PAD]"]).long(), asked))
    return found


def judged(model: nn.Module, tests: list[tuple[Tensor, Tensor, Tensor]], vocabulary: dict[str, int]) -> tuple[float, float]:
    """The share of masked residues that are told right, and the perplexity of all."""
    right, nats, count = 0, 0.0, 0
    with torch.inference_mode():
        for ids, mask, asked in tests:
            scores = model(ids.masked_fill(asked, vocabulary["[MASK]"]), mask)[asked]
            right += int((scores.argmax(-1) == ids[asked]).sum())
            nats += float(F.cross_entropy(scores, ids[asked], reduction="sum"))
            count += int(asked.sum())
    return right / count, math.exp(nats / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speedup", type=float, action="append", help="by default 1.5 and 2")
    parser.add_argument("--sequences", type=int, default=256, help="to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    model, vocabulary = published()
    tests = batches(sequences("human", 1, 256), vocabulary, masked=True)
    unlabelled = batches(
        sequences("balbc", 0, chosen.sequences) or sequences("macaque", 0, chosen.sequences), vocabulary, False
    )
    example = {"ids": tests[0][0], "mask": tests[0][1]}
    data = [{"ids": ids, "mask": mask} for ids, mask, _ in unlabelled]
    right, perplexity = judged(model, tests, vocabulary)
    print(
        f"original: {right:.1%} of the masked residues of {BATCH * len(tests)} human sequences, perplexity {perplexity:.3f}",
        flush=True,
    )
    calibration = lamina.calibrate(model, data, outputs=lamina.Categorical(dim=-1), mask="mask")
    for wanted in chosen.speedup or [1.5, 2.0]:
        result = lamina.faster(model, example, lamina.Speedup(wanted), data=calibration, seconds=8)
        right, perplexity = judged(result.model, tests, vocabulary)
        print(f"\n{result}\nnow: {right:.1%}, perplexity {perplexity:.3f}", flush=True)


if __name__ == "__main__":
    main()
