"""Mixed precision on a tiny chain: what it promises of bits, bounds and costs."""

from dataclasses import replace

import pytest
import torch

from anytime.backend import Bits, TorchNet
from anytime.backends.mixed import MixedPrecision
from anytime.cost import account
from anytime.errors import Infeasible, Leak, Unsupported, UsageError
from anytime.policies.confidence import MaxProb
from anytime.quant.fake import FakeQuant
from anytime.reach import Reach
from tests.worlds import Tiny, data, fresh, trained, trainer

REACH = Reach(MaxProb(), 0.7)
EDGES = {"stages.0.0", "heads.0.2", "heads.1.4", "heads.2.3"}


def made(target="u8s8", **fields):
    return MixedPrecision(**{"candidates": (3, 4, 6, 8)} | fields).compress(trained(), data().calib, trainer(), target)


def share(net, reached=None):
    """Expected BOPs as a share of W8A8's, from the account of the net itself."""
    runs = [1.0 if reached is None else (reached.head if n.head else reached.stage)[n.exit] for n in cost(net).layers]
    return sum(r * n.bops for r, n in zip(runs, cost(net).layers, strict=True)) / sum(
        64 * r * n.macs for r, n in zip(runs, cost(net).layers, strict=True)
    )


def cost(net):
    return account(net, (3, 16, 16))


def numbers(text):
    return [float(word) for word in text.replace(",", "").split() if word[0].isdigit()]


@pytest.mark.parametrize("target", ["u8s8", "s8s8"])
def test_the_plain_form(target):
    net = made(target)
    edges = EDGES if target == "u8s8" else {path for path in EDGES if path.startswith("stages.")}
    assert edges == EDGES & net.bits.keys(), "TensorRT runs linear layers faster in float"
    assert {path: net.bits[path] for path in edges} == dict.fromkeys(edges, Bits(8, 8))
    assert all(set(b) <= {3, 4, 6, 8} for b in net.bits.values())
    uniform = {path: Bits(8, 8) if path in EDGES else Bits(4, 4) for path in net.bits}
    assert share(net) <= share(TorchNet(net.twin, uniform, True)) + 1e-9  # uniform W4A4 keeps the bound too
    (bound,), (predicted, measured) = numbers(net.facts["bound"]), numbers(net.facts["distortion"])
    assert measured <= bound and 0.2 < measured / predicted < 5
    if target == "u8s8":  # of what is rounded: where heads stay in float, share counts these too
        assert numbers(net.facts["bops_of_w8a8"])[:1] == [pytest.approx(share(net), abs=1e-4)]
    assert net.facts["gap"] == ("nan" if net.bits == uniform else "0")  # nobody solved for the uniform one
    assert sum(int(n.split(" x ")[1]) for n in net.facts["bits"].split(", ")) == len(net.bits)


def test_widths_reach_the_kernels():
    net = made()
    for path, bits in net.bits.items():
        layer = net.twin.get_submodule(path)
        assert layer.weight_bits == bits.weight
        assert len(torch.unique(layer.integers()[0])) <= 2**bits.weight - 1
    assert {m.bits for m in net.twin.modules() if isinstance(m, FakeQuant)} >= {b.activation for b in net.bits.values()}


def test_a_looser_bound_costs_less():
    assert share(made(like=3)) < share(made(like=4)) < share(made(like=6)) < share(made(like=8))


@pytest.mark.parametrize("weigh", [True, False])
def test_equal_expected_bops(weigh):
    reached = REACH.estimate(trained(), data().calib)
    net = made(reach=REACH, bops=0.7, weigh=weigh)
    assert 0.65 < share(net, reached) <= 0.7 * (1 + 1e-6)
    expected, plain = numbers(net.facts["bops_of_w8a8"])[:2]
    assert (expected, plain) == (pytest.approx(share(net, reached), abs=1e-4), pytest.approx(share(net), abs=1e-4))


def test_reach_calibrates_on_those_who_reach():
    """The deepest tensors are seen only for samples that get there: their ranges differ from the plain form's."""
    alike, aware = made(bops=0.7), made(bops=0.7, reach=REACH)

    def scales(net):
        return {m.name: float(m.scale) for m in net.twin.modules() if isinstance(m, FakeQuant) and m.bits == 8}

    a, b = scales(alike), scales(aware)
    assert a["stages.0:input_1"] == b["stages.0:input_1"]  # everyone enters the first stage
    deep = [name for name in a.keys() & b.keys() if name.startswith("heads.2")]
    assert deep and any(a[name] != b[name] for name in deep)


def test_edges_are_chosen_where_no_candidate_is_narrower():
    net = made(edge_bits=3, bops=0.2)
    assert share(net) <= 0.2 and any(net.bits[path] != (8, 8) for path in EDGES)


def test_layers_kept_in_float():
    net = made(keep_float=("stages.1.0.a",))
    assert "stages.1.0.a" not in net.bits and net.facts["exclusions"] == "stages.1.0.a"


def test_it_does_not_depend_on_chance():
    a, b = made(reach=REACH), made(reach=REACH)
    assert a.bits == b.bits
    x = data().tune.x.numpy()
    assert (a.predict(x) == b.predict(x)).all()


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"candidates": ()}, "at least one width"),
        ({"candidates": (4, 3)}, "ascending"),
        ({"like": 5}, "like=5 is not in candidates"),
        ({"bops": 0.0}, "more than 0"),
        ({"edge_bits": 6}, "give 8 or more to fix the first and last layers, 3 to choose"),
        ({"add_bits": 4}, "add_bits=4 is narrower"),
        ({"samples": 0}, "at least one"),
    ],
)
def test_what_cannot_be_meant(fields, said):
    with pytest.raises(UsageError, match=said):
        MixedPrecision(**{"candidates": (3, 4, 6, 8)} | fields)


def test_what_cannot_be_done():
    with pytest.raises(Unsupported, match="1 bits|bits 1"):
        made(candidates=(1, 4))
    with pytest.raises(Infeasible, match=r"0\.01 of W8A8's expected BOPs is too little; the least possible .* is 0\.\d+"):
        made(bops=0.01)
    for tune in (None, replace(data().tune, x=data().tune.x[:0], y=data().tune.y[:0])):
        with pytest.raises(Unsupported, match="tune part and there is none"):
            MixedPrecision().compress(trained(), data().calib, replace(trainer(), tune=tune))


def test_published_weights_have_no_reach():
    model = Tiny().build((3, 16, 16), 4)
    model.trained_on = data().calib.origins
    with pytest.raises(Leak, match="was trained on"):
        MixedPrecision(reach=REACH).compress(model, data().calib, trainer())


LEARNED = MixedPrecision(bops=0.53, candidates=(3, 4, 8), rounding="qdrop", iterations=100)


def test_rounding_is_learned_once_the_bits_are_chosen():
    """The same widths, nearer to the float network."""
    plain, learned = (b.compress(trained(), data().calib, trainer()) for b in (replace(LEARNED, rounding="nearest"), LEARNED))
    assert learned.bits == plain.bits
    assert " 100 iterations each, in " in learned.facts["reconstructed"]
    measured = [numbers(net.facts["distortion"])[1] for net in (plain, learned)]
    assert measured[1] < 0.8 * measured[0]
    assert LEARNED.column == "mixed (QDrop)"


def test_what_was_learned_is_kept_for_those_bits(tmp_path, monkeypatch):
    x, kept, search = data().test.x[:20].numpy(), replace(trainer(), folder=tmp_path), MixedPrecision._truest
    first = LEARNED.compress(trained(), data().calib, kept)
    with monkeypatch.context() as m:
        m.setattr("anytime.rounding.reconstruct", None)
        assert (LEARNED.compress(trained(), data().calib, kept).predict(x) == first.predict(x)).all()
    # On another machine the search may end elsewhere: what was learned for these bits would be nonsense there.
    monkeypatch.setattr(MixedPrecision, "_truest", lambda self, chosen, counted, bops: search(self, chosen, counted, 0.8))
    other = LEARNED.compress(trained(), data().calib, kept)
    assert other.bits != first.bits
    assert len(list(tmp_path.glob("*/weights.safetensors"))) == 2


def test_a_layer_left_in_float_reads_the_widest():
    net = MixedPrecision(keep_float=("stages.1.0.b",), candidates=(3, 8), like=8, samples=16).compress(
        fresh().eval(), data().calib, trainer()
    )
    link = net.twin.stages[1]
    (read,) = [n.args[0] for n in link.graph.nodes if n.target == "0.b"]
    assert link.get_submodule(read.target).bits == 8
