"""Worker of bench/peers.py: the usual setup as we wrote it, with two models in memory and PyTorch's AdamW."""

from __future__ import annotations

from pathlib import Path

import torch
from peer_worker import StepClock, read_job, read_sets, report, wait_after_imports
from transformers import AutoModelForCausalLM  # noqa: F401  # loaded with a model, but imports are not counted

from neko_lean.data.batching import pad
from neko_lean.memory.two_models import two_model_loss
from neko_lean.models.causal_lm import checkpoint_activations
from neko_lean.models.loading import load_model


def main() -> None:
    job = read_job()
    wait_after_imports()
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    student, teacher = (load_model(Path(job["model"]), dtype, device).model for _ in range(2))
    student.train()
    teacher.eval()
    checkpoint_activations(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=job["lr"], weight_decay=0.0)

    sets = read_sets(job)
    clock = StepClock(job["device"], job["steps"])
    for step in range(1, job["steps"] + 1):
        batches = [
            pad([row["input_ids"] for row in sets[name]], job["pad_id"], device) for name in ("forget", "retain")
        ]
        loss = two_model_loss(student, teacher, *batches, 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report("loss", step=step, loss=loss.item())
        del loss
        clock.end_step()


if __name__ == "__main__":
    main()
