"""Training on the device: one state or many at once, many steps per compiled call."""

from sae.training.config import TrainConfig as TrainConfig
from sae.training.loop import NotFinite as NotFinite
from sae.training.loop import fit as fit
from sae.training.loop import run as run
from sae.training.sharding import place as place
from sae.training.state import StepMetrics as StepMetrics
from sae.training.state import TrainState as TrainState
from sae.training.state import finish as finish
from sae.training.state import hyper as hyper
from sae.training.state import init as init
from sae.training.sweep import stack as stack
from sae.training.sweep import unstack as unstack
