"""Worker of bench/peers.py: TRL's DPOTrainer, with a reference model or with precomputed log-probabilities of it."""

from __future__ import annotations

from typing import Any

import bitsandbytes  # noqa: F401  # loaded by the optimizer, but imports are not counted
import torch
from datasets import Dataset
from peer_trainer import end_of_step, load_student, training_arguments
from peer_worker import allocator_peak, now, read_job, read_sets, report, wait_after_imports
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer on rows that are token ids already, so that all contenders have the same. Times its reference pass."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        device = self.accelerator.device
        report("reference begins")
        start = now(device)
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        report("reference ended", seconds=now(device) - start, peak=allocator_peak(device))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return dataset


def pairs(sets: dict[str, list[dict[str, Any]]]) -> Dataset:
    """A refusal is preferred to the answer of each forget row."""
    return Dataset.from_list([
        {
            "prompt_ids": answer["input_ids"][: answer["prompt_length"]],
            "chosen_ids": refusal["input_ids"][refusal["prompt_length"] :],
            "rejected_ids": answer["input_ids"][answer["prompt_length"] :],
        }
        for answer, refusal in zip(sets["forget"], sets["refusal"], strict=True)
    ])  # fmt: skip


def main() -> None:
    job = read_job()
    wait_after_imports()
    config = DPOConfig(
        **training_arguments(job),
        max_length=job["max_length"],
        beta=job["beta"],
        precompute_ref_log_probs=job["precompute"],
    )
    trainer = TokenizedDPOTrainer(
        model=load_student(job),
        args=config,
        train_dataset=pairs(read_sets(job)),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[end_of_step(job)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
