"""Ensembles: what members say together, what it costs, and torchensemble's own results on static networks."""

import copy
import math
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anytime.backend import Segment, TorchNet
from anytime.backends.ensembles import Bagging, Fusion, GradientBoosting, Snapshot, Stack, Voting
from anytime.backends.float import BFloat16, Float32
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.backends.qat import QAT
from anytime.boards.host import Host
from anytime.combiners import Sum, Vote, fitted, probabilities
from anytime.config import Cell, Experiment, Suite
from anytime.cost import In, account
from anytime.datasets.synthetic import Synthetic
from anytime.ensemble import Made
from anytime.ensemble_net import EnsembleNet, answers
from anytime.errors import Leak, Unsupported, UsageError
from anytime.execute import Executor
from anytime.metrics import Predictions, disagreement, double_fault, nll, softmax
from anytime.model import AnytimeModel, ModelSpec
from anytime.models.branchynet import BLeNet
from anytime.models.lenet import LeNet5
from anytime.models.static import Static
from anytime.policies.confidence import MaxProb
from anytime.record import load
from anytime.rows import rows
from anytime.run import Runner
from anytime.train import Recipe, Trainer
from anytime.workshop import Workshop
from tests.worlds import Restarting, Tiny, data, family, trained

X = data().test.x.numpy()
SHAPE = (3, 16, 16)


def votes(nets, inner_exits=False):
    counts = [1 + i for i, net in enumerate(nets) for _ in range(net.n_exits if inner_exits else 1)]
    return EnsembleNet(nets, [Vote([1 / m] * m) for m in counts], data().n_classes, inner_exits)


def made(backend, model=None):
    return backend.compress(model or trained(), data().calib, family())


def alone(net):
    """What the last exit says, and what the way there costs when no other head is run."""
    last = net.n_exits - 1
    costs = {what: account(net, SHAPE).path((last,), last, what) for what in ("macs", "bops", "params", "packed_bytes")}
    return net.predict(X)[-1], costs


# Equal members


@pytest.mark.parametrize(
    "backend, spec",
    [(Float32(), Tiny()), (PTQ(4, 8), Tiny()), (OnnxRuntime(of=PTQ()), Tiny()), (Float32(), Restarting())],
    ids=lambda v: v.label,
)
def test_n_copies_say_what_their_member_says_at_n_times_its_cost(backend, spec):
    net = made(backend, trained(spec))
    said, costs = alone(net)
    together = votes([pickle.loads(pickle.dumps(net)) for _ in range(3)])
    cost = account(together, SHAPE)
    for k, logits in enumerate(together.predict(X)):
        assert np.array_equal(logits, said)
        for what, one in costs.items():
            assert cost.path((k,), k, what) == (k + 1) * one
            assert cost.path((0, 1, 2), k, what) == (k + 1) * one  # heads cost nothing: they read what the members said
    assert set(together.bits) <= {name for name, _ in together.twin.named_modules()}
    assert {layer.weight_bits for layer in cost.layers} == {layer.weight_bits for layer in account(net, SHAPE).layers}


@given(
    st.lists(st.floats(-30, 30, width=32).filter(lambda z: z == 0 or abs(z) > 1e-3), min_size=2, max_size=10),
    st.integers(1, 7),
)
def test_a_vote_of_equals_changes_no_logit(row, m):
    z = torch.tensor(row, dtype=torch.float32)
    said = z.expand(1, m, len(row))
    for combine in (Vote([1 / m] * m), Sum([1 / m] * m)):
        assert combine(said)[0].numpy() == pytest.approx(z.numpy(), rel=1e-6, abs=1e-12)
        assert combine(said)[0].argmax() == z.argmax()


# Rules by hand


def test_a_vote_is_the_average_of_probabilities_and_a_sum_that_of_logits():
    z = np.random.default_rng(0).normal(size=(50, 3, 4)).astype(np.float32) * 3
    weights = [0.5, 0.2, 0.3]
    by_hand = (softmax(z) * np.array(weights)[:, None]).sum(1)
    assert softmax(Vote(weights)(torch.from_numpy(z)).numpy()) == pytest.approx(by_hand, abs=1e-6)
    assert Sum([2.0, 0.0, 1.0])(torch.from_numpy(z)).numpy() == pytest.approx(2 * z[:, 0] + z[:, 2], abs=1e-5)


def test_a_vote_of_members_that_are_sure_stays_finite():
    said = torch.tensor([[[2000.0, 0.0, 0.0], [1500.0, 0.0, 0.0]]])
    assert torch.isfinite(Vote([0.5, 0.5])(said)).all()


def test_disagreement_and_double_fault_by_hand():
    said, y = np.array([[0, 1, 2, 0], [0, 1, 1, 1], [0, 0, 1, 1]]), np.array([0, 1, 2, 2])
    assert disagreement(said) == pytest.approx((2 + 3 + 1) / 3 / 4)
    assert double_fault(said, y) == pytest.approx((1 + 1 + 2) / 3 / 4)


def test_fitted_weights_make_the_labels_likelier_than_any_others():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 400)
    z = rng.normal(size=(400, 3, 3)).astype(np.float32)
    z[np.arange(400), 0, y] += 2
    z[np.arange(400), 1, y] += 1.8  # the third knows nothing
    vote = fitted("weighted", torch.from_numpy(z), y, 0)
    assert vote.weights[2] < 0.05 < vote.weights[1] and vote.weights.sum() == pytest.approx(1)
    best = nll(vote(torch.from_numpy(z)).numpy(), y)
    for w in rng.dirichlet(np.ones(3), 200):
        assert best <= nll(Vote(w.tolist())(torch.from_numpy(z)).numpy(), y) + 1e-4


@pytest.mark.parametrize("how", ["mlp", "logistic", "gradient_boosting"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_combiners_say_what_scikit_learn_says(how, n_classes, monkeypatch):
    from sklearn import ensemble, linear_model, neural_network

    kind = {
        "mlp": neural_network.MLPClassifier, "logistic": linear_model.LogisticRegression,
        "gradient_boosting": ensemble.GradientBoostingClassifier,
    }[how]  # fmt: skip
    kept, fit = [], kind.fit
    monkeypatch.setattr(kind, "fit", lambda self, *a: kept.append(fit(self, *a)) or kept[-1])
    rng = np.random.default_rng(2)
    y = rng.integers(0, n_classes, 120)
    z = torch.from_numpy((rng.normal(size=(120, 2, n_classes)) + 2 * np.eye(n_classes)[y][:, None]).astype(np.float32))
    combine = fitted(how, z, y, 0)
    assert softmax(combine(z).numpy()) == pytest.approx(kept[0].predict_proba(probabilities(z).numpy()), abs=1e-5)
    again = pickle.loads(pickle.dumps(combine))
    assert torch.equal(again(z), combine(z))
    assert torch.equal(fitted(how, z[:, :1], y, 0)(z[:, :1]), z[:, 0])  # one member answers for itself


# torchensemble on a static network: the same weights at the start, whole batches, plain gradient descent


@dataclass(frozen=True)
class Plain(ModelSpec):
    """One hidden layer."""

    def build(self, input_shape, n_classes):
        return AnytimeModel(
            [nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 12), nn.ReLU())], [nn.Linear(12, n_classes)]
        )


class Flat(nn.Module):
    """As torchensemble wants it: [B, ...] -> [B, K]."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return self.of(x)[0]


@pytest.mark.parametrize(
    "backend, theirs, lr",
    [
        (Voting(Float32(), members=3), "VotingClassifier", 0.1),
        (Fusion(Float32(), members=3), "FusionClassifier", 0.1),
        (GradientBoosting(Float32(), members=3, shrinkage=0.5), "GradientBoostingClassifier", 0.02),
        (Snapshot(Float32(), members=3), "SnapshotEnsembleClassifier", 0.1),
    ],
    ids=lambda v: getattr(v, "label", ""),
)
def test_training_and_answers_are_those_of_torchensemble(backend, theirs, lr):
    torchensemble = pytest.importorskip("torchensemble")
    part, epochs = data().train, 6
    torch.manual_seed(0)
    begun = Plain().build(SHAPE, 4)
    recipe = Recipe(
        epochs=epochs, batch=len(part), lr=lr, weight_decay=0.0, optimizer="SGD", schedule="constant", channels_last=False
    )
    own = family(Plain(), recipe=recipe)

    def other(i=0, model=None, recipe=None, fresh=False):
        net, its = own.others(i, model, recipe or own.recipe, True)
        net.load_state_dict(begun.state_dict())  # theirs all begin from one network
        return (net if fresh else its.fit(net)), replace(its, others=other)

    first = copy.deepcopy(begun)
    own.fit(first)
    mine = backend.compress(first, data().calib, replace(own, others=other))

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(part.x, part.y), batch_size=len(part))
    reference = getattr(torchensemble, theirs)(
        estimator=Flat(copy.deepcopy(begun)), n_estimators=3, cuda=False,
        **({"shrinkage_rate": 0.5} if "Boosting" in theirs else {}),
    )  # fmt: skip
    # Their squared error is a mean over the classes too, ours a sum.
    reference.set_optimizer("SGD", lr=lr * (4 if "Boosting" in theirs else 1))
    args = {"use_reduction_sum": False} if "Boosting" in theirs else {}
    reference.fit(loader, epochs=epochs, save_model=False, **args)
    with torch.no_grad():
        proba = reference(data().test.x).numpy()
        before = begun(data().test.x)[0].softmax(-1).numpy()
    got = softmax(mine.predict(X)[-1])
    assert got == pytest.approx(proba, abs=2e-4)
    assert np.abs(before - proba).max() > 0.01  # something was learned that could differ


def test_bagging_draws_as_many_samples_with_replacement_and_averages_as_torchensemble_does(monkeypatch):
    model, seen, fit = trained(), [], Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, model, **k: seen.append(self.train) or fit(self, model, **k))
    net = Bagging(Float32(), members=3).compress(model, data().calib, family())
    n = len(data().train)
    assert len(seen) == 3 and all(len(part) == n for part in seen)
    for part in seen:
        assert len(torch.unique(part.x.flatten(1), dim=0)) / n == pytest.approx(1 - math.exp(-1), abs=0.06)
    assert not torch.equal(seen[0].y, seen[1].y)
    assert net.twin.trained_on == {data().train.digest}
    torchensemble = pytest.importorskip("torchensemble")
    reference = torchensemble.BaggingClassifier(estimator=Flat(Plain().build(SHAPE, 4)), n_estimators=3, cuda=False)

    class Last(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def forward(self, x):
            return self.of(x)[-1]

    reference.estimators_ = nn.ModuleList(Last(m.twin) for m in net.members).eval()
    with torch.no_grad():
        assert softmax(net.predict(X)[-1]) == pytest.approx(reference(data().test.x).numpy(), abs=1e-5)


# As a chain


@pytest.fixture(scope="module")
def int8():
    """A small net and a larger one, executed in INT8, the small one first."""
    backend = OnnxRuntime(of=PTQ())
    stack = Stack(members=((Tiny(), backend), (Tiny(width=4), backend)), combine="weighted")
    return stack.compress(trained(), data().calib, family())


def test_members_run_cheapest_first_and_what_ran_in_int8_is_known(int8):
    costs = [account(m, SHAPE).path((2,), 2, "bops") for m in int8.members]
    assert costs == sorted(costs) and costs[0] < costs[1]
    assert account(int8, SHAPE).path((1,), 1, "bops") == sum(costs)
    executed = int8.executed(X[:1])
    layers = {layer.layer for layer in account(int8, SHAPE).layers}
    assert layers <= set(executed) and {executed[layer] for layer in layers} == {"int8"}
    assert (int8.format, int8.execution, int8.simulated) == ("onnx", "ONNX Runtime", False)
    assert int8.facts["member 1"].startswith("Tiny(width=4) ") and "MACs" in int8.facts["member 1"]
    assert 0 <= float(int8.facts["double fault on tune"]) <= float(int8.facts["disagreement on tune"]) + 1
    assert data().hold.digest in int8.twin.trained_on


def test_policies_stop_between_members_and_pay_only_for_those_that_ran(int8):
    val = Predictions(int8.predict(data().val.x.numpy()), data().val.y.numpy(), "val")
    cost = In(account(int8, SHAPE), "macs")
    first, whole = cost.path((0,), 0), cost.path((0, 1), 1)
    policy = MaxProb().fit(val, cost, (first + whole) / 2)
    offline = int8.predict(X)
    exits = policy.exits(offline)
    assert set(exits) == {0, 1}
    ran = Executor(int8, policy, batch=16).run(X)
    assert np.array_equal(ran.exits, exits)
    assert np.array_equal(ran.logits.argmax(-1), policy.answer(offline, exits).argmax(-1))
    assert first < policy.spends(exits, 2, cost) < whole


@pytest.mark.parametrize("backend", [Float32(), BFloat16(), OnnxRuntime(of=PTQ())], ids=lambda b: b.label)
def test_inner_exits_are_exits_of_the_ensemble(backend):
    nets = [made(backend), made(backend, family().others(1)[0])]
    inner, outer = votes(nets, inner_exits=True), votes(nets)
    said, x = inner.predict(X), data().test.x[:20].numpy()
    assert said.shape[0] == 6
    assert np.abs(said[:3] - nets[0].predict(X)).max() <= 1e-5 * np.abs(said).max()
    assert np.array_equal(said[[2, 5]], outer.predict(X))
    pair = (softmax(nets[0].predict(X)[-1]) + softmax(nets[1].predict(X)[0])) / 2  # the second one's first exit
    assert softmax(said[3]) == pytest.approx(pair, abs=1e-5)
    cost, plain = account(inner, SHAPE), account(outer, SHAPE)
    assert cost.path((5,), 5) == plain.path((1,), 1)  # inner heads that nobody reads cost nothing
    assert cost.path((0, 5), 5) == plain.path((1,), 1) + account(nets[0], SHAPE).head.macs[0]
    twin = TorchNet(inner.twin, {}, simulated=True).predict(X)
    assert (twin.argmax(-1) == said.argmax(-1)).mean() > 0.97
    state = inner.start(x)  # link by link, as a board times it
    for k in range(6):
        state, nothing = inner.step(Segment(k, k + 1, None), state)
        _, logits = inner.step(Segment(k + 1, k + 1, k), state)
        assert nothing is None and np.allclose(logits, said[k, :20], atol=0.05 * np.abs(said).max())
    for exits in ((1, 4), (0, 3, 5)):
        state = inner.start(x)
        for segment in inner.plan(exits):
            state, logits = inner.step(segment, state)
            assert np.allclose(logits, said[segment.head, :20], atol=0.05 * np.abs(said).max())


def test_a_board_times_it(int8):
    timing = Host(launches=1, warmup=1).time([int8], X[:8])[0]
    assert timing.stage_ms.shape == (2, 8) and (timing.stage_ms > 0).all()


def test_members_of_two_engines_are_scored_and_no_board_times_them():
    net = votes([made(Float32()), made(OnnxRuntime(of=PTQ()))])
    assert Host().why_not(net) is not None and "onnx+torch" in Host().why_not(net)
    simulated = votes([made(Float32()), made(PTQ(4, 8))])
    assert "simulated" in Host().why_not(simulated)


# Members from a workshop


def test_members_are_trained_once_under_their_own_names(tmp_path):
    recipe = Recipe(epochs=2, batch=64, lr=1e-2)
    trainings = []
    spec = data_spec()

    def watch(what, done, total):
        if what.startswith("train") and done == total:
            trainings.append(what)

    def cell(backend, train_seed=0):
        return Cell(spec, Tiny(width=4), recipe, backend, train_seed, 0)

    shop = Workshop(tmp_path, watch)
    net = shop.net(cell(Voting(Float32(), members=2)))
    assert len(trainings) == 2
    assert "trained in" in net.facts["member 2"] and float(net.facts["trained_s"]) >= 0
    again = Workshop(tmp_path, watch)
    x = again.data(spec, 0).test.x.numpy()
    assert np.array_equal(again.net(cell(Voting(PTQ(), members=2))).twin.trained_on, net.twin.trained_on)
    # Float kernels may add up in another order where arrays lie otherwise in memory.
    np.testing.assert_allclose(again.net(cell(Voting(Float32(), members=2))).predict(x), net.predict(x), atol=1e-6)
    other = again.net(cell(Float32(), train_seed=1000))
    np.testing.assert_allclose(other.predict(x)[-1], net.members[1].predict(x)[-1], atol=1e-6)
    assert len(trainings) == 2  # the second member is what training seed 1000 trains
    again.net(cell(Snapshot(Float32(), members=2)))
    again.net(cell(Fusion(Float32(), members=2)))
    again.net(cell(GradientBoosting(Float32(), members=2)))
    again.net(cell(Bagging(Float32(), members=2)))
    assert len(trainings) == 2 + 2 + 1 + 2 + 2
    last = Workshop(tmp_path, watch)
    last.net(cell(GradientBoosting(PTQ(), members=2)))
    last.net(cell(Fusion(PTQ(), members=2)))
    assert len(trainings) == 9


def test_a_run_decides_between_members_with_thresholds_of_their_own(tmp_path):
    network, two, one = Static(Tiny()), Voting(Float32(), members=2), Stack(members=((Tiny(width=4), Float32()),))
    exp = Experiment(
        "ensembles", "Does it run?", (Suite(data_spec(), (network,)),), Recipe(epochs=2, batch=64, lr=1e-2), (Float32(), two, one),
        (MaxProb(),), (1.5, 2.0),
    )  # fmt: skip
    Runner(exp, tmp_path, log=lambda line: None).run()
    records = [r for r, _ in load(tmp_path / "records", "ensembles").records]
    assert sorted((r.kind, r.facts["backend"]) for r in records) == [
        *(("decide", two.label) for _ in exp.budgets),
        *(("eval", b.label) for b in sorted(exp.backends, key=lambda b: b.label)),
    ]
    table = rows(tmp_path / "records", "ensembles")
    exits = table[(table["backend"] == two.label) & table["exit"].notna()]
    assert len(exits) == 2 and exits["loss"].notna().all()  # each against the last exit of the network alone
    assert exits["loss"].iloc[0] == 0  # the first member is that network


def data_spec():
    return Synthetic(n=600, noise=0.25, size=16, channels=3, n_classes=4)


def test_lenet5_has_the_size_that_it_is_known_for():
    net = LeNet5().build((3, 32, 32), 10)
    assert sum(p.numel() for p in net.parameters()) == 62_006
    by_hand = 28**2 * 6 * 75 + 10**2 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert account(TorchNet(net, {}, False), (3, 32, 32)).macs.tolist() == [by_hand]
    with pytest.raises(UsageError, match="width=0"):
        LeNet5(width=0.0)


# What cannot be


def test_what_cannot_be_an_ensemble_is_refused_with_the_reason():
    calib, shop = data().calib, family()

    def refused(kind, said, backend, trainer=shop, model=None):
        with pytest.raises(kind, match=said):
            backend.compress(model or trained(), calib, trainer)

    pair = ((Tiny(), Float32()), (Tiny(width=4), Float32()))
    refused(UsageError, "hold part that no member saw", Stack(members=pair, combine="mlp"), replace(shop, hold=None))
    refused(UsageError, "hold part that no member saw", Stack(members=pair, combine="logistic"), replace(shop, hold=empty()))
    refused(Unsupported, "member 2, B-LeNet, cannot be built: .*1x28x28", Stack(members=(pair[0], (BLeNet(), Float32()))))
    refused(Unsupported, "`of` would train it towards the labels", GradientBoosting(QAT(epochs=1), members=2))
    refused(UsageError, "2 epochs are not 3 cycles", Snapshot(Float32(), members=3))
    refused(UsageError, "knows of no other networks", Voting(Float32()), replace(shop, others=None))
    seen = replace(data().train, digest=data().hold.digest)
    leaking = family(train=seen)
    refused(Leak, r"Tiny\S* Float32 was trained on samples of the hold part", Stack(members=pair, combine="mlp"), leaking)
    one = replace(data().hold, x=data().hold.x[data().hold.y != 2], y=data().hold.y[data().hold.y != 2])
    refused(UsageError, "no sample of class 2", Stack(members=pair, combine="logistic"), replace(shop, hold=one))
    restarting = Stack(members=((Restarting(), Float32()),), inner_exits=True)
    refused(Unsupported, "starts again from the input", restarting, family(Restarting()), trained(Restarting()))
    with pytest.raises(UsageError, match="members=0"):
        Voting(Float32(), members=0)
    with pytest.raises(UsageError, match="members is empty"):
        Stack()
    with pytest.raises(UsageError, match="shrinkage=0"):
        GradientBoosting(Float32(), shrinkage=0.0)


def empty():
    return replace(data().hold, x=data().hold.x[:0], y=data().hold.y[:0])


def test_members_must_know_the_same_classes_and_take_the_same_inputs():
    nets = [TorchNet(Tiny().build((3, 16, 16), 4), {}, False), TorchNet(Tiny().build((3, 16, 16), 5), {}, False)]
    grey = TorchNet(Tiny().build((1, 16, 16), 4), {}, False)
    stack = Stack(members=((Tiny(), Float32()),))

    def join(*members):
        stack.joined([Made(f"member {i}", m, None) for i, m in enumerate(members)], "weighted", data().calib, family())

    with pytest.raises(Unsupported, match="member 1 knows 5 classes, member 0 4"):
        join(*nets)
    with pytest.raises(Unsupported, match="member 1 does not take inputs of 3x16x16"):
        join(nets[0], grey)


def test_published_weights_make_no_ensemble_of_themselves():
    @dataclass(frozen=True)
    class Published(Tiny):
        """Weights that came from elsewhere."""

        def build(self, input_shape, n_classes):
            net = super().build(input_shape, n_classes)
            net.trained_on = frozenset({"published"})
            return net

    with pytest.raises(Unsupported, match="every member would be the same"):
        Voting(Float32()).compress(trained(), data().calib, family(Published()))


@settings(max_examples=20)
@given(st.permutations(range(3)), st.booleans())
def test_a_combiner_reads_every_member_that_is_done(order, inner):
    nets = [TorchNet(Tiny(width=4).build((3, 16, 16), 4), {}, False) for _ in order]
    nets = [nets[i] for i in order]
    said = answers(nets, X[:3], inner)
    assert [z.shape[1] for z in said] == ([1] * 3 + [2] * 3 + [3] * 3 if inner else [1, 2, 3])
    for m, z in enumerate(said[2::3] if inner else said):
        assert np.array_equal(z, np.stack([net.predict(X[:3])[-1] for net in nets[: m + 1]], 1))
