"""What several experiments share."""

from dataclasses import replace

from anytime.losses import Loss, Rising
from anytime.train import Recipe

TRUNK_EPOCHS, JOINT_EPOCHS = 40, 20
CIFAR_EPOCHS = TRUNK_EPOCHS + JOINT_EPOCHS
CHECKPOINT = "../shared/data/checkpoints/resnet20_cifar10/resnet20-12fca82f.th"  # akamaster/pytorch_resnet_cifar10


def cifar_recipe(loss: Loss) -> Recipe:
    """How every residual network on CIFAR-10 is trained here: SGD with one cycle of the learning rate, bf16,
    60 epochs, a square of 8 pixels painted over. The cycle takes the momentum from 0.95 to 0.85 and back, whose mean is the 0.9
    given here. (40 epochs without it gave SDN ResNet-56 91.6 % on val and 98.2 % on train.)

    About 45 s an epoch for a ResNet-20 on 2 quiet cores, nearly three times that for a ResNet-56.
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
        cutout=8,
    )


def trunk_first_recipe() -> Recipe:
    """The same 60 epochs in two cycles: 40 of the network without exits, then 20 of all exits, their weights rising as SDN's do.

    The twin without exits gets the same two cycles, and both share the first: a third less to train than each from scratch.
    """
    return replace(cifar_recipe(Rising()), start="static", trunk_epochs=TRUNK_EPOCHS, epochs=JOINT_EPOCHS)


def short_cifar_recipe() -> Recipe:
    """The same with 30 epochs and nothing painted over: how the zoo's SDN on ResNet-20 and its static twin were trained."""
    return replace(cifar_recipe(Rising()), epochs=30, cutout=0)


def branchy_recipe() -> Recipe:
    """How B-LeNet and B-AlexNet are trained here: the network without exits for 20 epochs, then all exits for 20 more."""
    return Recipe(epochs=20, batch=128, lr=1e-3, weight_decay=1e-4, start="static", precision="bf16")
