"""A Qwen2, Qwen2.5 or dense Qwen3 decoder as pure Equinox modules, generating and captured inside one compiled loop."""

from importlib import metadata as _metadata

from qwen_eqx.errors import DiskFull as DiskFull
from qwen_eqx.errors import InputError as InputError
from qwen_eqx.generation.engine import GenerationState as GenerationState
from qwen_eqx.generation.engine import Generator as Generator
from qwen_eqx.generation.generate import GenerateOptions as GenerateOptions
from qwen_eqx.generation.generate import Generation as Generation
from qwen_eqx.generation.generate import generate as generate
from qwen_eqx.generation.generate import prepare as prepare
from qwen_eqx.generation.memory import MemoryPlan as MemoryPlan
from qwen_eqx.generation.options import Options as Options
from qwen_eqx.generation.progress import Progress as Progress
from qwen_eqx.generation.prompts import PromptBatch as PromptBatch
from qwen_eqx.generation.prompts import prompt_width as prompt_width
from qwen_eqx.generation.sample import AbstractFilter as AbstractFilter
from qwen_eqx.generation.sample import AbstractSampler as AbstractSampler
from qwen_eqx.generation.sample import Chain as Chain
from qwen_eqx.generation.sample import Greedy as Greedy
from qwen_eqx.generation.sample import MinP as MinP
from qwen_eqx.generation.sample import RepetitionPenalty as RepetitionPenalty
from qwen_eqx.generation.sample import Temperature as Temperature
from qwen_eqx.generation.sample import TopK as TopK
from qwen_eqx.generation.sample import TopP as TopP
from qwen_eqx.generation.scheduler import Completion as Completion
from qwen_eqx.generation.scheduler import ScheduleOptions as ScheduleOptions
from qwen_eqx.generation.scheduler import schedule as schedule
from qwen_eqx.generation.score import score as score
from qwen_eqx.generation.search import Found as Found
from qwen_eqx.generation.search import beam_search as beam_search
from qwen_eqx.generation.search import threshold_search as threshold_search
from qwen_eqx.model.config import PRESETS as PRESETS
from qwen_eqx.model.config import QwenConfig as QwenConfig
from qwen_eqx.model.edits import Ablate as Ablate
from qwen_eqx.model.edits import AbstractEdit as AbstractEdit
from qwen_eqx.model.edits import Patch as Patch
from qwen_eqx.model.edits import Replace as Replace
from qwen_eqx.model.edits import Steer as Steer
from qwen_eqx.model.effect import Effect as Effect
from qwen_eqx.model.effect import Given as Given
from qwen_eqx.model.effect import captured as captured
from qwen_eqx.model.effect import captured_padded as captured_padded
from qwen_eqx.model.effect import effect as effect
from qwen_eqx.model.effect import effects as effects
from qwen_eqx.model.qwen import Qwen as Qwen
from qwen_eqx.model.sites import Capture as Capture
from qwen_eqx.model.sites import Site as Site
from qwen_eqx.reading.attribution import Attribution as Attribution
from qwen_eqx.reading.attribution import head_sources as head_sources
from qwen_eqx.reading.attribution import logit_attribution as logit_attribution
from qwen_eqx.reading.gradients import grad_at as grad_at
from qwen_eqx.reading.labelled import Labelled as Labelled
from qwen_eqx.reading.lens import Lens as Lens
from qwen_eqx.reading.lens import logit_lens as logit_lens
from qwen_eqx.reading.patching import Patched as Patched
from qwen_eqx.reading.patching import Places as Places
from qwen_eqx.reading.patching import attribution_patch as attribution_patch
from qwen_eqx.reading.patching import patch_effects as patch_effects
from qwen_eqx.reading.paths import Paths as Paths
from qwen_eqx.reading.paths import path_patch as path_patch
from qwen_eqx.sharding import make_mesh as make_mesh
from qwen_eqx.sharding import shard as shard
from qwen_eqx.text.tokenizer import Tokenizer as Tokenizer
from qwen_eqx.weights.hf import from_pretrained as from_pretrained
from qwen_eqx.weights.hf import save_pretrained as save_pretrained

try:
    __version__ = _metadata.version("qwen-eqx")
except _metadata.PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "0+unknown"
