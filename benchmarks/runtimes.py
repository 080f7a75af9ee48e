"""What a decomposition gains where networks are served: ranks chosen there, int8 on top, and exports that answer alike.

    python benchmarks/runtimes.py resnet50 --publish
    python benchmarks/runtimes.py vit --publish
    python benchmarks/runtimes.py demo --publish
    python benchmarks/runtimes.py parity --publish

``resnet50``: 8×3×160×160, fresh weights: for each runtime the dense network, the one whose ranks were chosen at ratio 2 by
eager times, and the one whose ranks were chosen by the runtime's own; the time that choosing took, and what it foretold of the
whole. ``vit``: ViT-B/16, likewise; both at another ratio with ``--ratio``. ``demo``: the demo's trained network calibrated on
512 unlabelled images, in float32, bfloat16 and int8, dense and decomposed: times over dense eager, and accuracy on the 10,000
test images. ``parity``: how far exported outputs lie from eager PyTorch's, over networks of ``zoo.py``, dense and at ratio 2,
each in a process of its own with a limit of time.

``--runtime`` takes one alone. Ranks for `torch.compile` are chosen by eager times; with ``--compile-ranks`` by its own as well,
for which every form is compiled. ``--neighbours none`` times layers alone in a runtime, where they stand between two others by
default. All runs of a row are interleaved. Rows are kept in ``benchmarks/runs/runtimes``, in a file for each machine, setting
and revision, and it goes on where it was stopped; a row that failed is tried again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import conditions, foretold, options, publish, table
from torch import Tensor, nn
from zoo import apart, networks

import lamina
from lamina.answers import answers
from lamina.answers import apart as difference
from lamina.comparison import ready, whole_setting
from lamina.errors import LaminaError
from lamina.layers.decomposed import DecomposedLayer
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval
from lamina.measure.table import TimingTable
from lamina.runtimes import onnxruntime, openvino
from lamina.runtimes.graphs import layer_bytes
from lamina.runtimes.runtime import Prepared, Runtime, versions_of
from lamina.values import Inference, Workload, workloads

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
KEPT = Path(__file__).parent / "runs" / "runtimes"
Make = Callable[[], tuple[nn.Module, Tensor]]
DEMO_GOALS = (None, 2.0, 3.0, 4.0)


def resnet50_made() -> tuple[nn.Module, Tensor]:
    import torchvision

    return torchvision.models.resnet50(weights=None).eval(), torch.randn(8, 3, 160, 160)


def vit_made() -> tuple[nn.Module, Tensor]:
    import timm

    return timm.create_model("vit_base_patch16_224", pretrained=False).eval(), torch.randn(4, 3, 224, 224)


def in_runtimes(x: Tensor, chosen: argparse.Namespace) -> dict[str, Served]:
    """Those that are asked for and run here; int8 by random inputs, as the weights are random too."""
    images = [torch.randn_like(x) for _ in range(2)]
    eager = lamina.Eager()
    found = {
        "eager": in_runtime(eager),
        "folded": in_runtime(lamina.Eager(folded=True)),
        "eager-bfloat16": in_bfloat16(),
        "compile": in_runtime(lamina.Compiled(), eager),
        "onnxruntime": in_runtime(lamina.OnnxRuntime()),
        "openvino": in_runtime(lamina.OpenVINO()),
        "openvino-default": in_runtime(lamina.OpenVINO("default")),
        "openvino-bfloat16": in_runtime(lamina.OpenVINO("bfloat16")),
        "onnxruntime-int8": in_runtime(lamina.OnnxRuntime(int8=images)),
        "openvino-int8": in_runtime(lamina.OpenVINO(int8=images)),
    }
    if chosen.compile_ranks:
        found["compile-ranks"] = in_runtime(lamina.Compiled())
    return {name: found[name] for name in asked_for(found, chosen) if runs_here(name, found[name].chosen_by)}


def asked_for(found: Iterable[str], chosen: argparse.Namespace) -> list[str]:
    """The names that ``--runtime`` gives, by default all; ends the program where there is no such one."""
    names = list(found)
    if unknown := [name for name in chosen.runtime or () if name not in names]:
        there = f"there are {'; '.join(names)}" if names else f"{chosen.part} runs in all of its own: leave --runtime out"
        raise SystemExit(f"--runtime: no {', '.join(unknown)}; {there}")
    return [name for name in names if name in (chosen.runtime or names)]


def runs_here(name: str, runtime: Runtime) -> bool:
    """Whether a runtime runs a small layer; where not, as in bfloat16 on a processor without it, a line says why."""
    try:
        runtime.prepare_layer(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    except LaminaError as error:
        print(f"{name} is left out: {error}", flush=True)
        return False
    if isinstance(runtime, lamina.OpenVINO) and (runtime.precision, runtime.computes) == ("default", "float32"):
        print(f"{name} is left out: it is OpenVINO in float32 on this processor", flush=True)
        return False
    return True


def why(error: Exception) -> str:
    """An error as it stands in a table: its first line, or as much of it."""
    told = str(error).strip().partition("\n")[0] or type(error).__name__
    return told.replace("|", "/")[:160]


FORETOLD = "foretold / measured"
GAINS = (
    "runtime", "dense, × dense eager", "ranks by eager times, gain inside", "ranks by its own times, gain inside",
    "the same, × dense eager", "own against eager's ranks", FORETOLD, "choosing, cold", "layers",
    "MACs, by eager's ranks", "MACs, by its own",
)  # fmt: skip


def gains(name: str, make: Make, chosen: argparse.Namespace) -> str:
    """The table of one network, a row a runtime; each row is kept as soon as it stands."""
    torch.manual_seed(0)
    model, x = make()
    ways = in_runtimes(x, chosen)
    rows = Rows(f"{name}{at_ratio(chosen)}", model, x, chosen)
    with TimingTable(None) as timings:
        eager_plan: lamina.Plan | None = None
        for label, way in ways.items():
            if label in rows.found:
                continue
            if eager_plan is None:
                eager_plan = lamina.make_plan(model, x, lamina.Ratio(chosen.ratio), timings=timings)
            try:
                rows.keep([label, *gained(model, x, way, eager_plan, timings, chosen)])
            except Exception as error:  # a compiler may raise anything
                rows.failed(label, len(GAINS), error)
    return rows.page(GAINS, rows.found)


def at_ratio(chosen: argparse.Namespace) -> str:
    """What follows a part's name where its ratio is not 2."""
    return "" if chosen.ratio == 2 else f"-ratio-{chosen.ratio:g}"


def gained(
    model: nn.Module, x: Tensor, way: Served, eager_plan: lamina.Plan, timings: TimingTable, chosen: argparse.Namespace
) -> list[str]:
    began = time.perf_counter()
    own_plan = eager_plan
    if way.own:
        own_plan = lamina.make_plan(model, x, lamina.Ratio(chosen.ratio), timings=timings, runtime=way.chosen_by)
    took = time.perf_counter() - began
    by_eager, by_own = (lamina.decompose(model, plan, check=False).eval() for plan in (eager_plan, own_plan))
    with ready([model, by_eager, by_own], Inference()):
        runs = [lamina.Eager().prepare(model, Workload(x)).run]
        runs += [way.ready(each, x).run for each in (model, by_eager, by_own)]
        eager, dense, first, second = interleave(runs, x.device, Effort(4 * chosen.seconds, 7, 60, precision=0))

    def told(a: list[float], b: list[float]) -> str:
        low, high = ratio_interval(a, b)
        return f"×{ratio(a, b):.2f} ({low:.2f} to {high:.2f})"

    before, eagers, own = (lamina.count(each, x).macs for each in (model, by_eager, by_own))
    return [
        told(eager, dense), told(dense, first), told(dense, second) if way.own else "not chosen",
        told(eager, second), told(first, second) if way.own else "", foretold(own_plan) if way.own else "",
        f"{took:.0f} s" if way.own else "", f"{len(own_plan.decomposed)} of {len(own_plan.layers)}",
        f"÷{before / eagers:.2f}", f"÷{before / own:.2f}" if way.own else "",
    ]  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A way to serve a network.

    Attributes:
        chosen_by: By whose times its ranks are chosen.
        ready: How it is made ready for a batch.
        own: Whether what serves it is what chose.
    """

    chosen_by: Runtime
    ready: Callable[[nn.Module, Tensor], Prepared]
    own: bool = False


def in_runtime(runtime: Runtime, chosen_by: Runtime | None = None) -> Served:
    return Served(chosen_by or runtime, lambda model, x: runtime.prepare(model, Workload(x)), own=chosen_by is None)


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


class Bfloat16(nn.Module):
    """Weights in bfloat16; the batch is cast to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).bfloat16()

    def forward(self, x: Tensor) -> Any:
        return self.model(x.bfloat16()).float()


def in_bfloat16() -> Served:
    return Served(lamina.Eager(), lambda model, x: lamina.Eager().prepare(Bfloat16(model), Workload(x)))


def in_inductor_int8(data: list[Tensor]) -> Served:
    """Static int8 by PyTorch's own quantiser (PT2E), compiled by Inductor."""

    def made(model: nn.Module, x: Tensor) -> Prepared:
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        plain = lamina.plain(model) if any(isinstance(layer, DecomposedLayer) for layer in model.modules()) else model
        prepared = prepare_pt2e(torch.export.export(plain, (x,)).module(), quantizer)
        for batch in data:
            prepared(batch)
        return lamina.Compiled().prepare(convert_pt2e(prepared), Workload(x))

    return Served(lamina.Eager(), made)


def ways(data: list[Tensor]) -> dict[str, Served]:
    eager = lamina.Eager()
    return {
        "eager": in_runtime(eager),
        "eager, norms folded": in_runtime(lamina.Eager(folded=True)),
        "torch.compile, ranks by eager times": in_runtime(lamina.Compiled(), eager),
        "eager, bfloat16 weights": in_bfloat16(),
        "eager, autocast to bfloat16": Served(eager, lambda model, x: eager.prepare(Autocast(model), Workload(x))),
        "torch.compile int8 (PT2E), ranks by eager times": in_inductor_int8(data),
        "ONNX Runtime": in_runtime(lamina.OnnxRuntime()),
        "ONNX Runtime int8": in_runtime(lamina.OnnxRuntime(int8=data)),
        "OpenVINO": in_runtime(lamina.OpenVINO()),
        "OpenVINO, its default": in_runtime(lamina.OpenVINO("default")),
        "OpenVINO bfloat16": in_runtime(lamina.OpenVINO("bfloat16")),
        "OpenVINO int8": in_runtime(lamina.OpenVINO(int8=data)),
    }


DEMO = ("runtime", "speed-up asked of it", "over dense eager", "gain inside", "accuracy", FORETOLD)


def demo(chosen: argparse.Namespace) -> str:
    """The demo's network in float32, bfloat16 and int8, dense and decomposed: time over dense eager, and accuracy."""
    from demo import base_network
    from fashion import test_images, tuning_images

    data = list(tuning_images().images[:512].split(32))
    served_by = ways(data)
    names = asked_for(served_by, chosen)
    model, test = base_network().eval(), test_images()
    x = test.images[:32]
    rows = Rows("demo", model, x, chosen)
    found = lamina.calibrate(model, data, outputs=lamina.Categorical())

    def accuracy(run: Callable[[Tensor], Tensor]) -> float:
        right = [int((run(a).argmax(1) == b).sum()) for a, b in zip(test.images.split(32), test.labels.split(32), strict=True)]
        return sum(right) / 1e4

    def tried(key: str, label: str, wanted: float | None) -> list[str]:
        way, small, told = served_by[label], model, ""
        if wanted:
            plan = lamina.make_plan(model, x, lamina.Speedup(wanted), data=found, timings=timings, runtime=way.chosen_by)
            small, told = lamina.decompose(model, plan, found), foretold(plan) if way.own else ""
        with ready([model, small], Inference()):
            runs = [lamina.Eager().prepare(model, Workload(x)).run, way.ready(model, x).run, way.ready(small, x).run]
            eager_s, dense_s, small_s = interleave(runs, x.device, Effort(chosen.seconds, 7, 200, precision=0))
            kept = accuracy(served(way, small, x))
        low, high = ratio_interval(eager_s, small_s)
        inside = f"×{ratio(dense_s, small_s):.2f}" if wanted else ""
        over = f"**×{ratio(eager_s, small_s):.2f}** ({low:.2f} to {high:.2f})"
        return [key, label, f"×{wanted:g}" if wanted else "dense", over, inside, f"{kept:.2%}", told]

    keys = [(f"{label} ×{wanted:g}" if wanted else label, label, wanted) for label in served_by for wanted in DEMO_GOALS]
    here = {label for label in names if runs_here(label, served_by[label].chosen_by)}
    with TimingTable(None) as timings:
        for key, label, wanted in keys:
            if label not in here or key in rows.found:
                continue
            try:
                rows.keep(tried(key, label, wanted))
            except Exception as error:  # a compiler may raise anything
                rows.failed(key, 1 + len(DEMO), error, [label, f"×{wanted:g}" if wanted else "dense"])
                if wanted is None:  # nor will the others run
                    here.remove(label)
    return rows.page(DEMO, {key: rows.found[key][1:] for key, _, _ in keys if key in rows.found})


def served(way: Served, model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A network as it is served, batch by batch: the example's memory is what is read in each run."""
    fed = x.clone()
    prepared = way.ready(model, fed)

    def run(batch: Tensor) -> Tensor:
        fed[: len(batch)] = batch
        return prepared.answers()[0][: len(batch)]

    return run


class Rows:
    """The rows of one part, by their first entries, and where those that stand are kept.

    The file is that of the machine, the setting, the versions and the revision: what was measured under others is not mixed in.
    """

    def __init__(self, part: str, model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> None:
        self.setting = whole_setting(model, Workload(x), Inference())
        self.around = [f"versions: {versions_of(*PACKAGES)}", f"revision {revision()}"]
        self.around += [f"layers timed with neighbours: {chosen.neighbours}"] if chosen.neighbours else []
        key = hashlib.sha256("; ".join([str(self.setting), *self.around]).encode()).hexdigest()[:12]
        self.path = KEPT / f"{part}-{key}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else ()
        self.found: dict[str, list[Any]] = {row[0]: row for row in map(json.loads, lines)}

    def keep(self, row: list[Any]) -> None:
        print(row, flush=True)
        self.found[row[0]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def failed(self, key: str, width: int, error: Exception, named: Sequence[str] = ()) -> None:
        """A row that says why there are no numbers; it is not kept."""
        cells = [key, *named, f"failed: {why(error)}"]
        self.found[key] = cells + [""] * (width - len(cells))
        print(self.found[key], flush=True)

    def page(self, head: Sequence[str], lines: dict[str, list[str]]) -> str:
        """The table, how many whole times were foretold within a tenth, and the conditions."""
        at = head.index(FORETOLD)
        told = {key: float(line[at]) for key, line in lines.items() if line[at]}
        off = [f"{key} {value:.2f}" for key, value in told.items() if abs(value - 1) > 0.1]
        near = f"Whole times foretold within 10 % of the measured ones: {len(told) - len(off)} of {len(told)}"
        near += f"; others: {', '.join(off)}." if off else "."
        return "\n\n".join([table(list(head), list(lines.values())), near, self.conditions])

    @property
    def conditions(self) -> str:
        return f"{conditions(self.setting)} {'; '.join(self.around)}."


PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "torchao", "torchvision", "timm", "transformers")


def revision() -> str:
    """The last commit that changed what is measured or what measures."""
    here = Path(__file__).resolve().parent
    command = ["git", "log", "-1", "--format=%h", "--", "../src", "."]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def layers_alone() -> None:
    """Time layers without neighbours in ONNX Runtime and OpenVINO."""
    for room in (onnxruntime, openvino):
        room.layer_bytes = lambda *args, **options: layer_bytes(*args, **{**options, "neighbours": False})
        room.neighbours_bytes = lambda *args, **options: None


PARITY = 1e-4
SMALL = (
    "torchvision alexnet", "torchvision resnet18", "torchvision resnet50", "torchvision resnext50_32x4d",
    "torchvision densenet121", "torchvision squeezenet1_1", "torchvision mobilenet_v2", "torchvision mobilenet_v3_small",
    "torchvision mnasnet0_5", "torchvision shufflenet_v2_x1_0", "torchvision efficientnet_b0", "torchvision regnet_y_400mf",
    "torchvision googlenet", "torchvision vgg11_bn", "torchvision convnext_tiny", "torchvision swin_t", "torchvision vit_b_32",
    "torchvision r3d_18", "torchvision lraspp_mobilenet_v3_large", "timm byobnet", "timm deit", "timm mlp_mixer",
    "timm ghostnet", "timm resnet", "timm convmixer", "timm levit", "timm mobilevit",
)  # fmt: skip
"""Of the many networks of torchvision and timm those that are small, of all their kinds; of torch and transformers all are."""


def parity(chosen: argparse.Namespace) -> str:
    """How far exported outputs lie from eager PyTorch's, relative to their size: the largest of a network's outputs."""
    asked_for((), chosen)
    rows = Rows("parity", nn.Linear(4, 4), torch.randn(1, 4), chosen)
    names = [name for name in networks() if name.startswith(("torch ", "transformers ")) or name in SMALL]
    for name in names:
        if name not in rows.found:
            rows.keep([name, apart(__file__, ["parity", "--network", name, "--threads", str(chosen.threads)], chosen.limit)])
    lines = [parity_row(name, rows.found[name][1]) for name in names]
    good = [name for name in names if exact(rows.found[name][1])]
    others = [f"{name} ({complaint(rows.found[name][1])})" for name in names if name not in good]
    said = f"{len(good)} of {len(names)} within {PARITY:g}" + (f"; others: {'; '.join(others)}." if others else ".")
    head = ["network", "layers decomposed", "dense: ONNX Runtime, OpenVINO", "decomposed: ONNX Runtime, OpenVINO"]
    return "\n\n".join([table(head, lines), said, rows.conditions])


def exact(found: dict[str, Any]) -> bool:
    """Whether all that was exported of a network, dense and decomposed, answers as it does."""
    cells = [*found.get("dense", ()), *found.get("decomposed", ())]
    return len(cells) == 4 and all(isinstance(cell, float) and cell <= PARITY for cell in cells)


def complaint(found: dict[str, Any]) -> str:
    """The first thing that keeps it from being exact."""
    if "error" in found:
        return str(found["error"])
    for kind in ("dense", "decomposed"):
        for runtime, cell in zip(("ONNX Runtime", "OpenVINO"), found.get(kind, ()), strict=False):
            if not (isinstance(cell, float) and cell <= PARITY):
                return f"{kind}, {runtime}: {cell:.1e}" if isinstance(cell, float) else f"{kind}, {runtime}: {cell}"
    return f"not decomposed: {found['layers']}"


def parity_row(name: str, found: dict[str, Any]) -> list[str]:
    def cells(kind: str) -> str:
        return ", ".join(f"{cell:.1e}" if isinstance(cell, float) else "–" for cell in found.get(kind, ()))

    return [name, found.get("layers", "–"), cells("dense"), cells("decomposed")]


def looked_at(name: str) -> dict[str, Any]:
    """What becomes of one network: a difference for each runtime, or why there is none."""
    torch.manual_seed(0)
    model, example = networks()[name]()
    (workload,) = workloads(example)
    found: dict[str, Any] = {"dense": far(model, workload)}
    try:
        plan = lamina.make_plan(model, example, lamina.Ratio(2.0), rule=lamina.AtRatio())
        small = lamina.decompose(model, plan)
    except LaminaError as error:
        return found | {"layers": f"refused: {why(error)}"}
    layers = f"{len(plan.decomposed)} of {len(plan.layers)}"
    return found | {"layers": layers, "decomposed": far(small, workload) if plan.decomposed else []}


def far(network: nn.Module, workload: Workload) -> list[float | str]:
    def one(runtime: Runtime) -> float | str:
        try:
            with ready([network], Inference()):
                after = runtime.prepare(network, workload).answers()
            return difference(answers(network, [workload]), after)
        except Exception as error:  # an exporter may raise anything
            return why(error)

    return [one(runtime) for runtime in (lamina.OnnxRuntime(), lamina.OpenVINO())]


TITLES = {
    "resnet50": "In the runtimes that serve: ResNet-50",
    "vit": "In the runtimes that serve: ViT-B/16",
    "demo": "In the runtimes that serve: the demo's network, in float32 and int8",
    "parity": "Exports that answer alike",
}
PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "resnet50": lambda chosen: gains("resnet50", resnet50_made, chosen),
    "vit": lambda chosen: gains("vit", vit_made, chosen),
    "demo": demo,
    "parity": parity,
}


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("part", choices=PARTS)
        parser.add_argument("--runtime", action="append", help="of resnet50, vit and demo, this one alone; may be repeated")
        parser.add_argument(
            "--compile-ranks", action="store_true", help="of resnet50 and vit: ranks by torch.compile's times too"
        )
        parser.add_argument("--ratio", type=float, default=2.0, help="of resnet50 and vit")
        parser.add_argument("--neighbours", choices=["none"], help="time layers alone in a runtime")
        parser.add_argument("--network", help="of parity, this one, in this process; what becomes of it is printed")
        parser.add_argument("--limit", type=float, default=300.0, help="of parity, seconds a network")

    chosen = options(__doc__, more)
    if chosen.neighbours:
        layers_alone()
    if chosen.network:
        print(json.dumps(looked_at(chosen.network)))
        return
    body = PARTS[chosen.part](chosen)
    print(body)
    if chosen.publish:
        other = chosen.ratio != 2
        title = TITLES[chosen.part] + (f", ratio {chosen.ratio:g}" if other else "")
        words = f"{chosen.part} --ratio {chosen.ratio:g}" if other else chosen.part
        publish(f"runtimes-{chosen.part}{at_ratio(chosen)}", title, f"python benchmarks/runtimes.py {words} --publish", body)


if __name__ == "__main__":
    main()
