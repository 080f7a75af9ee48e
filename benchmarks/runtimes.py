"""What a decomposition gains where networks are served: ranks chosen there, int8 on top, and exports that answer alike.

    python benchmarks/runtimes.py resnet50 --publish
    python benchmarks/runtimes.py vit --publish
    python benchmarks/runtimes.py demo --publish
    python benchmarks/runtimes.py parity --publish

``resnet50``: 8×3×160×160, fresh weights: for each runtime the dense network, the one whose ranks were chosen at ratio 2 by
eager times, and the one whose ranks were chosen by the runtime's own; the time that choosing took, and what it foretold of the
whole. ``vit``: ViT-B/16 at ratio 2, likewise. ``demo``: the demo's trained network calibrated on 512 unlabelled images, in
float32, bfloat16 and int8, dense and decomposed: times over dense eager, and accuracy on the 10,000 test images. ``parity``:
how far exported outputs lie from eager PyTorch's, over many architectures, dense and at ratio 2. ``--runtime`` takes one alone.
All runs of a row are interleaved. Rows are kept in ``benchmarks/runs/runtimes``, and it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import conditions, options, publish, table
from torch import Tensor, nn

import lamina
from lamina.comparison import ready
from lamina.errors import LaminaError
from lamina.layers.decomposed import DecomposedLayer
from lamina.measure.clock import Effort, interleave, ratio, ratio_interval
from lamina.measure.table import TimingTable
from lamina.runtimes.runtime import Prepared, Runtime
from lamina.values import Inference, Workload

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
sys.path.insert(0, str(DEMO))
KEPT = Path(__file__).parent / "runs" / "runtimes"
Make = Callable[[], tuple[nn.Module, Tensor]]
DEMO_GOALS = (None, 2.0, 3.0, 4.0)


def resnet50_made() -> tuple[nn.Module, Tensor]:
    import torchvision

    return torchvision.models.resnet50(weights=None).eval(), torch.randn(8, 3, 160, 160)


def vit_made() -> tuple[nn.Module, Tensor]:
    import timm

    return timm.create_model("vit_base_patch16_224", pretrained=False).eval(), torch.randn(4, 3, 224, 224)


def in_runtimes(x: Tensor, chosen: argparse.Namespace) -> dict[str, Runtime]:
    """Those that are asked for and run here; int8 by random inputs, as the weights are random too."""
    images = [torch.randn_like(x) for _ in range(2)]
    found: dict[str, Runtime] = {
        "eager": lamina.Eager(),
        "folded": lamina.Eager(folded=True),
        "compile": lamina.Compiled(),
        "onnxruntime": lamina.OnnxRuntime(),
        "openvino": lamina.OpenVINO(),
        "openvino-bfloat16": lamina.OpenVINO("bfloat16"),
        "onnxruntime-int8": lamina.OnnxRuntime(int8=images),
        "openvino-int8": lamina.OpenVINO(int8=images),
    }
    return {name: found[name] for name in chosen.runtime or found if runs_here(name, found[name])}


def runs_here(name: str, runtime: Runtime) -> bool:
    """Whether a runtime runs a small layer; where not, as in bfloat16 on a processor without it, a line says why."""
    try:
        runtime.prepare_layer(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    except LaminaError as error:
        print(f"{name} is left out: {error}", flush=True)
        return False
    return True


def gains(name: str, make: Make, chosen: argparse.Namespace) -> str:
    """The table of one network, a row a runtime; each row is kept as soon as it stands."""
    torch.manual_seed(0)
    model, x = make()
    rows = kept_rows(name)
    with TimingTable(None) as timings:
        eager_plan: lamina.Plan | None = None
        for label, runtime in in_runtimes(x, chosen).items():
            if label in rows:
                continue
            if eager_plan is None:
                eager_plan = lamina.make_plan(model, x, lamina.Ratio(2.0), timings=timings)
            row = [label, *gained(model, x, runtime, eager_plan, timings, chosen.seconds)]
            rows[label] = row
            print(row, flush=True)
            keep_row(name, row)
    head = [
        "runtime", "dense, × dense eager", "ratio 2 by eager times, gain inside", "ratio 2 by its own times, gain inside",
        "the same, × dense eager", "own against eager's ranks", "foretold / measured", "choosing, cold", "layers",
    ]  # fmt: skip
    setting = lamina.compare(nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(1, 4), seconds=0.1).setting
    return f"{table(head, list(rows.values()))}\n\n{conditions(setting)}"


def gained(
    model: nn.Module, x: Tensor, runtime: Runtime, eager_plan: lamina.Plan, timings: TimingTable, seconds: float
) -> list[str]:
    began = time.perf_counter()
    choosable = not isinstance(runtime, lamina.Compiled)
    own_plan = lamina.make_plan(model, x, lamina.Ratio(2.0), timings=timings, runtime=runtime) if choosable else eager_plan
    took = time.perf_counter() - began
    by_eager, by_own = (lamina.decompose(model, plan, check=False).eval() for plan in (eager_plan, own_plan))
    with ready([model, by_eager, by_own], Inference()):
        runs = [lamina.Eager().prepare(model, Workload(x)).run]
        runs += [runtime.prepare(each, Workload(x)).run for each in (model, by_eager, by_own)]
        eager, dense, first, second = interleave(runs, x.device, Effort(4 * seconds, 7, 60, precision=0))

    def told(a: list[float], b: list[float]) -> str:
        low, high = ratio_interval(a, b)
        return f"×{ratio(a, b):.2f} ({low:.2f} to {high:.2f})"

    whole = own_plan.whole
    foretold = ""
    if choosable and whole is not None and whole.predicted_s is not None and whole.after.timing is not None:
        foretold = f"{whole.predicted_s / whole.after.timing.median_s:.2f}"
    return [
        told(eager, dense), told(dense, first), told(dense, second) if choosable else "not chosen",
        told(eager, second), told(first, second) if choosable else "", foretold,
        f"{took:.0f} s" if choosable else "", f"{len(own_plan.decomposed)} of {len(own_plan.layers)}",
    ]  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A way to serve the demo's network: by whose times its ranks are chosen, and how it is made ready for a batch."""

    chosen_by: Runtime
    ready: Callable[[nn.Module, Tensor], Prepared]


def in_runtime(runtime: Runtime, chosen_by: Runtime | None = None) -> Served:
    return Served(chosen_by or runtime, lambda model, x: runtime.prepare(model, Workload(x)))


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


def in_inductor_int8(data: list[Tensor]) -> Served:
    """Static int8 by PyTorch's own quantiser (PT2E), compiled by Inductor."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    def made(model: nn.Module, x: Tensor) -> Prepared:
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
        "eager, bfloat16 weights": Served(eager, lambda model, x: eager.prepare(Bfloat16(model), Workload(x))),
        "eager, autocast to bfloat16": Served(eager, lambda model, x: eager.prepare(Autocast(model), Workload(x))),
        "torch.compile int8 (PT2E), ranks by eager times": in_inductor_int8(data),
        "ONNX Runtime": in_runtime(lamina.OnnxRuntime()),
        "ONNX Runtime int8": in_runtime(lamina.OnnxRuntime(int8=data)),
        "OpenVINO": in_runtime(lamina.OpenVINO()),
        "OpenVINO bfloat16": in_runtime(lamina.OpenVINO("bfloat16")),
        "OpenVINO int8": in_runtime(lamina.OpenVINO(int8=data)),
    }


def demo(chosen: argparse.Namespace) -> str:
    """The demo's network in float32, bfloat16 and int8, dense and decomposed: time over dense eager, and accuracy."""
    from demo import base_network
    from fashion import test_images, tuning_images

    model, test = base_network().eval(), test_images()
    data = list(tuning_images().images[:512].split(32))
    x = test.images[:32]
    found = lamina.calibrate(model, data, outputs=lamina.Categorical())
    rows = kept_rows("demo")

    def accuracy(run: Callable[[Tensor], Tensor]) -> float:
        right = [int((run(a).argmax(1) == b).sum()) for a, b in zip(test.images.split(32), test.labels.split(32), strict=True)]
        return sum(right) / 1e4

    with TimingTable(None) as timings:
        for label, way in ways(data).items():
            if not runs_here(label, way.chosen_by):
                continue
            for wanted in DEMO_GOALS if label in (chosen.runtime or [label]) else ():
                key = f"{label} ×{wanted:g}" if wanted else label
                if key in rows:
                    continue
                small = model
                if wanted:
                    goal = lamina.Speedup(wanted)
                    plan = lamina.make_plan(model, x, goal, data=found, timings=timings, runtime=way.chosen_by)
                    small = lamina.decompose(model, plan, found)
                with ready([model, small], Inference()):
                    runs = [lamina.Eager().prepare(model, Workload(x)).run, way.ready(model, x).run, way.ready(small, x).run]
                    eager_s, dense_s, small_s = interleave(runs, x.device, Effort(chosen.seconds, 7, 200, precision=0))
                    kept = accuracy(served(way, small, x))
                low, high = ratio_interval(eager_s, small_s)
                inside = f"×{ratio(dense_s, small_s):.2f}" if wanted else ""
                over = f"**×{ratio(eager_s, small_s):.2f}** ({low:.2f} to {high:.2f})"
                rows[key] = [key, label, f"×{wanted:g}" if wanted else "dense", over, inside, f"{kept:.2%}"]
                print(rows[key], flush=True)
                keep_row("demo", rows[key])
    head = ["runtime", "speed-up asked of it", "over dense eager", "gain inside", "accuracy"]
    setting = lamina.compare(model, model, x, seconds=0.1).setting
    keys = [f"{label} ×{wanted:g}" if wanted else label for label in ways(data) for wanted in DEMO_GOALS]
    lines = [rows[key][1:] for key in keys if key in rows]
    return f"{table(head, lines)}\n\n{conditions(setting)}"


def served(way: Served, model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A network as it is served, batch by batch: the example's memory is what is read in each run."""
    fed = x.clone()
    prepared = way.ready(model, fed)

    def run(batch: Tensor) -> Tensor:
        fed[: len(batch)] = batch
        return prepared.answers()[0][: len(batch)]

    return run


def kept_rows(part: str) -> dict[str, Any]:
    """What was measured before, by the first entry of each row."""
    path = KEPT / f"{part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row[0]: row for row in rows}


def keep_row(part: str, row: list[Any]) -> None:
    with (KEPT / f"{part}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def architectures() -> dict[str, Make]:
    """Networks of torchvision, timm and transformers, small where they can be; fresh weights."""
    import timm
    import torchvision
    import transformers

    def vision(name: str, side: int) -> Make:
        # Some take no other side, and some have heads beside their own.
        more = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return lambda: (getattr(torchvision.models, name)(weights=None, **more).eval(), torch.randn(2, 3, side, side))

    def of_timm(name: str) -> Make:
        def make() -> tuple[nn.Module, Tensor]:
            model = timm.create_model(name, pretrained=False).eval()
            return model, torch.randn(2, *model.default_cfg["input_size"])

        return make

    def of_transformers(kind: str) -> Make:
        def make() -> tuple[nn.Module, Tensor]:
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
            sizes |= {"vocab_size": 99, "max_position_embeddings": 64}
            if kind == "GPT2":
                sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}
            if kind == "DistilBert":
                sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99}
            config = getattr(transformers, f"{kind}Config")(**sizes, return_dict=False, use_cache=False)
            model = getattr(transformers, f"{kind}Model")(config).eval()
            return model, torch.randint(0, 99, (2, 12))

        return make

    of_torchvision = {
        "alexnet": 224, "vgg11": 64, "vgg16_bn": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64,
        "wide_resnet50_2": 64, "densenet121": 64, "squeezenet1_1": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64,
        "mnasnet0_5": 64,
        "shufflenet_v2_x1_0": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64, "regnet_y_400mf": 64, "googlenet": 96,
        "inception_v3": 160, "convnext_tiny": 64, "vit_b_16": 224, "swin_t": 64, "swin_v2_t": 64, "maxvit_t": 224,
    }  # fmt: skip
    found = {f"torchvision {name}": vision(name, side) for name, side in of_torchvision.items()}
    timms = (
        "resnet26",
        "repvgg_a0",
        "mixer_s32_224",
        "deit_tiny_patch16_224",
        "ghostnet_100",
        "tf_efficientnet_lite0",
        "coat_tiny",
    )
    found |= {f"timm {name}": of_timm(name) for name in timms}
    return found | {f"transformers {kind}": of_transformers(kind) for kind in ("Bert", "GPT2", "DistilBert", "Roberta")}


def parity(chosen: argparse.Namespace) -> str:
    """How far exported outputs lie from eager PyTorch's, relative to their size: the largest of a network's outputs."""
    rows = kept_rows("parity")
    for name, make in architectures().items():
        if name in rows:
            continue
        torch.manual_seed(0)
        model, x = make()
        row = [name]
        try:
            plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())
            small: nn.Module | None = lamina.decompose(model, plan)
            row.append(f"{len(plan.decomposed)} of {len(plan.layers)}")
        except LaminaError as error:
            small = None
            row.append(f"refused: {error}")
        for network in (model, small):
            for runtime in (lamina.OnnxRuntime(), lamina.OpenVINO()):
                row.append("" if network is None else apart(network, x, runtime))
        rows[name] = row
        print(row, flush=True)
        keep_row("parity", row)
    head = [
        "network",
        "layers decomposed",
        "dense, ONNX Runtime",
        "dense, OpenVINO",
        "decomposed, ONNX Runtime",
        "decomposed, OpenVINO",
    ]
    setting = lamina.compare(nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(1, 4), seconds=0.1).setting
    return f"{table(head, list(rows.values()))}\n\n{conditions(setting)}"


def apart(network: nn.Module, x: Tensor, runtime: Runtime) -> str:
    from lamina.answers import answers
    from lamina.answers import apart as far

    try:
        with ready([network], Inference()):
            after = runtime.prepare(network, Workload(x)).answers()
        return f"{far(answers(network, [Workload(x)]), after):.1e}"
    except (LaminaError, ValueError) as error:
        return str(error)[:120]


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

    chosen = options(__doc__, more)
    body = PARTS[chosen.part](chosen)
    print(body)
    if chosen.publish:
        publish(f"runtimes-{chosen.part}", TITLES[chosen.part], f"python benchmarks/runtimes.py {chosen.part} --publish", body)


if __name__ == "__main__":
    main()
