"""The exceptions and warnings a user can meet. Each says in one line what was found, where, and what to do."""

from __future__ import annotations


class LaminaError(Exception):
    """Base of every error that lamina raises on purpose."""


class RankError(LaminaError, ValueError):
    """A form's rank or group count does not fit its layer, or is no positive number."""


class GoalError(LaminaError, ValueError):
    """A goal cannot be met by any network, such as a ratio below 1."""


class FreezingError(LaminaError, ValueError):
    """A freezing schedule makes no sense, or does not fit the network, the optimizer or the training it is used with."""


class TrainingError(LaminaError, ValueError):
    """A training cannot begin or go on: its data, its loss, an option, or the checkpoint it would go on from."""


class SearchError(LaminaError, ValueError):
    """A search cannot begin or go on: its limit, its space, its study, or every score has failed."""


class CalibrationError(LaminaError, ValueError):
    """A calibration cannot be made of this network and these data, or is that of another network or of other weights."""


class LayerError(LaminaError):
    """One layer cannot be worked on; the message names it."""


class ExampleError(LaminaError):
    """The network does not run on the example it was given."""


class PlanError(LaminaError):
    """A plan is malformed, is of a newer format, or does not fit this network."""


class ArtifactError(LaminaError):
    """A saved network is missing, cut short, changed, or not of this base network."""


class ModelError(LaminaError):
    """A network's name on the command line leads nowhere."""


class MissingExtra(LaminaError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: pip install 'lamina[{extra}]'")


class LaminaWarning(UserWarning):
    """Base of every warning that lamina gives: what was done all the same, and is perhaps not what was wanted."""


class CalibrationWarning(LaminaWarning):
    """A calibration lacks something of what it is used for."""


class TimingWarning(LaminaWarning):
    """Times could not be kept, or a file of them was set aside."""


class TrainingWarning(LaminaWarning):
    """A training does not keep all that it might."""


class UntriedWarning(LaminaWarning):
    """A network could not be tried after its layers were exchanged."""
