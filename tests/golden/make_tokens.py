"""Make tokens.json: token ids and rendered chats as transformers' AutoTokenizer gives them, for the tokenizer tests.

`python tests/golden/make_tokens.py`, in an environment with the `parity` extra. Qwen2.5's own tokenizer is read from
../shared/data/qwen2.5-tokenizer beside the repository, where there is one.
"""

import json
from pathlib import Path

import transformers

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DIRECTORIES = {
    "tiny-random": ROOT / "qwen_eqx" / "pretrained" / "tiny-random",
    "qwen2.5": ROOT.parent / "shared" / "data" / "qwen2.5-tokenizer",
}
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "### Input\n\n```grid shape: 3x3\n1 012\n2 345\n3 678\n```\n\n### Output\n",
    "1234567890 3.14159 2^10",
    "  leading, trailing   and\t tabs \n\n\n newlines\r\n",
    "It's they're WE'LL don't",
    "caf\u00e9 and cafe\u0301: NFC makes them one",
    "héllo wörld ñò÷ûąćďęĚĞ",
    "日本語のテキスト 한국어 русский العربية",
    "🎉👩‍👩‍👧‍👦 emoji",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a<|im_start|>b <|im_end|> c <|im_nothing|>",
    "\x00\x01\x7f\x80 controls",
    "def f(x):\n    return {'a': [x, x**2]}  # code",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "naïve “quotes” & 'ticks'"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "  and\n\n2+2? "},
    ],
]


def golden(directory: Path) -> dict[str, list]:
    """What transformers makes of every text and every chat, without and with the generation prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = []
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        kept, bare = tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)
        texts.append({"text": text, "ids": ids, "decoded": kept, "bare": bare})
    chats = []
    for messages in CHATS:
        for prompt in (False, True):
            shown = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            ids = tokenizer(shown).input_ids
            chats.append({"messages": messages, "prompt": prompt, "text": shown, "ids": ids})
    return {"texts": texts, "chats": chats}


def main() -> None:
    path = HERE / "tokens.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= {name: golden(directory) for name, directory in DIRECTORIES.items() if directory.exists()}
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}: {', '.join(found)}")


if __name__ == "__main__":
    main()
