"""Forms of dictionaries: a file holds all that is particular to one."""

from sae.forms.abstract import AbstractDictionary
from sae.forms.batchtopk import BatchTopK
from sae.forms.clt import CLT
from sae.forms.crosscoder import Crosscoder
from sae.forms.gated import Gated
from sae.forms.jumprelu import JumpReLU
from sae.forms.matryoshka import Matryoshka
from sae.forms.relu import ReLU
from sae.forms.skip import SkipTranscoder
from sae.forms.topk import TopK

FORMS: dict[str, type[AbstractDictionary]] = {
    form.name: form for form in (ReLU, TopK, BatchTopK, JumpReLU, Gated, Matryoshka, SkipTranscoder, Crosscoder, CLT)
}
