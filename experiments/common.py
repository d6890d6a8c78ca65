"""What several experiments share."""

from anytime.losses import Loss
from anytime.train import Recipe

CIFAR_EPOCHS = 40


def cifar_recipe(loss: Loss) -> Recipe:
    """How every residual network on CIFAR-10 is trained here: SGD with one cycle of the learning rate, bf16, 40 epochs.

    About 30 s an epoch for a ResNet-20 on 2 quiet cores, three times that for a ResNet-56.
    """
    return Recipe(
        epochs=CIFAR_EPOCHS,
        batch=128,
        lr=0.1,
        weight_decay=5e-4,
        optimizer="SGD",
        optimizer_args=(("momentum", 0.9), ("nesterov", True)),
        schedule="OneCycleLR",
        loss=loss,
        precision="bf16",
    )
