"""What do bias correction and re-estimated BatchNorm give back of what few bits take?

    ANYTIME_DATA=... python benchmarks/repair.py

SDN ResNet-20 of results/zoo, weights of 8, 4 and 3 bits and activations of 8, rounded to nearest, 1,024 calibration images; judged on
tune and val, never test, by what each exit says beside the float network.
"""

from reconstruct import NETWORKS, judged, logits, say, trained

from anytime.backends.ptq import PTQ
from anytime.errors import Collapsed
from anytime.train import Recipe, Trainer


def main() -> None:
    """Print a line for each width and repair."""
    model, data = trained(NETWORKS["sdn"])
    images, labels = judged(data)
    wanted = logits(model, images)
    say("float", wanted, wanted, labels)
    for bits in (8, 4, 3):
        for name, repair in {
            "nearest": {},
            "biases": {"correct_bias": True},
            "BatchNorm": {"reestimate_bn": True},
            "both": {"reestimate_bn": True, "correct_bias": True},
        }.items():
            backend = PTQ(bits, 8, **repair)  # type: ignore[arg-type]
            try:
                net = backend.compress(model, data.calib, Trainer(Recipe(), data.train, 0))
            except Collapsed as error:
                print(f"W{bits}A8 {name}: {error}")
                continue
            say(f"W{bits}A8 {name}", logits(net.twin, images), wanted, labels)


if __name__ == "__main__":
    main()
