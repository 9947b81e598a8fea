"""The facts of one Qwen decoder, read from and written to a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_eqx.errors import InputError
from qwen_eqx.files import read_json

# What a config.json may ask for that this code does not do, with the values under which it asks for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (None,),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "mlp_bias": (None, False),
    "num_experts": (None, 0),
    "use_mrope": (None, False),
}
_MAX_LAYERS = 1024  # a skeleton costs Python time per layer: refuse nonsense before building it


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Architecture of a Qwen2, Qwen2.5 or dense Qwen3 decoder (transformers `Qwen2Config`, `Qwen3Config`)."""

    model_type: str  # "qwen2" (q/k/v bias) or "qwen3" (q/k norm, no bias)
    vocab: int  # rows of the embedding table; at least as many as the tokenizer has ids
    d_model: int  # width of the residual stream
    layers: int
    heads: int  # query heads
    kv_heads: int  # key and value heads; each serves heads // kv_heads query heads
    d_head: int
    d_ff: int  # width between the two halves of the MLP
    max_seq: int  # positions the model was made for
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tied: bool = False  # the head reuses the embedding table

    def __post_init__(self) -> None:
        if self.model_type not in ("qwen2", "qwen3"):
            raise InputError(f"model_type={self.model_type!r} is not implemented; expected 'qwen2' or 'qwen3'")
        for name in ("vocab", "d_model", "layers", "heads", "kv_heads", "d_head", "d_ff", "max_seq"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r} must be a positive integer")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name}={value!r} must be a positive finite number")
        if not isinstance(self.tied, bool):
            raise InputError(f"tied={self.tied!r} must be true or false")
        if self.layers > _MAX_LAYERS:
            raise InputError(f"layers={self.layers} is more than {_MAX_LAYERS}; no Qwen model is that deep")
        if self.heads % self.kv_heads:
            raise InputError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.d_head % 2:
            raise InputError(f"d_head={self.d_head} must be even: RoPE rotates pairs")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        q, kv = self.heads * self.d_head, self.kv_heads * self.d_head
        attention = 2 * self.d_model * (q + kv) + (q + 2 * kv) * self.qkv_bias + 2 * self.d_head * self.qk_norm
        block = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        return self.layers * block + self.d_model + self.vocab * self.d_model * (1 if self.tied else 2)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], where: str = "config.json") -> "QwenConfig":
        """Reads the fields of a Hugging Face config; raises `InputError` naming `where` and the field."""
        model_type = _field(fields, "model_type", str, where)
        if model_type not in ("qwen2", "qwen3"):
            raise InputError(f"{where}: model_type: found {model_type!r}, expected 'qwen2' or 'qwen3'")
        _refuse_unimplemented(fields, model_type, where)
        d_model = _field(fields, "hidden_size", int, where)
        heads = _field(fields, "num_attention_heads", int, where)
        if fields.get("head_dim") is not None or model_type == "qwen3":
            d_head = _field(fields, "head_dim", int, where)
        elif heads > 0 and d_model % heads == 0:
            d_head = d_model // heads
        else:
            raise InputError(
                f"{where}: hidden_size={d_model} is no multiple of num_attention_heads={heads}, and head_dim is missing"
            )
        try:
            return cls(
                model_type=model_type,
                vocab=_field(fields, "vocab_size", int, where),
                d_model=d_model,
                layers=_field(fields, "num_hidden_layers", int, where),
                heads=heads,
                kv_heads=_field(fields, "num_key_value_heads", int, where),
                d_head=d_head,
                d_ff=_field(fields, "intermediate_size", int, where),
                max_seq=_field(fields, "max_position_embeddings", int, where),
                rope_theta=_rope_theta(fields, where),
                norm_eps=_field(fields, "rms_norm_eps", float, where),
                tied=_field(fields, "tie_word_embeddings", bool, where),
            )
        except InputError as error:
            raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: Path) -> "QwenConfig":
        """Reads a `config.json`; raises `InputError` naming the file and the field."""
        return cls.from_hf(read_json(path), str(path))

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The fields of a `config.json` that transformers opens; `dtype` is that of the weights."""
        fields: dict[str, Any] = {
            "architectures": ["Qwen2ForCausalLM" if self.model_type == "qwen2" else "Qwen3ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.d_head,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": self.max_seq,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "torch_dtype": dtype,
        }
        if self.model_type == "qwen3":
            fields["attention_bias"] = False
        return fields


def _field(fields: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if fields.get(name) is None:
        raise InputError(f"{where}: {name}: missing, expected a {kind.__name__}")
    value = fields[name]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where}: {name}: found {value!r} ({type(value).__name__}), expected a {kind.__name__}")
    try:
        return kind(value)
    except OverflowError:  # JSON integers have no end
        raise InputError(f"{where}: {name}: found an integer of {value.bit_length()} bits, expected a float") from None


def _rope_theta(fields: Mapping[str, Any], where: str) -> float:
    """transformers 4 writes `rope_theta` at top level, transformers 5 inside `rope_parameters`."""
    nested = fields.get("rope_parameters")
    if nested is None:
        return _field(fields, "rope_theta", float, where)
    if not isinstance(nested, dict):
        raise InputError(f"{where}: rope_parameters: found {nested!r}, expected an object")
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        raise InputError(f"{where}: rope_parameters.rope_type: {kind!r} is not implemented; expected 'default'")
    extra = sorted(set(nested) - {"rope_theta", "rope_type", "type"})
    if extra:
        raise InputError(f"{where}: rope_parameters.{extra[0]}: RoPE scaling is not implemented")
    return _field(nested, "rope_theta", float, f"{where}: rope_parameters")


def _refuse_unimplemented(fields: Mapping[str, Any], model_type: str, where: str) -> None:
    for name, harmless in _REFUSED.items():
        value = fields.get(name)
        if value not in harmless and not (name == "rope_scaling" and _is_default_rope(value)):
            raise InputError(f"{where}: {name}={value!r} is not implemented")
    activation = fields.get("hidden_act")
    if activation != "silu":
        raise InputError(
            f"{where}: hidden_act: found {activation!r}, expected 'silu' (no other activation is implemented)"
        )
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError(f"{where}: layer_types: found {kinds!r}; only 'full_attention' is implemented")
    if model_type == "qwen3" and fields.get("attention_bias"):
        raise InputError(f"{where}: attention_bias=true is not implemented for qwen3")


def _is_default_rope(value: Any) -> bool:
    return isinstance(value, dict) and value.get("rope_type", value.get("type")) == "default"


def _qwen25(
    d_model: int, layers: int, heads: int, kv_heads: int, d_ff: int, *, vocab: int = 152064, **facts: Any
) -> QwenConfig:
    facts = {"norm_eps": 1e-6, "max_seq": 32768, "tied": False} | facts
    return QwenConfig("qwen2", vocab, d_model, layers, heads, kv_heads, d_model // heads, d_ff, **facts)


def _qwen3(d_model: int, layers: int, heads: int, kv_heads: int, d_ff: int, tied: bool) -> QwenConfig:
    return QwenConfig("qwen3", 151936, d_model, layers, heads, kv_heads, 128, d_ff, 40960, tied=tied)


# The published sizes, as their config.json on the hub states them (the instruct models' max_position_embeddings).
PRESETS: dict[str, QwenConfig] = {
    "Qwen2.5-0.5B": _qwen25(896, 24, 14, 2, 4864, vocab=151936, tied=True),
    "Qwen2.5-1.5B": _qwen25(1536, 28, 12, 2, 8960, vocab=151936, tied=True),
    "Qwen2.5-3B": _qwen25(2048, 36, 16, 2, 11008, vocab=151936, tied=True),
    "Qwen2.5-7B": _qwen25(3584, 28, 28, 4, 18944),
    "Qwen2.5-14B": _qwen25(5120, 48, 40, 8, 13824),
    "Qwen2.5-32B": _qwen25(5120, 64, 40, 8, 27648),
    "Qwen2.5-72B": _qwen25(8192, 80, 64, 8, 29568),
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288, tied=False),
    "Qwen3-14B": _qwen3(5120, 40, 40, 8, 17408, tied=False),
    "Qwen3-32B": _qwen3(5120, 64, 64, 8, 25600, tied=False),
}
