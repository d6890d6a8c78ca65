"""How far samples go: what calibration and bit widths weigh a stage by."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np

from anytime.backend import TorchNet
from anytime.cost import In, account
from anytime.dataset import Part
from anytime.errors import Infeasible, Leak, Unsupported
from anytime.metrics import Floats, Ints, Predictions
from anytime.model import AnytimeModel
from anytime.policy import Policy
from anytime.spec import Spec

PARTS = ("calib", "tune")  # val is the fitted policies' own, hold the stackers', test nobody's


class Reached(NamedTuple):
    """How far each of N samples went, and what they ran."""

    last: Ints  # [N]: the last stage that it enters
    leaves: Floats  # [E]: share that leaves at each exit
    stage: Floats  # [E]: share that each stage is run for
    head: Floats  # [E]: share that each head is run for


@dataclass(frozen=True)
class Reach(Spec):
    """How far samples go in the float network under ``policy`` at ``budget``.

    ``budget``: fraction of the network's own last exit in FP32 MACs, every head that the policy reads included. The policy is
    fitted on the very samples that it is asked about: these must be outside training, and are never val, hold or test.
    Source: this project.
    """

    policy: Policy
    budget: float

    def estimate(self, model: AnytimeModel, part: Part) -> Reached:
        """What the samples of ``part`` do.

        Leak for parts other than calib and tune and for samples that the network was trained on; Infeasible under the
        cheapest path; Unsupported when nobody reaches the last stage.
        """
        if part.name not in PARTS:
            raise Leak(f"reach is estimated on {' or '.join(PARTS)}, not on {part.name}")
        if seen := part.sources & model.trained_on:
            raise Leak(
                f"reach: the network was trained on the samples of this {part.name} part (digest {min(seen)}) and is surer of "
                "them than of others; use weights that were trained on the split, or none of reach"
            )
        if model.n_exits == 1:  # nothing to decide: everyone goes all the way
            return _reached(np.zeros(len(part), dtype=np.int64), (0,), 1, model.restarts, self.label)
        net = TorchNet(model, {}, simulated=True)
        cost = In(account(net, tuple(part.x.shape[1:])), "macs")
        used = self.policy.uses(net.n_exits)
        full = cost.path(used, used[-1])
        # These samples stand in for val: what makes val honest holds for them, as was just checked, and fit checks it again.
        logits = net.predict(part.x.numpy())
        held = Predictions(logits, part.y.numpy(), "val", part.sources, model.trained_on)
        try:
            policy = self.policy.fit(held, cost, self.budget * full)
        except Infeasible as error:
            raise Infeasible(
                f"reach under {self.policy.label}: a budget of {self.budget:g} lies under the cheapest path; the least possible "
                f"is {ceil(1e4 * error.least / full) / 1e4:.4f} of the network's last exit",
                error.least / full,
            ) from error
        return _reached(policy.leave(held), policy.uses(net.n_exits), net.n_exits, model.restarts, self.label)

    def of(self, model: AnytimeModel, part: Part) -> Ints:
        """The last stage that each sample of ``part`` enters [N]; errors as ``estimate``."""
        return self.estimate(model, part).last


def _reached(exits: Ints, used: tuple[int, ...], n_exits: int, restarts: bool, label: str) -> Reached:
    stage = np.array([(exits >= k).mean() for k in range(n_exits)])
    if not stage[-1]:
        raise Unsupported(
            f"{label}: none of {len(exits)} samples goes beyond stage {exits.max() + 1} of {n_exits}, so the others cannot be "
            "calibrated: raise the budget or give more samples"
        )
    head = np.where(np.isin(np.arange(n_exits), used), stage, 0.0)
    leaves = np.bincount(exits, minlength=n_exits) / len(exits)
    return Reached(exits, leaves, head if restarts else stage, head)
