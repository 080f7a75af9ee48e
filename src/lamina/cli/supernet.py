"""``lamina supernet``: turn a network into a supernet, and save it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, final

import typer
from torch import nn

from ..errors import ArtifactError
from ..supernet.convert import make_supernet
from ..supernet.files import BLUEPRINT, load_supernet, read_blueprint, save_supernet
from ..supernet.supernet import Supernet
from .command import command
from .evidence import Evidence
from .options import Conditions, Inputs, Layers, ModelName, destination


class MethodName(StrEnum):
    """How the sizes of a layer follow one another."""

    nested = "nested"
    faithful = "faithful"


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read ``1,4,16,32``.

    Raises:
        BadParameter: It says something else.
    """
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"{text!r}: write group sizes as whole numbers above 0, such as 1,4,16,32.")
    return sizes


@final
@dataclass(frozen=True, slots=True)
class Made:
    """What was saved: where, how many layers became series, how many configurations there are, why other layers stay dense."""

    folder: str
    series: int
    configurations: int
    left_dense: dict[str, str]
    refused: dict[str, str]

    @classmethod
    def of(cls, net: Supernet, folder: Path) -> Made:
        """The same from the supernet."""
        return cls(str(folder), len(net.series), net.space.size, net.left_dense, net.refused)

    def __str__(self) -> str:
        """``NET: 16 series, 4,294,967,296 configurations``, then a line for each layer that has none."""
        lines = [f"{self.folder}: {self.series} series, {self.configurations:,} configurations"]
        lines += [f"dense: {name or '(the network)'}: {why}" for name, why in self.left_dense.items()]
        lines += [f"refused: {name or '(the network)'}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


NetFolder = Annotated[Path, typer.Argument(metavar="NET", show_default=False, help="What lamina supernet wrote.")]
BaseName = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", show_default=False, help="The network it was made from; by default the one noted in NET."
    ),
]


@command("lamina supernet nets:network --input 8,3,32,32 --group-sizes 4,16 -o net/")
def supernet(
    *,
    model: ModelName,
    group_sizes: Annotated[
        tuple | None,  # type: ignore[type-arg]
        typer.Option(
            parser=parse_sizes,
            metavar="SIZES",
            show_default=False,
            help="Channels a group, such as 1,4,16,32; without, every layer gets the forms that pay here.",
        ),
    ] = None,
    evidence: Evidence,
    inputs: Inputs,
    output: Annotated[Path, destination("Where the supernet is saved.", "FOLDER")],
    dense: Annotated[bool, typer.Option("--dense", help="Layers may also stay dense.")] = False,
    widths: Annotated[float, typer.Option(metavar="SHARE", help="The cores' channels, as a share of their layers'.")] = 1.0,
    method: Annotated[
        MethodName, typer.Option(help="nested: each size is fitted from the one before; faithful: independently.")
    ] = MethodName.nested,
    layers: Layers,
    conditions: Conditions,
) -> Made:
    """Turn a network into a supernet: every layer in several forms at once. After a crash it goes on."""
    if output.exists() and not (output / BLUEPRINT).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ArtifactError(f"{output} holds other files than a saved supernet: choose an empty or a new folder")
    fits = output.with_name(f".{output.name}.fits")
    with conditions.applied():
        network = conditions.load(model)
        net = make_supernet(
            network,
            conditions.examples(inputs, network),
            group_sizes=group_sizes,
            data=evidence.value,
            widths=widths,
            dense=dense,
            method=method.value,
            **layers.patterns,
            base=model,
            resume=fits,
            progress=True,
        )
    save_supernet(net, output)
    shutil.rmtree(fits, ignore_errors=True)
    return Made.of(net, output)


def loaded(folder: Path, base: str | None, conditions: Conditions) -> tuple[Supernet, str]:
    """A saved supernet on a fresh network of its kind, and that network's name.

    Raises:
        ArtifactError: The folder holds no supernet, or nobody knows what network it was made from.
    """
    name = base or read_blueprint(folder).base
    if name is None:
        raise ArtifactError(f"{folder} was made in Python and does not say from which network: name it with --model")
    # Its weights come from the folder; a file of weights would only be read in vain.
    network: nn.Module = conditions.without_weights().load(name)
    return load_supernet(network, folder), name
