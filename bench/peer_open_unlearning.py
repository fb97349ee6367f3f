"""Worker of bench/peers.py: the trainers of locuslab/open-unlearning, imported from a checkout of it.

Its trainer and collator are used as its train.py does, but with the same rows in each step as all contenders have.
"""

from __future__ import annotations

import sys
from typing import Any

import bitsandbytes  # noqa: F401  # loaded by the optimizer, but imports are not counted
import torch
from peer_trainer import end_of_step, load_student, training_arguments
from peer_worker import read_job, read_sets, wait_after_imports
from transformers import TrainingArguments

Tensors = dict[str, torch.Tensor]


class Pad:
    """All that its collator reads of a tokenizer. The checkpoint's own may be too new for the pinned transformers."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id


def tensors(row: dict[str, Any]) -> Tensors:
    """A row as its `preprocess_chat_instance` returns it: input_ids, labels and attention_mask, each [L] int64."""
    ids = torch.tensor(row["input_ids"])
    labels = ids.clone()
    labels[: row["prompt_length"]] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def dataset(sets: dict[str, list[dict[str, Any]]], with_alternate: bool) -> list[dict[str, Any]]:
    """Items of its ForgetRetainDataset: the nth forget row with the nth retain row."""
    forget: list[Any] = [tensors(row) for row in sets["forget"]]
    if with_alternate:
        alternates = [tensors(row) for row in sets["refusal"]]
        forget = [{"original": o, "alternate": a} for o, a in zip(forget, alternates, strict=True)]
    return [{"forget": f, "retain": tensors(r)} for f, r in zip(forget, sets["retain"], strict=True)]


def main() -> None:
    job = read_job()
    sys.path.insert(0, f"{job['open_unlearning']}/src")
    from data.collators import DataCollatorForSupervisedDataset
    from trainer import TRAINER_REGISTRY

    wait_after_imports()
    trainer = TRAINER_REGISTRY[job["handler"]](
        model=load_student(job),
        train_dataset=dataset(read_sets(job), job["handler"] == "DPO"),
        data_collator=DataCollatorForSupervisedDataset(Pad(job["pad_id"])),
        args=TrainingArguments(**training_arguments(job)),
        callbacks=[end_of_step(job)],
        **job["method_args"],
    )
    trainer.train()


if __name__ == "__main__":
    main()
