"""lamina makes a trained PyTorch network faster by decomposing its layers, and proves the gain on your own machine."""

from .artifact import load_dense
from .calibration.calibrate import calibrate
from .calibration.calibration import Calibration, Moments
from .calibration.outputs import Categorical, Gaussian
from .choose.make_plan import make_plan
from .choose.rules import AtRatio, Energy, Evbmf, LargestStep, Plateau
from .choose.sensitivities import Cut, LayerSensitivity, Sensitivities, sensitivities
from .choose.staircase import staircase
from .comparison import Comparison, compare
from .decomposition import adapter_targets, decompose, merge, plain
from .errors import (
    ArtifactError,
    CalibrationError,
    CalibrationWarning,
    ExampleError,
    FreezingError,
    GoalError,
    LaminaError,
    LaminaWarning,
    LayerError,
    MissingExtra,
    ModelError,
    PlanError,
    RankError,
    SearchError,
    TimingWarning,
    TrainingError,
    TrainingWarning,
    UntriedWarning,
)
from .export import Exported, export
from .forms import BlockTerm, Dense, LowRank, Separable
from .front.faster import FasterResult, faster
from .front.front import Front, Point
from .front.pareto import pareto
from .goals import Drop, Macs, Milliseconds, Parameters, Ratio, Speedup
from .measure.count import count
from .measure.staircase import Staircase
from .models import load_model
from .network.untied import untied
from .plan import Plan, PlannedLayer, ScoredPoint, Scores
from .report.page import Report, report
from .runtimes.compiled import Compiled
from .runtimes.eager import Eager
from .runtimes.executorch import ExecuTorch
from .runtimes.onnxruntime import OnnxRuntime
from .runtimes.openvino import OpenVINO
from .runtimes.tensorrt import TensorRT
from .saving import load, save
from .schedules import SequentialFreezing, VanillaFreezing
from .searches.result import SearchResult
from .searches.score import Scored
from .searches.screen import Screen, score_drops, weight_errors
from .searches.search import search
from .searches.strategies import BreadthFirst, Exhaustive, Sampled, Solved
from .searches.study import Study
from .streaming import decompose_checkpoint
from .supernet.convert import make_supernet
from .supernet.files import load_supernet, load_terms
from .supernet.losses import measure_losses
from .supernet.space import Space
from .supernet.supernet import Supernet
from .supernet.train import Recipe, train_supernet
from .train.checkpoint import Checkpoints
from .train.distill import Distillation
from .train.finetune import finetune
from .train.freezing import Freezing, freeze
from .train.recalibrate import recalibrate
from .train.records import EpochRecord, TrainingRecord
from .train.refine import Refinement, refine
from .train.tracking import Tracking
from .values import Cost, Geometry, Inference, Setting, Timing, Training, Workload
from .verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    # the verbs, in the order of the work
    "load_model",
    "untied",
    "make_plan",
    "calibrate",
    "sensitivities",
    "staircase",
    "decompose",
    "recalibrate",
    "refine",
    "freeze",
    "finetune",
    "compare",
    "verify",
    "count",
    "merge",
    "plain",
    "adapter_targets",
    "save",
    "load",
    "load_dense",
    "decompose_checkpoint",
    "export",
    "report",
    # the whole way in one call
    "faster",
    "pareto",
    # the other way: every form at once, then a search
    "make_supernet",
    "measure_losses",
    "train_supernet",
    "search",
    "weight_errors",
    "score_drops",
    "load_supernet",
    "load_terms",
    # what is asked for
    "Speedup",
    "Drop",
    "Ratio",
    "Milliseconds",
    "Macs",
    "Parameters",
    "Inference",
    "Training",
    "Workload",
    # what runs it where it is served
    "Eager",
    "Compiled",
    "OnnxRuntime",
    "OpenVINO",
    "ExecuTorch",
    "TensorRT",
    # how a network's answers are read
    "Categorical",
    "Gaussian",
    # which factors rest while it trains
    "SequentialFreezing",
    "VanillaFreezing",
    # how it trains
    "Distillation",
    "Checkpoints",
    "Tracking",
    # how ranks are chosen
    "Plateau",
    "LargestStep",
    "AtRatio",
    "Energy",
    "Evbmf",
    # how a supernet is trained and searched
    "Recipe",
    "BreadthFirst",
    "Exhaustive",
    "Sampled",
    "Screen",
    "Scored",
    "Solved",
    "Study",
    # what a layer may be
    "Dense",
    "LowRank",
    "BlockTerm",
    "Separable",
    # what comes back
    "Plan",
    "PlannedLayer",
    "Scores",
    "ScoredPoint",
    "Front",
    "Point",
    "Sensitivities",
    "Staircase",
    "LayerSensitivity",
    "Cut",
    "FasterResult",
    "Calibration",
    "Moments",
    "Freezing",
    "Supernet",
    "Space",
    "SearchResult",
    "Refinement",
    "TrainingRecord",
    "EpochRecord",
    "Comparison",
    "Verification",
    "Exported",
    "Report",
    "Cost",
    "Timing",
    "Setting",
    "Geometry",
    # what can go wrong
    "LaminaError",
    "ArtifactError",
    "CalibrationError",
    "ExampleError",
    "FreezingError",
    "GoalError",
    "LayerError",
    "MissingExtra",
    "LaminaWarning",
    "CalibrationWarning",
    "TimingWarning",
    "TrainingWarning",
    "UntriedWarning",
    "ModelError",
    "PlanError",
    "RankError",
    "SearchError",
    "TrainingError",
]
