"""A published language model of antibodies, made faster: AntiBERTy, its weights as they come from PyPI, nothing fine-tuned.

    pip install --no-deps -r benchmarks/published/requirements.txt
    python benchmarks/published/antibodies.py

AntiBERTy (Ruffolo, Gray and Sulam 2021) fills in masked residues of antibodies: a BERT of 26 million parameters. It learns from
mouse sequences and is judged on human ones: germline V genes joined to germline J genes, as abstar carries them. Of each, every
seventh residue is masked; counted are how many of those it tells, and its perplexity, the exponential of the mean loss of all.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trial import INSTALL, Counts, Figure, Trial, arguments, finish, folder_of, grouped, judged, share

import lamina

CODONS = dict(zip(
    map("".join, itertools.product("TCAG", repeat=3)),
    "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
    strict=True,
))  # fmt: skip
"""The standard genetic code."""
CHAINS = "HKL"
BATCH, EVERY = 16, 7
OUTPUTS = lamina.Categorical(dim=-1)


def perplexity(nats: float, count: float) -> float:
    return np.exp(nats / count)


FIGURES = [
    Figure("residues told", share),
    Figure("perplexity", perplexity, "{:.3f}", "{:+.3f}"),
    Figure("as the original", share, beside=True),
]


class Residues(nn.Module):
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
    if not (folder / "AntiBERTy_md_smooth").is_dir():
        raise SystemExit(f"antiberty carries no weights in this version: {INSTALL}")
    about = json.loads((folder / "AntiBERTy_md_smooth" / "config.json").read_text())
    model = BertForMaskedLM(
        BertConfig(**{name: about[name] for name in about if name not in ("architectures", "_name_or_path")})
    )
    state = torch.load(folder / "AntiBERTy_md_smooth" / "pytorch_model.bin", map_location="cpu", weights_only=True)
    wanted = model.state_dict()
    missing = set(wanted) - set(state) - {"cls.predictions.decoder.bias"}  # tied to cls.predictions.bias
    if missing:
        raise SystemExit(f"antiberty holds other weights than expected: {', '.join(sorted(missing))} missing")
    model.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
    words = (folder / "vocab.txt").read_text().split()
    return Residues(model.eval()), {word: at for at, word in enumerate(words)}


def genes(path: Path) -> dict[str, str]:
    """Nucleotides of a FASTA file without gaps, by the gene's name; of its alleles the first by number."""
    found: dict[str, str] = {}
    entries = (entry.partition("\n") for entry in path.read_text().split(">")[1:])
    for name, _, lines in sorted(entries):
        found.setdefault(name.split("*")[0], re.sub(r"[^ACGT]", "", lines.upper()))
    return found


def translated(nucleotides: str) -> str:
    return "".join(CODONS[nucleotides[at : at + 3]] for at in range(0, len(nucleotides) - 2, 3))


def sequences(species: str, seed: int) -> list[str]:
    """Variable domains, one of each V gene: joined to a J gene of its chain, drawn, in the frame of its [FW]G.G motif."""
    folder = folder_of("abstar") / "germline_dbs" / "bcr" / species / "imgt_gapped"
    v, j = (genes(folder / f"{segment}.fasta") for segment in "vj")
    draw, found = random.Random(seed), []
    for gene in sorted(v):
        joining = sorted(name for name in j if name[2] == gene[2])
        if len(v[gene]) <= 270 or gene[2] not in CHAINS or not joining:
            continue
        head, tail = v[gene][: len(v[gene]) // 3 * 3], j[draw.choice(joining)]
        frames = (translated(head + tail[at:]) for at in range(3))
        whole = next((w for w in frames if "*" not in w and re.search("[FW]G.G", w[90:])), None)
        if whole and whole not in found:
            found.append(whole)
    draw.shuffle(found)
    return found


def batches(texts: list[str], vocabulary: dict[str, int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, the mask of what is no padding, and which positions are to be filled in."""
    found = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        length = max(map(len, some)) + 2
        ids = torch.full((len(some), length), vocabulary["[PAD]"])
        asked = torch.zeros(len(some), length, dtype=torch.bool)
        for row, text in enumerate(some):
            words = ["[CLS]", *text, "[SEP]"]
            ids[row, : len(words)] = torch.tensor([vocabulary[word] for word in words])
            asked[row, 1 + row % EVERY : len(text) + 1 : EVERY] = True
        found.append((ids, (ids != vocabulary["[PAD]"]).long(), asked))
    return found


def answers(model: nn.Module, tests: list[tuple[Tensor, Tensor, Tensor]], hidden: int) -> Tensor:
    """Scores of the masked residues, ``(residues, 25)``."""
    with torch.inference_mode():
        return torch.cat([model(ids.masked_fill(asked, hidden), mask)[asked] for ids, mask, asked in tests])


def count(scores: Tensor, original: Tensor, tests: list[tuple[Tensor, Tensor, Tensor]]) -> Counts:
    residues = torch.cat([ids[asked] for ids, _, asked in tests])
    of = torch.cat([asked.sum(1) for _, _, asked in tests])
    groups, once = torch.arange(len(of)).repeat_interleave(of), torch.ones_like(residues)
    told = scores.argmax(1)
    return {
        "residues told": grouped(groups, told == residues, once),
        "perplexity": grouped(groups, F.cross_entropy(scores, residues, reduction="none"), once),
        "as the original": grouped(groups, told == original.argmax(1), once),
    }


def main() -> None:
    chosen = arguments(__doc__ or "")
    model, vocabulary = published()
    most, size, few = (8, 1, ["*layer.0.*"]) if chosen.quick else (None, BATCH, [])
    heard, human = sequences("balbc", 0)[:most], sequences("human", 1)[:most]
    tests, unlabelled = batches(human, vocabulary), batches(heard, vocabulary)
    hidden = vocabulary["[MASK]"]
    example = {"ids": tests[0][0][:size], "mask": tests[0][1][:size]}
    data = [{"ids": ids, "mask": mask} for ids, mask, _ in unlabelled]
    calibrated = functools.partial(lamina.calibrate, data=data, outputs=OUTPUTS, mask="mask", include=few)
    tell, own = functools.partial(answers, tests=tests, hidden=hidden), functools.partial(count, tests=tests)
    trial = Trial("AntiBERTy", model, example, calibrated, tell, own, OUTPUTS, few)
    body = judged("antibodies", [trial], FIGURES, chosen)
    masked = sum(int(asked.sum()) for _, _, asked in tests)
    text = (
        f"{masked:,} masked residues of {len(human)} human sequences; learnt from {len(heard)} of the mouse (BALB/c), nothing "
        f"masked, without labels. A group is a sequence. Guessing evenly among 20 residues has a perplexity of 20."
    )
    finish("antibodies", "A published language model of antibodies", text, body, chosen)


if __name__ == "__main__":
    main()
