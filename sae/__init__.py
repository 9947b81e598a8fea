"""Sparse autoencoders trained on the device, evaluated honestly, opened by everybody's tools."""

from sae.codes.sparse import SparseCode as SparseCode
from sae.data.buffer import ShuffleBuffer as ShuffleBuffer
from sae.data.plan import Manifest as Manifest
from sae.data.plan import Plan as Plan
from sae.data.store import ActivationStore as ActivationStore
from sae.data.store import Rows as Rows
from sae.data.store import StoreWriter as StoreWriter
from sae.errors import InputError as InputError
from sae.evaluation import report as report
from sae.evaluation.survey import Survey as Survey
from sae.evaluation.survey import promoted_tokens as promoted_tokens
from sae.formats.load import Loaded as Loaded
from sae.formats.load import load as load
from sae.formats.load import load_with_metadata as load_with_metadata
from sae.formats.saelens import save as save
from sae.forms.abstract import AbstractSAE as AbstractSAE
from sae.forms.models import FORMS as FORMS
from sae.forms.models import BatchTopK as BatchTopK
from sae.forms.models import Gated as Gated
from sae.forms.models import JumpReLU as JumpReLU
from sae.forms.models import Matryoshka as Matryoshka
from sae.forms.models import ReLU as ReLU
from sae.forms.models import TopK as TopK
from sae.training.loop import NotFinite as NotFinite
from sae.training.loop import TrainConfig as TrainConfig
from sae.training.loop import TrainState as TrainState
