"""The executor gives the offline answers, for every policy, batch size, exit pattern and engine."""

import gc
from dataclasses import replace
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
from anytime.policies.reading import Reading
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
        (RuntimeError("[ONNXRuntimeError] : 1 : FAIL : BFCArena ... Failed to allocate memory for requested buffer"), "a batch under 8"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "give a batch under 8"),
    ],
    ids=lambda p: str(p)[:20],
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


@pytest.mark.parametrize("of", ["join", "rows", "_unread"])
def test_memory_that_ends_between_segments_takes_nothing_back(of, monkeypatch):
    work, left = getattr(Executor, of), iter(range(99))

    def fails(self, *args):
        if next(left) == 6:
            raise MemoryError
        return work(self, *args)

    monkeypatch.setattr(Executor, of, fails)
    with pytest.raises(Broken, match="no memory for 8 samples at once: give a batch under 8") as caught:
        Executor(Net(), MIXED, 8).run(samples(200))
    assert len(caught.value.answered.place)


def test_memory_that_ends_when_samples_are_put_together_says_so(monkeypatch):
    def fails(arrays):
        raise MemoryError

    monkeypatch.setattr(np, "stack", fails)
    with pytest.raises(AnytimeError, match="no memory for 8 samples at once: give a batch under 8"):
        list(Executor(Net(), MIXED, 8).stream(samples(20)))


class AnswersTooFew(Net):
    """Gives the previous batch's answers, as OpenVINO did without memory."""

    def __init__(self, n=3):
        super().__init__()
        self.n = n

    def step(self, segment, state):
        state, logits = super().step(segment, state)
        return state, np.resize(logits, (self.n, K))


@pytest.mark.parametrize(
    "batch, n, said", [(8, 3, "answered 3 of 8 samples"), (8, 1, "answered 1 of 8"), (1, 3, "failed on sample 0")]
)
def test_an_engine_that_answers_too_few_is_found_out(batch, n, said):
    with pytest.raises(Broken, match=f"^segment 1 of 4: the engine {said}"):
        Executor(AnswersTooFew(n), MIXED, batch).run(samples(20))


def test_predictions_of_too_few_are_found_out(monkeypatch):
    net = TorchNet(trained(Tiny()), {}, simulated=False)
    step = net.step
    monkeypatch.setattr(net, "step", lambda segment, state: (step(segment, state)[0], step(segment, state)[1][:3]))
    with pytest.raises(AnytimeError, match="torch answered 3 samples of 8: give a batch under 8"):
        net.predict(data().test.x[:8].numpy(), batch=8)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("part", ["stop", "answer"])
def test_a_policy_that_breaks_takes_nothing_back(part, batch):
    asked = []

    class Breaks(MaxProb):
        def stop(self, logits):
            return self.counted("stop") or super().stop(logits)

        def answer(self, logits, exits):
            return self.counted("answer") or super().answer(logits, exits)

        def counted(self, here):
            asked.append(here)
            if asked.count(part) == 4:
                raise IndexError("no such place")

    with pytest.raises(Broken, match=r"segment \d of 4: Breaks failed on .*sample.*: no such place") as caught:
        Executor(Net(), Breaks(thresholds=(0.8,) * 3), batch).run(samples(200))
    assert len(caught.value.answered.place)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_frame_buffer_may_be_filled_again(batch):
    x = samples(40)

    def frames():
        buffer = np.empty(5, np.float32)
        for sample in x:
            buffer[:] = sample
            yield buffer

    exits, logits = oracle(Net(), MIXED, x)
    for block in Executor(Net(), MIXED, batch).stream(frames()):
        np.testing.assert_array_equal(block.logits, logits[block.place])


def test_exits_that_are_read_with_gaps_are_handed_over_without_a_copy():
    class Looks(MaxProb):
        def stop(self, logits):
            shared.append(logits.base is not None and logits.base.shape[0] == 3)
            return super().stop(logits)

    x, shared = samples(40), []
    looks, plain = (Reading(of=kind(thresholds=(0.8, 0.8)), chosen=(0, 2, 3)) for kind in (Looks, MaxProb))
    for of in (plain, plain.tempered((0.7, 1.1, 1.3, 2.0)), replace(plain, of=plain.of.tempered((0.7, 1.3, 2.0)))):
        exits, logits = oracle(Net(), of, x)
        for batch in (1, 7):
            ran = Executor(Net(), of, batch).run(x)
            np.testing.assert_array_equal(ran.exits, exits)
            np.testing.assert_array_equal(ran.logits, logits)
            Executor(Net(), looks, batch).run(x)
    assert shared and all(shared)


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
    with pytest.raises(UsageError, match="one sample, not 2"):
        Executor(Net(), MIXED).one(samples(2))
    for dtype in (np.uint8, np.int64, np.complex64, bool):
        given = np.ones((3, 5), dtype)
        with pytest.raises(UsageError, match=f"^the samples are {given.dtype}: give floating point, normalised"):
            Executor(Net(), MIXED).run(given)
        with pytest.raises(UsageError, match=f"^sample 2 is {given.dtype}: give floating point, normalised"):
            list(Executor(Net(), MIXED).stream([*samples(2), *given]))
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
        yield "OpenVINO FP32", OpenVINONet(trained(spec), {}, writes(float_chain), {}), True
        yield "OpenVINO INT8", OpenVINONet(chain, {}, writes(chain), {}), False


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
