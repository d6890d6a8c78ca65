"""What does the harness cost on top of a bare training loop? ResNet-20 on CIFAR-10, batch 128, the same augmentation.

    python benchmarks/training.py [steps]

Both loops run over the same tensors in memory, in blocks of 10 steps in turn; medians of the blocks, and their ratio.
"""

import math
import statistics
import sys
import threading
import time
from queue import Queue

import torch
from keep import keep
from torch.nn.functional import cross_entropy

from anytime import cpu
from anytime.datasets.cifar import CIFAR10
from anytime.models.resnet import ResNet20
from anytime.train import Recipe, Trainer

BLOCK = 10


def bare(data, recipe: Recipe):
    """The loop that one would write without a harness; yields after each step."""
    torch.manual_seed(0)
    model = ResNet20().build((3, 32, 32), 10).to(memory_format=torch.channels_last).train()
    steps = math.ceil(len(data.train) / recipe.batch)
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(recipe.epochs):
        for i in torch.randperm(len(data.train), generator=generator).split(recipe.batch):
            x = data.augment(data.train.x[i], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):  # main has looked whether this CPU multiplies it
                logits = model(x)
            loss = cross_entropy(logits[0].float(), data.train.y[i])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            yield


def harness(data, recipe: Recipe):
    """Trainer.fit in a thread that runs only while it is asked for a step."""
    go, done = Queue(), Queue()

    def progress(what: str, step: int, total: int) -> None:
        done.put(None)
        go.get()

    def work() -> None:
        go.get()
        Trainer(recipe, data.train, 0, data.augment, progress=progress).fit(ResNet20().build((3, 32, 32), 10))

    threading.Thread(target=work, daemon=True).start()
    while True:
        go.put(None)
        done.get()
        yield


def main() -> None:
    """Time both in turn and print the ratio."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    data = CIFAR10().load(0)
    recipe = Recipe(
        epochs=30, lr=0.1, weight_decay=5e-4, optimizer="SGD", optimizer_args=(("momentum", 0.9), ("nesterov", True)),
        schedule="OneCycleLR", precision="bf16", device="cpu",
    )  # fmt: skip
    if not cpu.has_any(cpu.BF16_KERNELS):
        sys.exit("this CPU does not multiply bfloat16: the harness would train in fp32, and the bare loop imitate it")
    loops = {"bare": bare(data, recipe), "harness": harness(data, recipe)}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for block in range(steps // BLOCK + 1):
        for name, loop in list(loops.items())[:: 1 if block % 2 else -1]:
            started = time.perf_counter()
            for _ in range(BLOCK):
                next(loop)
            if block:  # the first block warms up
                times[name].append((time.perf_counter() - started) / BLOCK)
    a, b = (statistics.median(times[name]) for name in ("bare", "harness"))
    print(f"ResNet-20, batch 128, bf16: bare {1e3 * a:.1f} ms a step, harness {1e3 * b:.1f} ms, ratio {b / a:.3f}")
    keep("training", {"bare_ms": 1e3 * a, "harness_ms": 1e3 * b, "ratio": b / a})


if __name__ == "__main__":
    main()
