"""The same measurements with Hugging Face transformers: reads one JSON object from stdin, prints one to stdout.

Runs under any Python that has torch and transformers; imports nothing of this repository. Its best setting on CPU: one
thread per core, SDPA attention, inference mode, only the last position's logits in prefill.
"""

import json
import os
import statistics
import sys
import time

import torch
import transformers


def main() -> None:
    ask = json.load(sys.stdin)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**ask["config"])
    torch.set_default_dtype(getattr(torch, ask["dtype"]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    rows = [measure(model, device, batch, width, ask) for batch in ask["batches"] for width in ask["prompts"]]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    answer = {"versions": versions, "rows": rows}
    if "training" in ask:
        answer["training_ms"] = {
            name: train(model, device, name, **ask["training"]) for name in ("float32", "bfloat16")
        }
    print(json.dumps(answer))


@torch.inference_mode()
def measure(model, device, batch, width, ask) -> dict:
    """Median milliseconds of a prefill and of a greedy step."""
    ids = torch.randint(0, model.config.vocab_size, (batch, width), device=device)

    def read():
        return model(ids, use_cache=True, logits_to_keep=1)

    out, _ = timed(read)  # not counted
    prefills = [timed(read)[1] for _ in range(ask["repeats"])]
    past, steps = out.past_key_values, []
    token = out.logits[:, -1:].argmax(-1)
    for _ in range(ask["steps"]):
        out, taken = timed(lambda token=token: step(model, token, past))
        token = out.logits[:, -1:].argmax(-1)
        steps.append(taken)
    return {
        "batch": batch,
        "prompt": width,
        "prefill_ms": 1e3 * statistics.median(prefills),
        "step_ms": 1e3 * statistics.median(steps) if steps else None,
        "hidden_ms": hidden_ms(model, ids, ask["repeats"]) if ask.get("hidden") else None,
    }


def hidden_ms(model, ids, repeats) -> float:
    """Median milliseconds of a pass that returns the residual stream after every block, and no logits."""

    def read():
        return model.model(ids, use_cache=False, output_hidden_states=True).hidden_states

    timed(read)  # not counted
    return 1e3 * statistics.median(timed(read)[1] for _ in range(repeats))


def train(model, device, dtype, batch, seq, steps) -> float:
    """Median milliseconds of a step of AdamW on random documents; bfloat16 by autocast, weights in float32."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    ids = torch.randint(0, model.config.vocab_size, (batch, seq), device=device)

    def one():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    timed(one)  # not counted
    return 1e3 * statistics.median(timed(one)[1] for _ in range(steps))


def step(model, token, past):
    out = model(token, past_key_values=past, use_cache=True)
    out.logits[:, -1].argmax(-1).tolist()  # choosing a token is part of a step
    return out


def timed(call):
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
