"""``lamina export``: a saved network as a file for the runtime that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..artifact import load
from ..decomposition import plan_of
from ..errors import ExampleError
from ..examples import example_from
from ..export import Exported
from ..export import export as write
from ..runtimes.onnxruntime import OnnxRuntime
from ..runtimes.openvino import OpenVINO
from .command import command
from .finetune import called
from .options import Conditions, InputsIfAny, ModelName, RuntimeName, SavedFolder, Seconds, destination

_INT8 = {RuntimeName.onnxruntime: OnnxRuntime, RuntimeName.openvino: OpenVINO}


@command("lamina export nets:network out/ -o model.onnx")
def export(
    *,
    model: ModelName,
    folder: SavedFolder,
    output: Annotated[
        Path,
        destination(
            "model.onnx, model.pt2 for torch.export, model.pte for ExecuTorch, or with --runtime openvino a folder.", "PATH"
        ),
    ],
    inputs: InputsIfAny = None,
    runtime: Annotated[
        RuntimeName | None, typer.Option(help="What will run it; by default ONNX Runtime for an ONNX file.")
    ] = None,
    int8: Annotated[
        str | None,
        typer.Option(metavar="FUNCTION", help="In int8, by scales of what package.module:function returns: batches of inputs."),
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="The first side of every input may change.")] = False,
    opset: Annotated[
        int | None, typer.Option(help="The version of ONNX's operators; by default the exporter's choice.")
    ] = None,
    seconds: Seconds = 2.0,
    conditions: Conditions,
) -> Exported:
    """Load a saved network onto a fresh one and write it for a runtime: run there, held against the network, and timed.

    Timed are files: this one, and the one that is written alike of MODEL.
    """
    if int8:
        named = runtime or RuntimeName.onnxruntime
        if named not in _INT8:
            raise typer.BadParameter(f"--int8 is for --runtime {' or '.join(_INT8)}")
        chosen: Any = _INT8[named](int8=called(int8))
    else:
        chosen = runtime.value_of if runtime else None
    with conditions.applied():
        small = load(conditions.load(model), folder).eval()
        original = conditions.load(model).eval()
        if inputs:
            examples = conditions.examples(inputs, small)
        else:
            examples = [example_from(shape, small) for shape in plan_of(small).examples or ()]
        if len(examples) != 1:
            raise ExampleError(f"{folder} tells of {len(examples)} examples: say by --input for which one it is exported")
        return write(
            small,
            examples[0],
            output,
            runtime=chosen,
            original=original,
            dynamic_batch=dynamic_batch,
            opset=opset,
            seconds=seconds,
        )
