"""Train the demo's base network on the first 50,000 training images.

    python examples/demo/train_base.py                       # float32: about 50 minutes on 2 cores
    python examples/demo/train_base.py --precision bfloat16  # about half of that where the CPU multiplies bfloat16

Writes ``weights/base.safetensors`` (half precision) and ``weights/base.json`` (how it was made, and its accuracy as stored).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from fashion import HERE, Images, base_images, test_images, validation_images
from network import fashion_net
from safetensors.torch import load_file, save_file
from torch import nn
from training import accuracy, augment

WEIGHTS = HERE / "weights" / "base.safetensors"


def train(data: Images, *, epochs: int, batch: int, rate: float, precision: torch.dtype, seed: int) -> nn.Module:
    """SGD with momentum, one rise and fall of the learning rate, label smoothing."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = fashion_net().train()
    steps = len(data) // batch
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.25)
    validation = validation_images()
    for epoch in range(epochs):
        began = time.perf_counter()
        order = torch.randperm(len(data), generator=generator)
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            x, y = augment(data.images[chosen], generator), data.labels[chosen]
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}/{epochs}: loss {loss.item():.3f}, validation {accuracy(model, validation):.4f}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the Fashion-MNIST training files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()

    began = time.perf_counter()
    model = train(
        base_images(options.data),
        epochs=options.epochs,
        batch=options.batch,
        rate=options.rate,
        precision=getattr(torch, options.precision),
        seed=options.seed,
    )
    minutes = (time.perf_counter() - began) / 60
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}, WEIGHTS)
    stored = fashion_net()
    stored.load_state_dict(load_file(WEIGHTS))  # what the demo will run: half precision on disk, float32 in memory
    facts = {
        "trained": {k: v for k, v in vars(options).items() if k != "data"},
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "validation_accuracy": accuracy(stored, validation_images()),
        "test_accuracy": accuracy(stored, test_images()),
    }
    WEIGHTS.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
