"""A Qwen2, Qwen2.5 or dense Qwen3 decoder as pure Equinox modules, generating and captured inside one compiled loop."""

from qwen_eqx.config import PRESETS as PRESETS
from qwen_eqx.config import QwenConfig as QwenConfig
from qwen_eqx.errors import InputError as InputError
from qwen_eqx.hf import from_pretrained as from_pretrained
from qwen_eqx.hf import save_pretrained as save_pretrained
from qwen_eqx.model import Qwen as Qwen
from qwen_eqx.sites import Capture as Capture
from qwen_eqx.sites import Site as Site
from qwen_eqx.tokenizer import Tokenizer as Tokenizer
