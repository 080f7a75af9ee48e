"""Mutants chosen by hand to be subtle: each breaks one promise. Do the tests of its room notice?

    python benchmarks/faults/mutants.py

    python benchmarks/faults/mutants.py tk- bt-cut      only those whose names begin so

Each is a text of one file and what stands there instead, tried in a copy of the repository (see `trials`). Where the old text
is not there exactly once, that is said: the mutant is to be written anew. The report stands in
``benchmarks/runs/faults/mutants.json``, the table in Markdown on stdout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trials import FOLDER, Change, Trials, copied, note, settle

REPORT = FOLDER / "mutants.json"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    """In ``src/lamina``."""
    old: str
    new: str
    tests: list[str]
    """The files or folders that must notice it."""

    def change(self, tree: Path) -> Change | None:
        """None where the old text is not there exactly once."""
        file = f"src/lamina/{self.file}"
        path = tree / file
        text = path.read_text() if path.exists() else ""
        if text.count(self.old) != 1:
            return None
        first = text[: text.index(self.old)].count("\n") + 1
        lines = range(first, first + self.old.rstrip("\n").count("\n") + 1)
        return Change(file, text.replace(self.old, self.new), lines)


MUTANTS = [
    Mutant(
        "fp-types",
        "network/fingerprint.py",
        'f"{name} {type(module).__qualname__}"',
        'f"{name}"',
        ["tests/network/test_fingerprint.py"],
    ),
    Mutant(
        "fp-dups",
        "network/fingerprint.py",
        "    for name, tensor in tensors:\n        shape =",
        (
            "    tensors = list({id(tensor): (name, tensor) for name, tensor in tensors[::-1]}.values())[::-1]\n"
            "    for name, tensor in tensors:\n"
            "        shape ="
        ),
        ["tests/network/test_fingerprint.py"],
    ),
    Mutant(
        "obs-lastlayout",
        "network/observe.py",
        "self.channels_last = is_channels_last(inputs)",
        "self.channels_last |= is_channels_last(inputs)",
        ["tests/network"],
    ),
    Mutant(
        "obs-5d",
        "network/observe.py",
        "torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)",
        "torch.channels_last)",
        ["tests/network/test_observe.py"],
    ),
    Mutant(
        "obs-sort",
        "network/observe.py",
        "sorted(self.uses.items(), key=lambda item: -item[1])",
        "self.uses.items()",
        ["tests/network"],
    ),
    Mutant(
        "obs-train",
        "network/trial.py",
        "    set_mode(model, training)\n",
        "",
        ["tests/network"],
    ),
    Mutant(
        "obs-tables",
        "network/preserve.py",
        'own, *(own[name] for name in ("_parameters", "_buffers", "_modules") if isinstance(own.get(name), dict))',
        "own",
        ["tests/network"],
    ),
    Mutant(
        "rd-hfcontig",
        "network/readers.py",
        "weight.T.contiguous()",
        "weight.T",
        ["tests/network/test_readers.py", "tests/layers/test_decomposed.py", "tests/layers/test_series.py"],
    ),
    Mutant(
        "rd-biasgrad",
        "network/readers.py",
        'layer._parameters["bias"] = _parameter(bias)',
        'layer._parameters["bias"] = nn.Parameter(bias, requires_grad=weight.requires_grad)',
        ["tests/network/test_readers.py", "tests/layers/test_decomposed.py", "tests/test_decomposition.py"],
    ),
    Mutant(
        "sg-always",
        "network/surgery.py",
        '    "_forward_hooks_always_called",\n',
        "",
        ["tests/network", "tests/layers/test_build.py"],
    ),
    Mutant(
        "sg-prekw",
        "network/surgery.py",
        '    "_forward_pre_hooks_with_kwargs",\n',
        "",
        ["tests/network", "tests/layers/test_build.py"],
    ),
    Mutant(
        "sg-fullbw",
        "network/surgery.py",
        '    "_is_full_backward_hook",\n',
        "",
        ["tests/network", "tests/layers/test_build.py"],
    ),
    Mutant(
        "sg-detach",
        "network/copying.py",
        "t.layout != torch.strided):\n        memo[id(tensor)] = tensor.detach().clone()",
        "t.layout != torch.strided):\n        memo[id(tensor)] = tensor.detach()",
        ["tests/network/test_copying.py", "tests/test_decomposition.py"],
    ),
    Mutant(
        "sg-buffers",
        "network/copying.py",
        "for tensor in (t for module in kept for t in tensors_of(module) if not t.is_leaf",
        "for tensor in (t for module in kept for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf",
        ["tests/network/test_copying.py", "tests/test_decomposition.py"],
    ),
    Mutant(
        "wk-bias",
        "network/walk.py",
        "for tensor in tensors_of(module):",
        'for tensor in (t for t in tensors_of(module) if t is not getattr(module, "bias", None)):',
        ["tests/network"],
    ),
    Mutant(
        "wk-numel",
        "network/memory.py",
        "return Place(tensor.device, start, start + int(reach) * tensor.element_size()) if start and tensor.numel() else None",
        "return None if tensor.is_meta else Place(tensor.device, start, start + max(1, int(reach)) * tensor.element_size())",
        ["tests/network"],
    ),
    Mutant(
        "wk-float",
        "network/walk.py",
        "        if not p.is_floating_point():",
        "        if p.dtype == torch.int8:",
        ["tests/network"],
    ),
    Mutant(
        "bd-phgrad",
        "layers/build.py",
        "[_hankel(p.shape, layer.parameter) for p in _weights_of(module)])\n",
        "[_hankel(p.shape, layer.parameter) for p in _weights_of(module)]).requires_grad_(False)\n",
        ["tests/layers/test_build.py", "tests/test_decomposition.py"],
    ),
    Mutant(
        "bd-phadopt",
        "layers/build.py",
        "    adopt(module, layer.module, plain(layer.geometry))\n    return module\n\n\ndef empty(",
        "    return module\n\n\ndef empty(",
        ["tests/layers/test_build.py", "tests/test_decomposition.py"],
    ),
    Mutant(
        "dc-mergeany",
        "layers/decomposed.py",
        "weight.requires_grad_(any(each.requires_grad",
        "weight.requires_grad_(all(each.requires_grad",
        ["tests/layers/test_decomposed.py", "tests/test_decomposition.py"],
    ),
    Mutant(
        "dc-mergebias",
        "layers/decomposed.py",
        "self.bias.detach().clone().requires_grad_(self.bias.requires_grad)",
        "self.bias.detach().clone().requires_grad_(True)",
        ["tests/layers/test_decomposed.py", "tests/test_decomposition.py"],
    ),
    Mutant(
        "dc-3d",
        "layers/decomposed.py",
        "formats = {4: torch.channels_last, 5: torch.channels_last_3d}",
        "formats = {4: torch.channels_last}",
        ["tests/layers/test_decomposed.py", "tests/layers/test_build.py", "tests/layers/test_series.py"],
    ),
    Mutant(
        "dc-pad",
        "factorize/block_term.py",
        "(0, 0, g * q, (G - 1 - g) * q)",
        "(0, 0, (G - 1 - g) * q, g * q)",
        ["tests/layers/test_decomposed.py", "tests/layers/test_build.py", "tests/test_decomposition.py"],
    ),
    Mutant(
        "fz-like",
        "layers/frozen.py",
        "ctx.like = x.shape, x.stride(), x.dtype",
        "ctx.like = x.shape, torch.empty(x.shape).stride(), x.dtype",
        ["tests/layers/test_frozen.py"],
    ),
    Mutant(
        "fz-param",
        "layers/frozen.py",
        "type(factor.weight) is not nn.Parameter or ",
        "",
        ["tests/layers/test_frozen.py"],
    ),
    Mutant(
        "fz-b64",
        "layers/frozen.py",
        "b if b is None or b.dtype == torch.float64 else b.to(dtype)",
        "b if b is None else b.to(dtype)",
        ["tests/layers/test_frozen.py"],
    ),
    Mutant(
        "rs-exclude",
        "layers/resting.py",
        "        if schedule.concerns(name)\n",
        "",
        ["tests/layers/test_resting.py"],
    ),
    Mutant(
        "sp-gram64",
        "factorize/spectral.py",
        "if M.dtype != torch.float64:",
        "if True:",
        ["tests/factorize/test_spectral.py", "tests/factorize/test_low_rank.py", "tests/factorize/test_tucker.py"],
    ),
    Mutant(
        "sp-norm",
        "factorize/spectral.py",
        "2.0**-60 < largest < 2.0**60",
        "2.0**-120 < largest < 2.0**120",
        ["tests/factorize/test_spectral.py", "tests/factorize/test_low_rank.py", "tests/factorize/test_tucker.py"],
    ),
    Mutant(
        "tk-spread",
        "factorize/spectral.py",
        "norm.clamp_min(float(norm.max()) * 1e-6 + 1e-300).pow(share)",
        "torch.ones_like(norm)",
        ["tests/factorize"],
    ),
    Mutant(
        "tk-order",
        "factorize/tucker.py",
        "            U = _basis(_project(W, 1, V), 0, U.shape[1])\n",
        "",
        ["tests/factorize/test_tucker.py"],
    ),
    Mutant(
        "lr-clamp",
        "factorize/low_rank.py",
        "norm.clamp_min(norm.max() * 1e-12 + 1e-300)",
        "norm.clamp_min(norm.max() * 1e-3 + 1e-300)",
        ["tests/factorize/test_low_rank.py", "tests/layers/test_build.py"],
    ),
    Mutant(
        "bt-merging",
        "factorize/block_term.py",
        "    if fit.reduce is None or fit.expand is None or not groups:",
        "    if True:",
        ["tests/factorize/test_block_term.py"],
    ),
    Mutant(
        "bt-cut",
        "factorize/block_term.py",
        "        if lost > 1 - kept:\n            terms = cut\n",
        "",
        ["tests/factorize/test_block_term.py"],
    ),
    Mutant(
        "bt-other",
        "factorize/block_term.py",
        "        terms, lost = alternate(problem, cut, sweeps, tolerance)\n",
        "        lost = 1.0\n",
        ["tests/factorize/test_block_term.py"],
    ),
    Mutant(
        "ls-rounding",
        "factorize/least_squares.py",
        "DAMPING = 1e-5",
        "DAMPING = 1e-12",
        ["tests/factorize/test_block_term.py"],
    ),
    Mutant(
        "ls-back",
        "factorize/least_squares.py",
        "        if not value <= last and before is not None:\n"
        "            reach /= 2\n"
        "            new, value, lost_now = _sweep(problem, terms, held)\n"
        "        else:",
        "        if False:\n            pass\n        else:",
        ["tests/factorize/test_block_term.py"],
    ),
    Mutant(
        "ls-anchor",
        "factorize/least_squares.py",
        "_Anchor.at(terms, anchor * _lost(problem, terms))",
        "_Anchor.at(terms, anchor)",
        ["tests/factorize/test_block_term.py"],
    ),
    Mutant(
        "de-attrs",
        "network/inplace.py",
        "        vars(weight).update(vars(self.like))\n",
        "",
        ["tests/network/test_inplace.py"],
    ),
    Mutant(
        "de-order",
        "network/inplace.py",
        "key=lambda layer: -layer.geometry.parameters",
        "key=lambda layer: layer.geometry.parameters",
        ["tests/network/test_inplace.py"],
    ),
    Mutant(
        "de-first",
        "decomposition.py",
        "for shape in plan.examples or ()]",
        "for shape in (plan.examples or ())[:1]]",
        ["tests/test_decomposition.py"],
    ),
    Mutant(
        "de-ints",
        "examples.py",
        "values.zero_()",
        "values.fill_(1)",
        ["tests/test_examples.py"],
    ),
    Mutant(
        "de-mergeplan",
        "decomposition.py",
        "    vars(unwrapped(result)).pop(_PLAN, None)\n",
        "",
        ["tests/test_decomposition.py"],
    ),
    Mutant(
        "de-checkdev",
        "decomposition.py",
        "if check and layers:",
        "if check and layers and inplace:",
        ["tests/test_decomposition.py"],
    ),
    Mutant(
        "de-data",
        "examples.py",
        "return values.to(device, dtype)",
        "return values.to(device, None if dtype.is_floating_point else dtype)",
        ["tests/test_examples.py"],
    ),
    Mutant(
        "ar-digest",
        "folder.py",
        'total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())',
        "pass",
        ["tests/test_folder.py"],
    ),
    Mutant(
        "ar-meta",
        "artifact.py",
        "[*inner.named_parameters(), *inner.named_buffers()]",
        "[*inner.named_parameters()]",
        ["tests/test_artifact.py"],
    ),
    Mutant(
        "ar-alias",
        "folder.py",
        '        if key.startswith("alias:") and kept in stored:',
        '        if key.startswith("alias:"):',
        ["tests/test_folder.py", "tests/test_artifact.py"],
    ),
    Mutant(
        "ar-stride",
        "folder.py",
        "tuple(tensor.shape), tensor.stride(), tensor.dtype)",
        "tuple(tensor.shape), tensor.dtype)",
        ["tests/test_folder.py"],
    ),
    Mutant(
        "ar-parents",
        "folder.py",
        "target.mkdir(parents=True, exist_ok=True)",
        "target.mkdir(exist_ok=True)",
        ["tests/test_folder.py"],
    ),
    Mutant(
        "ve-state",
        "verification.py",
        "        copy.load_state_dict(state)\n    _expect_equal(answers(small, examples), answers(copy, examples))\n",
        "        copy.load_state_dict(state)\n",
        ["tests/test_verification.py"],
    ),
    Mutant(
        "ve-files",
        "verification.py",
        "    _expect_equal(answers(small, examples), answers(again, examples))\n",
        "",
        ["tests/test_verification.py"],
    ),
    Mutant(
        "ve-tol",
        "verification.py",
        "return float(coarsest**0.5)",
        "return float(coarsest**0.25)",
        ["tests/test_verification.py"],
    ),
    Mutant(
        "ve-inside",
        "verification.py",
        ' for name in unreached if name.startswith(f"{layer}." if layer else "")}',
        " for name in unreached}",
        ["tests/test_verification.py"],
    ),
    Mutant(
        "fi-unlink",
        "files.py",
        "        temporary.unlink(missing_ok=True)\n",
        "",
        ["tests/test_files.py"],
    ),
    Mutant(
        "fi-mode",
        "files.py",
        "        temporary.chmod(mode)  # last: it may forbid writing, and who wrote there may have made the file anew\n",
        "",
        ["tests/test_files.py"],
    ),
    Mutant(
        "pl-timing",
        "plan/layer.py",
        "timing = self.before.timing if form == Dense() else None",
        "timing = self.after.timing",
        ["tests/test_plan.py"],
    ),
    Mutant(
        "pl-whole",
        "plan/plan.py",
        'self.layers | {name: changed}, "whole": None, ',
        "self.layers | {name: changed}, ",
        ["tests/test_plan.py"],
    ),
    Mutant(
        "pl-diff",
        "plan/plan.py",
        "dict.fromkeys([*self.layers, *other.layers])",
        "dict.fromkeys([*self.layers])",
        ["tests/test_plan.py"],
    ),
    Mutant(
        "fo-exact",
        "forms.py",
        "self.groups == 1 and s >= min(I, O * taps)",
        "s >= min(I, O * taps)",
        ["tests/test_forms.py"],
    ),
    Mutant(
        "mo-wrap",
        "models.py",
        'for key in ("state_dict", "model"):',
        'for key in ("state_dict",):',
        ["tests/test_models.py"],
    ),
    Mutant(
        "mo-eval",
        "models.py",
        "    return model.eval()",
        "    return model",
        ["tests/test_models.py"],
    ),
    Mutant(
        "se-stampver",
        "layers/series.py",
        "(p.data_ptr(), p._version, p.dtype) == rest",
        "(p.data_ptr(), p.dtype) == (rest[0], rest[2])",
        ["tests/layers/test_series.py"],
    ),
    Mutant(
        "se-steps",
        "layers/series.py",
        "and self.steps == _steps().taken",
        "",
        ["tests/layers/test_series.py"],
    ),
    Mutant(
        "ca-worst",
        "calibration/passes.py",
        "known.argmin()",
        "losses.nan_to_num(-math.inf).argmax()",
        ["tests/calibration/test_calibrate.py"],
    ),
    Mutant(
        "ca-heldin",
        "calibration/passes.py",
        "sums.inputs.over_taps(sums.shape.taps) - held.inputs",
        "sums.inputs.over_taps(sums.shape.taps)",
        ["tests/calibration/test_calibrate.py"],
    ),
    Mutant(
        "ca-again",
        "calibration/recorder.py",
        "if self._running and self.largest is None:",
        "if self.largest is None:",
        ["tests/calibration/test_calibrate.py"],
    ),
    Mutant(
        "pa-again",
        "front/pareto.py",
        'options | {"include": inner, "data": planner.calibration}',
        'options | {"include": inner}',
        ["tests/front/test_pareto.py"],
    ),
    Mutant(
        "st-wal",
        "measure/store.py",
        'connection.execute("PRAGMA journal_mode = WAL")',
        "pass",
        ["tests/measure/test_store.py"],
    ),
]


def tried(mutants: list[Mutant], tree: Path) -> dict[str, dict[str, str]]:
    """What came of each mutant, by its name."""
    changes = {mutant.name: mutant.change(tree) for mutant in mutants}
    trials = Trials(tree, "mutants", [test for mutant in mutants if changes[mutant.name] for test in mutant.tests])
    rows = {}
    for mutant in mutants:
        change = changes[mutant.name]
        if change is None:
            found, by = "text gone", ""
        else:
            outcome = trials.of(change, among=tuple(mutant.tests))
            found, by = "killed" if outcome.killed else "survived", outcome.by
        rows[mutant.name] = {"file": mutant.file, "outcome": found, "by": by}
        note(f"{mutant.name}: {found} {by}")
    return rows


def main() -> None:
    settle()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of the names of those that are tried; all without any")
    chosen = parser.parse_args()
    mutants = [m for m in MUTANTS if not chosen.names or m.name.startswith(tuple(chosen.names))]
    with copied() as tree:
        rows = tried(mutants, tree)
    print("| mutant | file | outcome | by |\n| --- | --- | --- | --- |")
    for mutant in mutants:
        found = rows[mutant.name]
        print(f"| {mutant.name} | {found['file']} | {found['outcome']} | {found['by']} |")
    counts = Counter(found["outcome"] for found in rows.values())
    print(f"\nOf {len(mutants)}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    if not chosen.names:
        FOLDER.mkdir(parents=True, exist_ok=True)
        report = {"date": datetime.date.today().isoformat(), "Python": platform.python_version(), **counts, "mutants": rows}
        REPORT.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
