"""Sparse autoencoders trained on the device, evaluated honestly, opened by everybody's tools."""

from sae import report as report
from sae.abstract import AbstractSAE as AbstractSAE
from sae.buffer import ShuffleBuffer as ShuffleBuffer
from sae.errors import InputError as InputError
from sae.formats import Loaded as Loaded
from sae.formats import load as load
from sae.formats import load_with_metadata as load_with_metadata
from sae.models import FORMS as FORMS
from sae.models import BatchTopK as BatchTopK
from sae.models import Gated as Gated
from sae.models import JumpReLU as JumpReLU
from sae.models import Matryoshka as Matryoshka
from sae.models import ReLU as ReLU
from sae.models import TopK as TopK
from sae.plan import Manifest as Manifest
from sae.plan import Plan as Plan
from sae.saelens import save as save
from sae.sparse import SparseCode as SparseCode
from sae.store import ActivationStore as ActivationStore
from sae.store import Rows as Rows
from sae.store import StoreWriter as StoreWriter
from sae.survey import Survey as Survey
from sae.survey import promoted_tokens as promoted_tokens
from sae.train import NotFinite as NotFinite
from sae.train import TrainConfig as TrainConfig
from sae.train import TrainState as TrainState
