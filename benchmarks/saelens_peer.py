"""SAELens' own trainer, asked by sae_step.py and synth.py on stdin, answered on stdout.

{"threads": n, "cases": [...]} times steps; {"threads": n, "train": {...}} trains on a file of rows and saves the SAE.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

FORMS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trainer(form: str, settings: dict[str, Any], data: Iterator[torch.Tensor], **told: Any) -> SAETrainer:
    cls, described = FORMS[form]
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


def step_seconds(form: str, d_model: int, d_sae: int, k: int, batch: int, autocast: bool, steps: int) -> float:
    """The best of `steps` steps after one that is not counted."""
    torch.manual_seed(0)
    told = {"total_training_samples": 10**9, "autocast": autocast, "train_batch_size_samples": batch}
    settings = {"d_in": d_model, "d_sae": d_sae, "k": k}
    stepping = trainer(form, settings, iter([]), lr=1e-3, lr_end=1e-3, lr_decay_steps=0, **told)
    x = torch.randn(batch, d_model, device=DEVICE)
    taken = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        stepping.step(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def train(
    form: str, settings: dict[str, Any], rows: str, batch: int, passes: int, learning_rate: float, decay_steps: int,
    seed: int, directory: str,
) -> float:  # fmt: skip
    """Seconds that `SAETrainer.fit` takes over the rows in their order; the SAE is saved as SAELens saves it."""
    torch.manual_seed(seed)
    x = np.load(rows, mmap_mode="r")
    steps = len(x) // batch

    def batches() -> Iterator[torch.Tensor]:
        for step in range(steps * passes):
            start = step % steps * batch
            yield torch.from_numpy(np.array(x[start : start + batch]))

    fitting = trainer(
        form,
        {"d_in": x.shape[1], **settings},
        batches(),
        total_training_samples=steps * passes * batch,
        train_batch_size_samples=batch,
        autocast=False,
        lr=learning_rate,
        lr_end=learning_rate,
        lr_decay_steps=decay_steps,
    )
    start = time.perf_counter()
    fitted = fitting.fit()
    taken = time.perf_counter() - start
    Path(directory).mkdir(parents=True, exist_ok=True)
    fitted.save_inference_model(directory)
    return taken


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked.pop("threads"))
    seconds = train(**asked["train"]) if "train" in asked else [step_seconds(**case) for case in asked["cases"]]
    print(json.dumps({"seconds": seconds, "versions": f"sae-lens {sae_lens.__version__}, torch {torch.__version__}"}))
