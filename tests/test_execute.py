"""The executor gives the offline answers, for every policy, batch size, exit pattern and engine."""

import gc
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytime.backend import TorchNet
from anytime.errors import AnytimeError, UsageError
from anytime.execute import Broken, Executor
from anytime.metrics import Predictions
from anytime.onnx_net import OnnxNet, OpenVINONet, written
from anytime.policies.confidence import Entropy, MaxProb
from anytime.policies.fixed import Fixed
from anytime.policies.patience import Patience
from anytime.policies.sdn import SDN
from anytime.quant.graph import Widths, prepared
from anytime.quant.trace import traced
from tests.contracts import policy as contract
from tests.test_contract_policy import KEEPERS
from tests.worlds import Restarting, Tiny, data, trained

N_EXITS, K = 4, 3


class Seg(NamedTuple):
    first: int
    head: int


class Net:
    """A chain in numpy whose state is a tuple: what came in, and what was seen on the way. Logits need both.

    ``restarts``: the state that goes on is the input.  ``every``: the plan holds every head, also those that nobody asked for.
    """

    n_exits = N_EXITS

    def __init__(self, restarts=False, every=False):
        rng = np.random.default_rng(3)
        self.w = rng.normal(size=(N_EXITS, 5, 5)).astype(np.float32)
        self.heads = rng.normal(size=(N_EXITS, 10, K)).astype(np.float32) * 0.6
        self.restarts, self.every = restarts, every
        self.sizes = []

    def plan(self, exits):
        heads = range(max(exits) + 1) if self.every else sorted(exits)
        return [Seg(first, k) for first, k in zip([0, *(k + 1 for k in heads)], heads, strict=False)]

    def start(self, x):
        assert x.dtype == np.float32
        return x if self.restarts else (x, [np.zeros_like(x)])

    def step(self, segment, state):
        k = segment.head
        x, seen = (state, np.zeros_like(state)) if self.restarts else (state[0], state[1][0])
        self.sizes.append((k, len(x)))
        for stage in [k] if self.restarts else range(segment.first, k + 1):
            seen = np.tanh(seen + np.einsum("bi,ij->bj", x, self.w[stage]))  # no BLAS: nothing depends on the company
        logits = np.einsum("bi,ij->bj", np.concatenate([x, seen], 1), self.heads[k])
        if self.restarts:
            return state, logits
        return (x, [seen]), logits


def samples(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)


def predicted(net, x):
    state, rows = net.start(x), []
    for segment in net.plan(range(N_EXITS)):
        state, logits = net.step(segment, state)
        rows.append(logits)
    return np.stack(rows)


def oracle(net, policy, x):
    logits = predicted(net, x)
    exits = policy.exits(logits)
    return exits, policy.answer(logits, exits)


thresholds = st.lists(st.floats(0.3, 1.05), min_size=N_EXITS - 1, max_size=N_EXITS - 1)
policies = st.one_of(
    st.integers(-N_EXITS, N_EXITS - 1).map(lambda k: Fixed(exit=k)),
    thresholds.map(lambda t: MaxProb(thresholds=tuple(t))),
    thresholds.map(lambda t: Entropy(thresholds=tuple(t))),
    st.integers(0, N_EXITS).map(lambda p: Patience(patience=p)),
)


def check(executor, policy, n, batch, seed=0, **net):
    """The contract: answers equal the oracle's, in both forms, bit for bit."""
    x = samples(n, seed)
    exits, logits = oracle(Net(restarts=net.get("restarts", False)), policy, x)
    ran = executor(Net(**net), policy, batch).run(x)
    np.testing.assert_array_equal(ran.place, np.arange(n))
    np.testing.assert_array_equal(ran.exits, exits)
    np.testing.assert_array_equal(ran.logits.reshape(-1, K), logits)
    seen = np.zeros(n, int)
    for block in executor(Net(**net), policy, batch).stream(iter(x)):
        seen[block.place] += 1
        np.testing.assert_array_equal(block.exits, exits[block.place])
        np.testing.assert_array_equal(block.logits, logits[block.place])
        assert (block.ms >= 0).all()
    assert (seen == 1).all()


@settings(max_examples=150)
@given(
    policies, st.integers(0, 40), st.integers(1, 17), st.integers(0, 5), st.booleans(), st.booleans()
)  # fmt: skip
def test_answers_are_the_oracles(policy, n, batch, seed, restarts, every):
    check(Executor, policy, n, batch, seed, restarts=restarts, every=every)


@pytest.mark.parametrize("policy", [p for p in KEEPERS.values() if not p.bound], ids=lambda p: p.label)
def test_every_policy_gives_the_oracles_answers(policy):
    logits = predicted(Net(), samples(120, seed=9))
    val, cost = Predictions(logits, logits[-1].argmax(-1), "val"), contract.costs(N_EXITS)
    for budget in contract.budgets(policy, val, cost, 4):
        for batch in (1, 7, 64):
            check(Executor, policy.fit(val, cost, budget), 50, batch)
            check(Executor, policy.fit(val, cost, budget).tempered((0.7, 1.1, 1.3, 2.0)), 50, batch)


def test_a_bound_is_nobodys_to_run():
    bounds = [p for p in KEEPERS.values() if p.bound]
    for policy in bounds:
        with pytest.raises(UsageError, match="no board can know"):
            Executor(Net(), policy)


MIXED = MaxProb(thresholds=(0.8, 0.8, 0.8))  # some leave at every exit


def test_the_examples_leave_everywhere():
    exits, _ = oracle(Net(), MIXED, samples(60))
    assert (np.bincount(exits, minlength=N_EXITS) > 3).all()


class ForgetsOneTensor(Executor):
    """Compacts the first tensor of a state only; the other keeps its first rows, so that shapes still fit."""

    def rows(self, state, keep):
        if isinstance(state, tuple | list):
            return (super().rows(state[0], keep), *(self.rows(s, np.arange(len(keep))) for s in state[1:]))
        return super().rows(state, keep)


class MixesUp(Executor):
    """Joins the logits that were read in another order than the states."""

    def join(self, states):
        return super().join(states[::-1])


@pytest.mark.parametrize("saboteur", [ForgetsOneTensor, MixesUp])
def test_a_broken_executor_is_caught(saboteur):
    check(Executor, MIXED, 60, 7)
    with pytest.raises(AssertionError):
        check(saboteur, MIXED, 60, 7)


def test_batches_stay_dense_and_memory_is_bounded():
    """Deeper segments wait for a full batch; only at the end of the input does one run with fewer."""
    net, batch, n = Net(), 8, 400
    asked = 0

    def source():
        nonlocal asked
        for x in samples(n):
            asked += 1
            yield x

    answered, most = 0, 0
    for block in Executor(net, MIXED, batch).stream(source()):
        answered += len(block.place)
        most = max(most, asked - answered)
    assert answered == n
    assert most <= batch * N_EXITS
    for k in range(1, N_EXITS):
        sizes = [size for head, size in net.sizes if head == k]
        assert len(sizes) > 3 and all(size == batch for size in sizes[:-2])
    ran = sum(size for _, size in net.sizes)
    exits, _ = oracle(Net(), MIXED, samples(n))
    assert ran == (exits + 1).sum()  # nobody who left was computed again, nothing was padded


def test_batch_one_answers_before_it_asks_for_more():
    asked = []

    def source():
        for i, x in enumerate(samples(20)):
            asked.append(i)
            yield x

    for block in Executor(Net(), MIXED, 1).stream(source()):
        assert block.place.tolist() == [asked[-1]]


def test_heads_that_nobody_reads_are_not_run():
    net = Net()
    Executor(net, Fixed(exit=2), 5).run(samples(11))
    assert {head for head, _ in net.sizes} == {2}


class Failing(Net):
    """Breaks in step ``at``: by an exception, NaN, or want of memory."""

    def __init__(self, how, at):
        super().__init__()
        self.how, self.left = how, at

    def step(self, segment, state):
        self.left -= 1
        state, logits = super().step(segment, state)
        if self.left == 0:
            if isinstance(self.how, BaseException):
                raise self.how
            logits[len(logits) // 2] = self.how
        return state, logits


@pytest.mark.parametrize(
    "how, said",
    [
        (np.nan, "not finite"), (np.inf, "not finite"), (RuntimeError("kernel died\nlong story"), "the engine failed on"),
        (MemoryError(), "give a batch under 8"),
    ],
)  # fmt: skip
def test_an_engine_that_breaks_takes_nothing_back(how, said):
    x = samples(40)
    exits, logits = oracle(Net(), MIXED, x)
    with pytest.raises(Broken, match=said) as caught:
        Executor(Failing(how, 6), MIXED, 8).run(x)
    assert "story" not in str(caught.value)
    kept = caught.value.answered
    assert 0 < len(kept.place) < 40
    np.testing.assert_array_equal(kept.exits, exits[kept.place])
    np.testing.assert_array_equal(kept.logits, logits[kept.place])
    got = []
    with pytest.raises(AnytimeError, match=said):
        for block in Executor(Failing(how, 6), MIXED, 8).stream(x):
            got += block.place.tolist()
    assert sorted(got) == sorted(kept.place.tolist())


@pytest.mark.parametrize(
    "how, said",
    [
        (np.nan, "^exit [1-4] answers with logits that are not finite, for sample 4$"),
        (RuntimeError("kernel died"), "^segment [1-4] of 4: the engine failed on sample 4: kernel died$"),
        (MemoryError(), "^segment [1-4] of 4: no memory for one sample$"),
    ],
)  # fmt: skip
def test_an_engine_that_breaks_on_a_sample_alone_names_it(how, said):
    x = samples(10)
    exits, logits = oracle(Net(), MIXED, x)
    with pytest.raises(Broken, match=said) as caught:
        Executor(Failing(how, int((exits[:4] + 1).sum()) + 1), MIXED, 1).run(x)
    np.testing.assert_array_equal(caught.value.answered.logits, logits[:4])


@pytest.mark.parametrize("batch", [1, 8])
def test_a_policy_that_answers_with_what_it_has_not_read_is_an_error(batch):
    class Greedy(MaxProb):
        def answer(self, logits, exits):
            return logits[-1]

    with pytest.raises(AnytimeError, match="exits that were not read"):
        Executor(Net(), Greedy(thresholds=(0.8,) * 3), batch).run(samples(20))


def test_questions_without_sense():
    with pytest.raises(UsageError, match="batch=0"):
        Executor(Net(), MIXED, 0)
    with pytest.raises(UsageError, match=r"sample 1 has the shape \(4,\)"):
        list(Executor(Net(), MIXED, 8).stream([np.zeros(5, np.float32), np.zeros(4, np.float32)]))
    assert list(Executor(Net(), MIXED, 8).stream([])) == []
    assert len(Executor(Net(), MIXED, 8).run(samples(0)).place) == 0


def test_a_stream_may_be_left_early():
    source = iter(samples(100))
    flow = Executor(Net(), MIXED, 4).stream(source)
    next(flow)
    flow.close()
    gc.collect()
    assert len(list(source)) > 50  # what it had not asked for is still the user's


# Engines


def engines(spec):
    """A trained network under every engine: name, network, whether a sample's result depends on its company."""
    float_chain = traced(trained(spec))
    chain = prepared(trained(spec), data().calib.x, Widths(8, 8), "u8s8", "mse", "mse").freeze(round_bias=True)

    def writes(chain):
        return lambda segment: written(chain, (3, 16, 16), segment)

    yield "torch", TorchNet(trained(spec), {}, simulated=False), True
    yield "fake-quant", TorchNet(chain, {}, simulated=True), True
    yield "ONNX Runtime FP32", OnnxNet(trained(spec), {}, writes(float_chain), {}), True
    yield "ONNX Runtime INT8", OnnxNet(chain, {}, writes(chain), {}), False
    if find_spec("openvino"):
        yield "OpenVINO INT8", OpenVINONet(chain, {}, writes(chain), {}), True


def between(scores):
    """A threshold in the middle of the widest gap near the median: no engine's rounding crosses it."""
    s = np.sort(scores)[len(scores) // 3 : 2 * len(scores) // 3]
    widest = int(np.argmax(np.diff(s)))
    return float((s[widest] + s[widest + 1]) / 2)


@pytest.mark.parametrize("spec", [Tiny(), Restarting()], ids=["chain", "restarts"])
def test_every_engine_gives_its_own_offline_answers(spec):
    x = data().test.x[:80].numpy()
    for name, net, depends in engines(spec):
        logits = net.predict(x)
        for kind in (MaxProb, Entropy, SDN):
            policy = kind(thresholds=tuple(between(s) for s in kind()._scores(logits[:-1])))
            exits = policy.exits(logits)
            assert len(set(exits)) > 1
            answers = policy.answer(logits, exits)
            for batch in (1, 7, 80):
                ran = Executor(net, policy, batch).run(x)
                np.testing.assert_array_equal(ran.exits, exits, f"{name}, batch {batch}")
                np.testing.assert_array_equal(ran.logits.argmax(-1), answers.argmax(-1))
                np.testing.assert_allclose(ran.logits, answers, rtol=0, atol=1e-4 if depends else 0)
