"""From any ARC data set to a scored submission; NumPy only."""

from arc.data import load_tasks as load_tasks
from arc.encode import DEFAULT_ENCODER as DEFAULT_ENCODER
from arc.encode import ENCODERS as ENCODERS
from arc.encode import Encoder as Encoder
from arc.encode import parse_encoder as parse_encoder
from arc.errors import InputError as InputError
from arc.grid import Grid as Grid
from arc.grid import as_grid as as_grid
from arc.prompt import PROMPTS as PROMPTS
from arc.prompt import chat_messages as chat_messages
from arc.prompt import prefill as prefill
from arc.prompt import render as render
from arc.task import Pair as Pair
from arc.task import Task as Task
