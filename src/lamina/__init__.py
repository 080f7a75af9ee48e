"""lamina makes a trained PyTorch network faster by decomposing its layers, and proves the gain on your own machine."""

from .artifact import load, save
from .choose.make_plan import make_plan
from .choose.rules import AtRatio, LargestStep, Plateau
from .comparison import Comparison, compare
from .decomposition import decompose, merge
from .errors import (
    ArtifactError,
    ExampleError,
    GoalError,
    LaminaError,
    LayerError,
    MissingExtra,
    ModelError,
    PlanError,
    RankError,
)
from .forms import BlockTerm, Dense, LowRank
from .goals import Ratio
from .measure.count import count
from .models import load_model
from .plan import Plan, PlannedLayer
from .values import Cost, Geometry, Inference, Setting, Timing, Training, Workload
from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    # the verbs, in the order of the work
    "load_model",
    "make_plan",
    "decompose",
    "compare",
    "verify",
    "count",
    "merge",
    "save",
    "load",
    # what is asked for
    "Ratio",
    "Inference",
    "Training",
    "Workload",
    # how ranks are chosen
    "Plateau",
    "LargestStep",
    "AtRatio",
    # what a layer may be
    "Dense",
    "LowRank",
    "BlockTerm",
    # what comes back
    "Plan",
    "PlannedLayer",
    "Comparison",
    "Verification",
    "Cost",
    "Timing",
    "Setting",
    "Geometry",
    # what can go wrong
    "LaminaError",
    "ArtifactError",
    "ExampleError",
    "GoalError",
    "LayerError",
    "MissingExtra",
    "ModelError",
    "PlanError",
    "RankError",
]
