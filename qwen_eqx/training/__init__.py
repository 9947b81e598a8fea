"""Training a model: loss, step, loop, LoRA."""

from qwen_eqx.training.loop import NotFinite as NotFinite
from qwen_eqx.training.loop import fit as fit
from qwen_eqx.training.loop import run as run
from qwen_eqx.training.lora import LoRA as LoRA
from qwen_eqx.training.lora import merge as merge
from qwen_eqx.training.lora import trainable as trainable
from qwen_eqx.training.loss import Batch as Batch
from qwen_eqx.training.loss import Totals as Totals
from qwen_eqx.training.loss import totals as totals
from qwen_eqx.training.sharding import place as place
from qwen_eqx.training.step import StepMetrics as StepMetrics
from qwen_eqx.training.step import TrainConfig as TrainConfig
from qwen_eqx.training.step import TrainState as TrainState
from qwen_eqx.training.step import init as init
