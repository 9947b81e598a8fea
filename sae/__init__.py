"""Sparse autoencoders trained on the device, evaluated honestly, opened by everybody's tools."""

from sae.errors import InputError as InputError
from sae.models import FORMS as FORMS
from sae.models import AbstractSAE as AbstractSAE
from sae.models import BatchTopK as BatchTopK
from sae.models import Gated as Gated
from sae.models import JumpReLU as JumpReLU
from sae.models import Matryoshka as Matryoshka
from sae.models import ReLU as ReLU
from sae.models import TopK as TopK
from sae.sparse import SparseCode as SparseCode
