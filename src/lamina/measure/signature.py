"""Signatures: the key of a time holds everything that decides it, so a time taken under other conditions has another key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, final

from pydantic import Field, TypeAdapter

from ..forms import AnyForm, Form
from ..values import Geometry, Setting, Use

_VERSION = 5
_SETTING = '"setting":'
_FORM: TypeAdapter[Form] = TypeAdapter(Annotated[AnyForm, Field(discriminator="form")])


def signature(geometry: Geometry, form: Form, use: Use, channels_last: bool, setting: Setting) -> str:
    """The key of a time: canonical JSON of geometry, form, input shape and dtype, layout and setting."""
    content = {
        "version": _VERSION,
        "geometry": dataclasses.asdict(geometry),
        "form": dataclasses.asdict(form),  # type: ignore[call-overload]
        "input": use.input_shape,
        "channels_last": channels_last,
        "setting": dataclasses.asdict(setting),
    }
    # Where it is not named, it is the weight's.
    return _written(content | ({"input_dtype": use.input_dtype} if use.input_dtype else {}))


def setting_in(key: str) -> Setting | None:
    """The setting in a signature; None where another version of lamina wrote it."""
    # The last field but the version, which the layers of a network have in common: so it is read once for all of them.
    return _setting_at(key.rpartition(_SETTING)[2])


@lru_cache(maxsize=256)
def _setting_at(end: str) -> Setting | None:
    try:
        content = json.loads(f"{{{_SETTING}{end}")
        return Setting(**content["setting"]) if content["version"] == _VERSION else None
    except (ValueError, TypeError, KeyError):
        return None


def on_machine_of(target: Setting, setting: Setting) -> Setting:
    """The conditions of ``setting`` on the machine of ``target``.

    What the network and its use decide is kept: dtype, memory format, mode, freezing, autocast, runtime. The rest is the
    machine's.
    """
    return dataclasses.replace(
        target,
        dtype=setting.dtype,
        memory_format=setting.memory_format,
        mode=setting.mode,
        freezing=setting.freezing,
        autocast=setting.autocast,
        runtime=setting.runtime,
    )


def retaken(key: str, target: Setting) -> str:
    """A signature on the machine of another setting."""
    content: dict[str, Any] = json.loads(key)
    return _written(content | {"setting": dataclasses.asdict(on_machine_of(target, Setting(**content["setting"])))})


@final
@dataclass(frozen=True, slots=True)
class Timed:
    """What a time is of."""

    geometry: Geometry
    form: Form
    input_shape: tuple[int, ...]


def timed_in(key: str) -> Timed:
    """The layer, the form and the input in a signature of this version."""
    content: dict[str, Any] = json.loads(key)
    return Timed(_geometry(content), _FORM.validate_python(content["form"]), tuple(content["input"]))


def _geometry(content: Mapping[str, Any]) -> Geometry:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content["geometry"].items()}
    return Geometry(**fields)


def described(key: str) -> str:
    """What a signature is of, for a message."""
    content: dict[str, Any] = json.loads(key)
    form = " ".join(f"{name} {value}".replace("form ", "") for name, value in content["form"].items())
    shape = "×".join(map(str, content["input"]))
    dtype = f" in {content['input_dtype']}" if "input_dtype" in content else ""
    return f"{_geometry(content)} as {form} on {shape}{dtype} ({Setting(**content['setting'])})"


def _written(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
