"""Make the embedded model `tiny-random`: a byte-complete tokenizer trained on ARC prompts, and seeded random weights.

Without flags it rewrites qwen_eqx/pretrained/tiny-random bit for bit; `--out DIR --seed 7` makes another one elsewhere.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import qwen_eqx
from arc.encode import ARC24_SYMBOLS, DEFAULT_ENCODER
from arc.grid import as_grid
from arc.prompt import PROMPTS, answer, chat_messages
from arc.task import Pair, Task
from qwen_lab import cli, locks
from qwen_lab.bounds import Seed
from qwen_lab.errors import InputError

EMBEDDED = Path(qwen_eqx.__file__).parent / "pretrained" / "tiny-random"
VOCAB = 512
ENCODERS_READ = {DEFAULT_ENCODER: 16, "shape(minimal)": 4, "json": 2, "words": 1}  # prompts of each per prompt format
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = qwen_eqx.QwenConfig(
    model_type="qwen2",
    vocab=VOCAB,
    d_model=64,
    layers=4,
    heads=4,
    kv_heads=2,
    d_head=16,
    d_ff=144,
    max_seq=32768,
    rope_theta=1_000_000.0,
    tied=True,
)
# how Qwen2 cuts text before BPE: transformers rebuilds this from the model type, so any other would not survive there
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = EMBEDDED
    """Directory of what is written. A model that is there is replaced."""
    seed: Seed = 2
    """Of the run. Weights are drawn from it, and the prompts that the tokenizer is trained on."""


def main(config: Config) -> None:
    if not 0 <= config.seed < 2**32:
        raise InputError(f"--seed: found {config.seed}, expected 0 to {2**32 - 1}")
    with locks.claimed(config.out):
        make(config.out, config.seed)
    total = sum(path.stat().st_size for path in config.out.iterdir())
    cli.console.print(f"wrote: {config.out} ({CONFIG.parameters:,} weights, {total:,} bytes)", markup=False)
    if config.out != EMBEDDED:
        cli.console.print(f"next: python experiments/extract.py --model {config.out}", markup=False)


def corpus(rng: np.random.Generator) -> list[str]:
    """Every prompt format around the usual encoders, over random grids; each symbol alone, so that it is one token."""
    texts = ["0".join(ARC24_SYMBOLS)] * 100
    for encoder, copies in ENCODERS_READ.items():
        for name, prompt_format in PROMPTS.items():
            for _ in range(copies):
                pairs = [Pair(_grid(rng), _grid(rng)) for _ in range(3)]
                task = Task(id="made-up", train=tuple(pairs[:2]), test=tuple(pairs[2:]))
                for message in chat_messages(task, 0, encoder, prompt_format):
                    texts.append(f"{message['role']}\n{message['content']}")
                texts.append(f"assistant\n{answer(task.test[0].input, encoder, name)}")
    return texts


def _grid(rng: np.random.Generator):
    return as_grid(rng.integers(0, 10, rng.integers(1, 31, 2)).tolist(), "grid")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE as Qwen2 has it; all 256 bytes are tokens, and its split makes every digit one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIALS)  # the last ids, as in Qwen's own vocabulary
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer's four files as a Hugging Face directory has them."""
    endoftext, _, im_end = (tokenizer.token_to_id(token) for token in SPECIALS)
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONFIG.max_seq,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {"eos_token_id": [im_end, endoftext], "pad_token_id": endoftext, "do_sample": False}
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def random_weights(rng: np.random.Generator) -> qwen_eqx.Qwen:
    """NumPy's generator, the same on every platform; scaled so that blocks, not the last token, decide the next one."""
    model = qwen_eqx.Qwen.init(CONFIG, key=jax.random.key(0), dtype=jnp.dtype(jnp.float32))
    leaves, tree = jax.tree.flatten(model)
    drawn = []
    for leaf in leaves:
        if leaf.ndim == 2:
            scale = 0.1 if leaf.shape[0] == VOCAB else leaf.shape[1] ** -0.5
            values = rng.normal(scale=scale, size=leaf.shape)
        else:
            values = np.asarray(leaf, np.float64) + rng.normal(scale=0.1, size=leaf.shape)  # norms are 1, biases 0
        drawn.append(jnp.asarray(values.astype(np.float32)).astype(jnp.bfloat16))
    return jax.tree.unflatten(tree, drawn)


def make(out: Path, seed: int = Config.seed) -> None:
    """Write the whole model directory."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(train_tokenizer(corpus(rng)), Path(scratch))
        tokenizer = qwen_eqx.Tokenizer.from_directory(scratch, vocab_size=CONFIG.vocab)
    qwen_eqx.save_pretrained(random_weights(rng), tokenizer, out)


if __name__ == "__main__":
    cli.run(main, Config)
