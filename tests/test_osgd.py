"""OSGD against numbers worked by hand, and what must hold for all gradients."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anytime.losses import Joint
from anytime.models.branchynet import BLeNet
from anytime.osgd import OSGD, apart, orthogonalized
from tests.worlds import Tiny


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_three_tasks_by_hand():
    # <g2,g1>/|g1|^2 = 10/25; <g3,g1>/|g1|^2 = 35/25, what is left of g3 is (0.8, -0.6, 5), <.,g2'>/|g2'|^2 = 11/5
    (a,), (b,), (c,) = orthogonalized([[t(3, 4, 0)], [t(2, 1, 2)], [t(5, 5, 5)]])
    assert torch.equal(a, t(3, 4, 0))
    assert torch.allclose(b, t(0.8, -0.6, 2))
    assert torch.allclose(c, t(-0.96, 0.72, 0.6))


def test_the_whole_vector_or_every_tensor_by_itself():
    gradients = [[t(3), t(4)], [t(2), t(1)]]
    assert torch.allclose(torch.cat(orthogonalized(gradients)[1]), t(0.8, -0.6))
    assert torch.cat(orthogonalized(gradients, per_tensor=True)[1]).tolist() == [0, 0]


@pytest.mark.parametrize("none", [None, t(0)], ids=["none", "zeros"])
def test_what_one_task_touches_alone_neither_moves_nor_counts(none):
    """Trunk, a deeper trunk, two heads: only the first is shared, however large the rest."""
    first, second = orthogonalized([[t(3, 4), none, t(100), none], [t(2, 1), t(7), none, t(9)]])
    assert first[1] == first[3] == second[2] == none
    assert torch.allclose(second[0], t(0.8, -0.6)) and second[1] == 7 and second[3] == 9


@pytest.mark.parametrize("spec, shape", [(BLeNet(), (1, 28, 28)), (Tiny(), (3, 16, 16))], ids=lambda v: getattr(v, "label", ""))
def test_exits_of_a_network_end_orthogonal_over_what_they_share_and_heads_step_as_they_would_alone(spec, shape):
    """The way of a training: all terms of one loss of the stacked logits, through which torch gives zeros where nothing is touched."""
    torch.manual_seed(0)
    model, x, y = spec.build(shape, 10).double(), torch.randn(16, *shape, dtype=torch.float64), torch.arange(16) % 10
    parameters = dict(model.named_parameters())

    def terms():
        torch.manual_seed(0)  # dropout
        return list(Joint()(model(x), y, 0.0, {}))

    own = [torch.autograd.grad(term, parameters.values(), retain_graph=True) for term in terms()]
    after = [dict(zip(parameters, task, strict=True)) for task in orthogonalized([list(task) for task in own])]
    for s, task in enumerate(after):
        for j, earlier in enumerate(after[:s]):
            shared = [name for name in parameters if name.startswith(tuple(f"stages.{k}." for k in range(j + 1)))]
            a, b = (torch.cat([of[name].flatten() for name in shared]) for of in (task, earlier))
            assert abs(a @ b) < 1e-9 * a.norm() * b.norm()
    OSGD(torch.optim.SGD(model.parameters(), lr=0.1)).backward(terms())
    for k, gradients in enumerate(own):
        for (name, p), alone in zip(parameters.items(), gradients, strict=True):
            assert not name.startswith(f"heads.{k}.") or torch.equal(p.grad, alone), name


def test_a_loss_of_one_exit_goes_back_no_further_than_its_stages():
    torch.manual_seed(0)
    model, x, y = Tiny().build((3, 16, 16), 10).eval(), torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert torch.equal(apart(model.exits)(x), model(x))
    for k, (term, same) in enumerate(zip(*(Joint()(run(x), y, 0.0, {}) for run in (apart(model.exits), model)), strict=True)):
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        through = torch.autograd.grad(same, parameters, retain_graph=True)
        for name, mine, theirs in zip(names, found, through, strict=True):
            own = name.startswith((f"heads.{k}.", *(f"stages.{i}." for i in range(k + 1))))
            assert torch.equal(mine, theirs) if own else mine is None and not theirs.any(), name


def test_a_task_without_a_gradient_takes_nothing_off():
    assert torch.equal(orthogonalized([[t(0, 0)], [t(2, 1)]])[1][0], t(2, 1))
    assert torch.equal(orthogonalized([[t(1, 1), None], [None, t(2)]])[1][1], t(2))


def test_it_goes_through_any_optimizer_momentum_after_projection():
    p, head = torch.nn.Parameter(t(0, 0)), torch.nn.Parameter(t(1))
    unused = torch.nn.Parameter(t(5))
    osgd = OSGD(torch.optim.SGD([p, head, unused], lr=0.1, momentum=0.5))
    total = t(3.8, 3.4)  # (3, 4) + (0.8, -0.6)
    for step, velocity in enumerate((1, 1.5), start=1):  # v2 = 0.5 v1 + g
        before = p.detach().clone()
        osgd.backward([(p * t(3, 4)).sum(), (p * t(2, 1)).sum() + 2 * head.sum()])
        assert torch.allclose(p.grad, total) and head.grad == 2 and unused.grad is None
        osgd.optimizer.step()
        assert torch.allclose(before - p.detach(), 0.1 * velocity * total), step


def test_tasks_that_agree_on_nothing_are_plain_joint_sgd():
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randn(8, 6)
    a, b = torch.nn.Linear(4, 2), torch.nn.Linear(6, 2)
    parameters = [*a.parameters(), *b.parameters()]
    losses = lambda: [a(x).square().sum(), b(y).square().sum()]  # noqa: E731
    OSGD(torch.optim.SGD(parameters, lr=0.1)).backward(losses())
    ours = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    sum(losses()).backward()
    assert all(torch.equal(mine, p.grad) for mine, p in zip(ours, parameters, strict=True))


numbers = st.floats(-10, 10).filter(lambda v: v == 0 or abs(v) > 1e-3)  # not the rounding of tiny norms


@given(st.lists(arrays(np.float64, (4, 3), elements=numbers), min_size=2, max_size=4), st.booleans())
def test_what_exits_of_a_chain_share_ends_orthogonal(drawn, per_tensor):
    """Task s touches parameters 0 .. s, as exit s touches the stages up to its own."""
    assume(all(g[: s + 1].any(1).all() for s, g in enumerate(drawn)))  # zeros are not touched
    before = [[torch.from_numpy(g) if i <= s else None for i, g in enumerate(task)] for s, task in enumerate(drawn)]
    after = orthogonalized(before, per_tensor)
    assert all(torch.equal(a, b) for a, b in zip(after[0][:1], before[0][:1], strict=True))
    for s in range(len(drawn)):
        assert torch.equal(after[s][s], before[s][s])  # nobody earlier touches it
        for j in range(s):
            dots = [float(after[s][i] @ after[j][i]) for i in range(j + 1)]
            assert dots == pytest.approx([0] * len(dots), abs=1e-6) if per_tensor else sum(dots) == pytest.approx(0, abs=1e-6)


@given(arrays(np.float64, (2, 6), elements=numbers))
def test_orthogonal_gradients_are_left_alone(drawn):
    """Gradients on disjoint halves of one tensor: the sum is that of plain joint SGD."""
    a, b = torch.from_numpy(drawn.copy())
    a[3:], b[:3] = 0, 0
    first, second = orthogonalized([[a], [b]])
    assert torch.equal(first[0] + second[0], a + b)
