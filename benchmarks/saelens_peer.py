"""Seconds of SAELens' own training step, asked by sae_step.py on stdin, answered on stdout."""

import json
import sys
import time

import sae_lens
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

FORMS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}


def step_seconds(form: str, d_model: int, d_sae: int, k: int, batch: int, autocast: bool, steps: int) -> float:
    """The best of `steps` steps after one that is not counted."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cls, settings = FORMS[form]
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**9,
        device=device,
        autocast=autocast,
        lr=1e-3,
        lr_end=1e-3,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=10,
    )
    module = cls(settings(d_in=d_model, d_sae=d_sae, k=k, device=device))
    trainer = SAETrainer(cfg=config, sae=module, data_provider=iter([]))
    x = torch.randn(batch, d_model, device=device)
    taken = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        trainer.step(x)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked.pop("threads"))
    seconds = [step_seconds(**case) for case in asked["cases"]]
    print(json.dumps({"seconds": seconds, "versions": f"sae-lens {sae_lens.__version__}, torch {torch.__version__}"}))
