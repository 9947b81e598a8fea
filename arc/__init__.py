"""From any ARC data set to a scored submission; NumPy only.

Functions live in their modules (`arc.parse.parse`, `arc.vote.by_count`); what nearly every script needs is here too.
"""

from arc import ask as ask
from arc import augment as augment
from arc import data as data
from arc import encode as encode
from arc import generators as generators
from arc import parse as parse
from arc import prompt as prompt
from arc import render as render
from arc import spans as spans
from arc import submission as submission
from arc import vote as vote
from arc.ask import Asking as Asking
from arc.ask import Completion as Completion
from arc.ask import Sample as Sample
from arc.augment import Augmentation as Augmentation
from arc.data import Tasks as Tasks
from arc.data import iter_tasks as iter_tasks
from arc.data import load_tasks as load_tasks
from arc.data import write_tasks as write_tasks
from arc.encode import DEFAULT_ENCODER as DEFAULT_ENCODER
from arc.encode import ENCODERS as ENCODERS
from arc.encode import Encoder as Encoder
from arc.encode import parse_encoder as parse_encoder
from arc.errors import InputError as InputError
from arc.grid import Grid as Grid
from arc.grid import as_grid as as_grid
from arc.prompt import DEFAULT_PROMPT as DEFAULT_PROMPT
from arc.prompt import PROMPTS as PROMPTS
from arc.prompt import chat_messages as chat_messages
from arc.prompt import prefill as prefill
from arc.prompt import prompt_text as prompt_text
from arc.score import evaluate as evaluate
from arc.score import score as score
from arc.spans import Cell as Cell
from arc.task import Pair as Pair
from arc.task import Task as Task
from arc.vote import SELECT as SELECT
