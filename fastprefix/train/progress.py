"""Progress of a training run: a printed line after every twentieth of it."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Print the step, the loss and the remaining time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or not state.global_step:
            return
        at = f"step {state.global_step:{len(str(state.max_steps))}d} of {state.max_steps}"
        if "loss" in logs:
            spent = time.perf_counter() - self.began
            left = spent / max(state.global_step - self.first, 1) * (state.max_steps - state.global_step)
            print(f"{at}: loss {float(logs['loss']):.3f}, {_time(left)} left", flush=True)
        elif "eval_loss" in logs and state.global_step < state.max_steps:  # the last one is printed with the results
            print(f"{at}: held-out loss {float(logs['eval_loss']):.3f}", flush=True)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
