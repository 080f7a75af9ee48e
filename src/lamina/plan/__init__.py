"""What each layer becomes, and why."""

from ..examples import ExampleShape as ExampleShape
from ..examples import TensorShape as TensorShape
from .layer import PlannedLayer as PlannedLayer
from .layer import cost as cost
from .plan import FORMAT as FORMAT
from .plan import MUCH as MUCH
from .plan import Plan as Plan
from .plan import json_schema as json_schema
from .record import FactorMethod as FactorMethod
from .record import InSequence as InSequence
from .record import Refined as Refined
from .record import ScoredPoint as ScoredPoint
from .record import Scores as Scores
from .record import WholeModel as WholeModel
from .text import listed as listed
