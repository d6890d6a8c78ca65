"""What the members of an ensemble say together: logits [B, m, K] -> logits [B, K]."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anytime.errors import UsageError
from anytime.metrics import Floats, Ints

Fit = Literal["weighted", "mlp", "logistic", "gradient_boosting"]  # combiners that learn from labels
ROUNDS = 200  # of expectation-maximization over the weights of a vote
HIDDEN = 32  # neurons of the MLP


class Vote(nn.Module):
    """The members' probabilities averaged with ``weights`` [m] of sum 1.

    Answers log(sum_i w_i p_i) + sum_i w_i lse_i: its softmax is the average, and the logits of equal members are theirs. In numpy,
    which takes a third of torch's time for a sample.
    Source: torchensemble 0.2.0, VotingClassifier, strategy "soft"; with weights the linear opinion pool (Stone 1961).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights: Floats = np.array(weights)

    def forward(self, said: Tensor) -> Tensor:
        if len(self.weights) == 1:
            return said[:, 0]
        z = said.detach().numpy().astype(np.float64)
        top = z.max(-1, keepdims=True)
        p = np.exp(z - top)
        total = p.sum(-1, keepdims=True)
        mean = np.maximum(self.weights @ (p / total), np.finfo(np.float64).tiny)  # what is impossible keeps a logarithm
        return torch.from_numpy((np.log(mean) + self.weights @ (top + np.log(total))).astype(np.float32))


class Sum(nn.Module):
    """The members' logits added up with ``weights`` [m].

    Source: torchensemble 0.2.0, FusionClassifier (weights 1/m) and GradientBoostingClassifier (weights ``shrinkage_rate``).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights: Floats = np.array(weights)

    def forward(self, said: Tensor) -> Tensor:
        return torch.from_numpy((self.weights @ said.detach().numpy().astype(np.float64)).astype(np.float32))


class Stacked(nn.Module):
    """A small network ``of`` on the members' probabilities side by side [B, m x K]."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, said: Tensor) -> Tensor:
        z: Tensor = self.of(probabilities(said))
        return z


class Trees(nn.Module):
    """What a fitted scikit-learn classifier makes of the members' probabilities; it multiplies nothing, so it counts no MAC."""

    def __init__(self, fitted: Any) -> None:
        super().__init__()
        self.fitted = fitted

    def forward(self, said: Tensor) -> Tensor:
        scores = self.fitted.decision_function(probabilities(said).detach().numpy())
        if scores.ndim == 1:  # two classes: what speaks for the second
            scores = np.stack([np.zeros_like(scores), scores], -1)
        return torch.from_numpy(scores).float()


def probabilities(said: Tensor) -> Tensor:
    """Logits [B, m, K] -> the members' softmaxes side by side [B, m x K], float32."""
    return said.double().softmax(-1).flatten(1).float()


def fitted(how: Fit, said: Tensor, y: Ints, seed: int) -> nn.Module:
    """The combiner ``how`` learned from logits [N, m, K] and labels [N].

    "weighted": the weights of a Vote that make the labels likeliest, by expectation-maximization; "mlp": one hidden layer of
    32 neurons; "logistic" and "gradient_boosting": scikit-learn's classifiers at their defaults. One member answers alone.
    Source: Wolpert, "Stacked generalization", 1992; scikit-learn's MLPClassifier, LogisticRegression and
    GradientBoostingClassifier; EM for mixture weights: Dempster, Laird, Rubin 1977, section 4.3.
    """
    n_members, n_classes = said.shape[1:]
    if n_members == 1:
        return Vote([1.0])
    if how == "weighted":
        p = said.double().softmax(-1)[torch.arange(len(y)), :, torch.from_numpy(y)].clamp_min(1e-300)
        w = torch.full((n_members,), 1 / n_members, dtype=torch.float64)
        for _ in range(ROUNDS):
            w = (w * p / (p @ w)[:, None]).mean(0)
        return Vote((w / w.sum()).tolist())
    if absent := sorted(set(range(n_classes)) - set(y.tolist())):
        raise UsageError(f"the hold part has no sample of class {absent[0]}, so no combiner can learn it: give a larger hold")
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    x = probabilities(said).numpy()
    if how == "gradient_boosting":
        return Trees(GradientBoostingClassifier(random_state=seed).fit(x, y))
    if how == "logistic":
        linear = LogisticRegression(max_iter=1000).fit(x, y)
        return Stacked(_linear(linear.coef_.T, linear.intercept_, n_classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a thousand rounds are enough
        mlp = MLPClassifier((HIDDEN,), max_iter=1000, random_state=seed).fit(x, y)
    (into, out), (b_into, b_out) = mlp.coefs_, mlp.intercepts_
    return Stacked(nn.Sequential(_linear(into, b_into, HIDDEN), nn.ReLU(), _linear(out, b_out, n_classes)))


def _linear(weight: Floats, bias: Floats, n_out: int) -> nn.Linear:
    """A layer from scikit-learn's weight [in, out]; of two classes it has only what speaks for the second."""
    if weight.shape[1] < n_out:
        weight, bias = np.pad(weight, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    layer = nn.Linear(*weight.shape).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight.T)))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer
