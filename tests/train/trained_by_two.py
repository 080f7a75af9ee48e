"""A Transformers training under DDP: ``python trained_by_two.py SCRATCH`` in each process, with RANK and the like set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import lamina
from lamina.train.callbacks import transformers_callback
from lamina.train.distributed import rank


class Model(nn.Module):
    """Notes in each step what rests: 1 for the outer factors, 2 for the inner."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        plan = lamina.make_plan(dense, torch.zeros(4, 6), lamina.Ratio(1.5), rule=lamina.AtRatio())
        plan = plan.with_form("0", lamina.LowRank(3)).with_form("2", lamina.LowRank(2))
        self.net = lamina.decompose(dense, plan, check=False)
        self.seen: list[int] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        layer = self.net[0]
        self.seen.append(1 if not layer.first.weight.requires_grad else 2 if not layer.second.weight.requires_grad else 0)
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Model()
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        str(folder / "out"),
        num_train_epochs=4,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        ddp_find_unused_parameters=True,
    )
    samples = [{"x": one, "labels": i % 3} for i, one in enumerate(x)]
    callback = transformers_callback(lamina.SequentialFreezing())
    trainer = transformers.Trainer(model, arguments, train_dataset=samples, callbacks=[callback])
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    tensors = dict(model.state_dict()) | {"seen": torch.tensor(model.seen)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{rank()}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads have been seen to abort a process that ends in order, one in some dozens
