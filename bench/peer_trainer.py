"""What the workers of bench/peers.py that run a transformers Trainer share: its arguments, the model, and its clock."""

from __future__ import annotations

from typing import Any

import torch
from peer_worker import StepClock, report
from transformers import AutoModelForCausalLM, TrainerCallback


def training_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments: everything that saves memory and that the device supports."""
    return {
        "output_dir": job["out"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "optim": job["optim"],
        "max_grad_norm": 0.0,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": job["device"] == "cpu",
        "bf16": False,  # the weights already are what they are trained in
        "dataloader_pin_memory": job["device"] != "cpu",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def load_student(job: dict[str, Any]) -> Any:
    """The checkpoint in the dtype that is trained."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=getattr(torch, job["dtype"]))
    model.config.use_cache = False
    return model


def end_of_step(job: dict[str, Any]) -> TrainerCallback:
    """A callback that reports the end of each step, and the loss that the trainer logs."""
    clock = StepClock(job["device"], job["steps"])

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                report("loss", step=state.global_step, loss=logs["loss"])

    return EndOfStep()
