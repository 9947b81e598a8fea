"""How to generate, spelled once: keywords for who calls, one frozen value for what is called, settings for the compiler."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from qwen_eqx import sharding
from qwen_eqx.errors import InputError, positive
from qwen_eqx.generation.memory import MemoryPlan
from qwen_eqx.generation.prompts import PREFILL_CHUNK
from qwen_eqx.generation.sample import AbstractSampler, Greedy
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.edits import AbstractEdit
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import Capture, Site
from qwen_eqx.text.ids import check_ids

_STRIDE = 32
_ITEMS = 2**32  # keys are folded from 32 bits


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when the loop is compiled."""

    new: int  # columns = the most tokens a row may generate
    kv_seq: int  # entries of the cache
    cache_dtype: str
    stop_tokens: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    pad_token: int = 0
    sites: tuple[Site, ...] = ()
    keep_generated: bool = False
    keep_prompt: bool = False
    capture_dtype: str = "bfloat16"
    prefill_chunk: int = 1 << 30  # prompts wider than this are read in pieces of it
    stride: int = 1  # steps between two looks at whether all rows are done
    mesh: Mesh | None = None  # that the model's weights lie on
    platform: str | None = None  # of the devices that they lie on; None: the default one

    def memory_plan(self, config: QwenConfig, *, prompts: int, width: int, samples: int = 1) -> MemoryPlan:
        """The bytes that a generation of this shape allocates on a device beside the weights."""
        rows = sharding.rows_share(prompts * samples, self.mesh)
        prompts = sharding.rows_share(prompts, self.mesh)
        positions = rows * self.new * self.keep_generated + prompts * width * self.keep_prompt
        return MemoryPlan.of(
            sharding.share(config, self.mesh),
            batch=rows,
            kv_seq=self.kv_seq,
            cache_dtype=self.cache_dtype,
            sites=len(self.sites),
            captured_positions=positions,
            capture_dtype=self.capture_dtype,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The keywords of `prepare`; `generate` and `schedule` have more."""

    max_new_tokens: int
    """Tokens that a row may generate."""
    sampler: AbstractSampler = Greedy()  # noqa: RUF009  (frozen, without arrays)
    """Chooses each token."""
    stop_tokens: Sequence[int] = ()
    """A row ends with one of them."""
    stop_sequences: Sequence[Sequence[int]] = ()
    """Or with one of these, which never reach into the prompt."""
    capture: Capture | None = None
    """Sites whose activations are kept."""
    edits: Sequence[AbstractEdit] = ()
    """What is done to activations on the way."""
    key: PRNGKeyArray | None = None
    """What draws depend on, beside item and sample; `jax.random.key(0)` if none is given."""
    samples: int = 1
    """Completions of each prompt."""
    items: Sequence[int] | None = None
    """Each prompt's number, which its draws depend on; its place if none are given."""
    pad_token: int | None = None
    """Fills rows up after their end, 0 if none is given; in an array of prompts it marks pads, as negative ids do."""
    cache_dtype: DTypeLike | None = None
    """Of keys and values; the model's if none is given."""
    prefill_chunk: int = PREFILL_CHUNK
    """Positions of a long prompt that are read at once."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "prefill_chunk"):
            positive(name, getattr(self, name))
        if self.key is not None and not hasattr(self.key, "dtype"):
            raise InputError(f"key: found {self.key!r}, expected a key; jax.random.key(seed) makes one of a number")

    def settings(self, model: Qwen, width: int) -> Settings:
        """What is fixed when the loop is compiled for prompts of this width, checked against the model."""
        vocab, capture = model.config.vocab, self.capture
        sequences = tuple(tuple(check_ids(stop, vocab, name="stop_sequences")) for stop in self.stop_sequences)
        if () in sequences:
            raise InputError("stop_sequences: found an empty sequence, expected at least one token id")
        pad_token = 0 if self.pad_token is None or self.pad_token < 0 else self.pad_token
        steps = max(self.max_new_tokens - 1, 1)
        return Settings(
            new=self.max_new_tokens,
            kv_seq=width + self.max_new_tokens,
            cache_dtype=jnp.dtype(model.dtype if self.cache_dtype is None else self.cache_dtype).name,
            stop_tokens=tuple(check_ids(self.stop_tokens, vocab, name="stop_tokens")),
            stop_sequences=sequences,
            pad_token=check_ids([pad_token], vocab, name="pad_token")[0],
            sites=() if capture is None else capture.resolve(model.config),
            keep_generated=capture is not None and capture.positions != "prompt",
            keep_prompt=capture is not None and capture.positions != "generated",
            capture_dtype=jnp.dtype(model.dtype if capture is None or capture.dtype is None else capture.dtype).name,
            prefill_chunk=self.prefill_chunk,
            stride=-(-steps // -(-steps // _STRIDE)),  # near _STRIDE, overshooting max_new_tokens the least
            mesh=sharding.mesh_of(model),
            platform=sharding.platform(model),
        )

    def number(self, place: int) -> int:
        """The number of the prompt at this place, which its draws depend on."""
        number = place if self.items is None else int(self.items[place])
        if not 0 <= number < _ITEMS:
            raise InputError(f"items[{place}]: found {number}, expected a number from 0 to 2^32 - 1")
        return number


Keywords = ParamSpec("Keywords")
Made = TypeVar("Made")
Asked = TypeVar("Asked")
Result = TypeVar("Result")


def by_keyword(
    options: Callable[Keywords, Made],
) -> Callable[[Callable[[Qwen, Asked, Made], Result]], Callable[Concatenate[Qwen, Asked, Keywords], Result]]:
    """Lets `call(model, prompts, options)` be called with the fields of its options as keywords.

    `help`, editors and type checkers see them with their types and defaults, which stand in the options' class alone.
    """

    def decorate(call: Callable[[Qwen, Asked, Made], Result]) -> Callable[Concatenate[Qwen, Asked, Keywords], Result]:
        @functools.wraps(call)
        def spelled(model: Qwen, prompts: Asked, *args: Keywords.args, **keywords: Keywords.kwargs) -> Result:
            return call(model, prompts, options(*args, **keywords))

        model, prompts, _ = inspect.signature(call).parameters.values()
        keywords = inspect.signature(options).parameters.values()
        signature = inspect.signature(call).replace(parameters=[model, prompts, *keywords])
        spelled.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return spelled

    return decorate
