"""A ``transformers.Trainer`` run under the mode, by a callback of three lines.

    pip install accelerate        # which Trainer needs
    python examples/trainer.py

The callback puts the mode in force when training begins and takes it away when it ends, so the Trainer and its
arguments stay as they are. Prints the losses and what was replaced.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from gemsmode import GemsMode


class UnderGemsMode(TrainerCallback):
    """Training, from its first to its last step, under ``mode``."""

    def __init__(self, mode: GemsMode) -> None:
        self.mode = mode

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.mode.__enter__()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.mode.__exit__(None, None, None)


class Parity(torch.utils.data.Dataset):
    """Sequences of tokens, and whether the first one is odd."""

    def __init__(self, count: int) -> None:
        self.tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i, 0] % 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        print("transformers.Trainer needs the package accelerate, which is not installed: pip install accelerate", file=sys.stderr)
        return 2

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=16))
    gems = GemsMode(trace=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, max_steps=options.steps, per_device_train_batch_size=4, logging_steps=1,
                                      save_strategy="no", report_to=[], disable_tqdm=True)
        trainer = Trainer(model, arguments, train_dataset=Parity(64), callbacks=[UnderGemsMode(gems)])
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {float(entry['loss']):.4f}")
    print(gems.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
