"""Other libraries' own SAE trainers, asked by sae_step.py and synth.py on stdin, answered on stdout.

{"threads": n, "cases": [...]} times training steps in every library that is installed; {"threads": n, "train": {...}}
lets SAELens train on a file of rows and save its SAE.
"""

import contextlib
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[torch.Tensor], object]


def saelens_trainer(form: str, settings: dict[str, Any], data: Iterator[torch.Tensor], **told: Any) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    cls, described = get_sae_training_class("matryoshka_batchtopk" if form == "matryoshka" else form)
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        device=DEVICE,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        n_restart_cycles=1,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=10,
        **told,
    )
    return SAETrainer(cfg=config, sae=cls(described(device=DEVICE, **settings)), data_provider=data)


def saelens(form: str, d_model: int, d_sae: int, k: int, batch: int, autocast: bool) -> Step:
    settings = {"d_in": d_model, "d_sae": d_sae, "k": k}
    told = {"total_training_samples": 10**9, "autocast": autocast, "train_batch_size_samples": batch}
    return saelens_trainer(form, settings, iter([]), lr=1e-3, lr_end=1e-3, lr_decay_steps=0, **told).step


def sparsify(form: str, d_model: int, d_sae: int, k: int, batch: int, autocast: bool) -> Step | None:
    """The step of sparsify/trainer.py with its Adam: normalize, FVU, backward, projection, update; it has TopK only."""
    from sparsify import SparseCoder, SparseCoderConfig

    if form != "topk":
        return None
    coder = SparseCoder(d_model, SparseCoderConfig(num_latents=d_sae, k=k), device=DEVICE, dtype=torch.float32)
    adam = torch.optim.Adam(coder.parameters(), lr=1e-3)

    def step(x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with lowered(autocast):
            out = coder(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def dictionary_learning(form: str, d_model: int, d_sae: int, k: int, batch: int, autocast: bool) -> Step:
    """`update` of its TopK and BatchTopK trainers; step 1, for step 0 also looks for the geometric median."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kind = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[form]
    trainer = kind(
        steps=10**6, activation_dim=d_model, dict_size=d_sae, k=k, layer=0, lm_name="", lr=1e-3, device=DEVICE
    )

    def step(x: torch.Tensor) -> None:
        with lowered(autocast):
            trainer.update(1, x)

    return step


LIBRARIES: dict[str, tuple[str, Callable[..., Step | None]]] = {
    "SAELens": ("sae-lens", saelens),
    "sparsify": ("eai-sparsify", sparsify),
    "dictionary_learning": ("dictionary-learning", dictionary_learning),
}


def lowered(autocast: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext()


def step_seconds(make: Callable[..., Step | None], case: dict[str, Any], steps: int) -> float | None:
    """The best of `steps` steps after one that is not counted; None where the library has no such form."""
    torch.manual_seed(0)
    step = make(**case)
    if step is None:
        return None
    x = torch.randn(case["batch"], case["d_model"], device=DEVICE)
    taken = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def measured(cases: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Library -> seconds of every case; a library that cannot be imported is left out, and said to be on stderr."""
    found = {}
    for name, (package, make) in LIBRARIES.items():
        try:
            version = importlib.metadata.version(package)
            seconds = [step_seconds(make, case, steps) for case in cases]
        except ImportError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        found[name] = {"version": f"{package} {version} (torch {torch.__version__})", "seconds": seconds}
    return found


def train(
    form: str, settings: dict[str, Any], rows: str, batch: int, passes: int, learning_rate: float, decay_steps: int,
    seed: int, directory: str,
) -> float:  # fmt: skip
    """Seconds that SAELens' `SAETrainer.fit` takes over the rows in their order; it saves its SAE as it always does."""
    torch.manual_seed(seed)
    x = np.load(rows, mmap_mode="r")
    steps = len(x) // batch

    def batches() -> Iterator[torch.Tensor]:
        for step in range(steps * passes):
            start = step % steps * batch
            yield torch.from_numpy(np.array(x[start : start + batch]))

    told = {"total_training_samples": steps * passes * batch, "train_batch_size_samples": batch, "autocast": False}
    rate = {"lr": learning_rate, "lr_end": learning_rate, "lr_decay_steps": decay_steps}
    trainer = saelens_trainer(form, {"d_in": x.shape[1], **settings}, batches(), **told, **rate)
    start = time.perf_counter()
    fitted = trainer.fit()
    taken = time.perf_counter() - start
    Path(directory).mkdir(parents=True, exist_ok=True)
    fitted.save_inference_model(directory)
    return taken


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    if "train" in asked:
        version = f"sae-lens {importlib.metadata.version('sae-lens')}, torch {torch.__version__}"
        answer = {"seconds": train(**asked["train"]), "versions": version}
    else:
        answer = {"libraries": measured(asked["cases"], asked["steps"])}
    print(json.dumps(answer))
