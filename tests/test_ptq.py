"""The steps of post-training quantization, in their order, as one backend."""

import pytest

from anytime.backend import fake_quant_net
from anytime.backends.onnxruntime import OnnxRuntime
from anytime.backends.ptq import PTQ
from anytime.errors import Collapsed
from anytime.policies.threshold import MaxProb
from anytime.quant.graph import prepared
from anytime.reach import Reach
from tests.contracts.backend import backend_keeps_its_promise
from tests.worlds import Restarting, data, trained, trainer

STEPS = {
    "plain": PTQ(4, 8),
    "equalized": PTQ(4, 8, equalize=True),
    "bias corrected": PTQ(4, 8, correct_bias=True),
    "adaround": PTQ(4, 8, rounding="adaround", iterations=20),
    "brecq": PTQ(4, 8, rounding="brecq", iterations=20),
    "everything": PTQ(
        4, 4, equalize=True, correct_bias=True, rounding="qdrop", iterations=20, reach=Reach(MaxProb(), 0.8), add_bits=8
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_keeps_the_promise(name):
    backend_keeps_its_promise(STEPS[name], trained(), data(), trainer())


def test_stages_that_restart_are_reconstructed_too():
    backend_keeps_its_promise(PTQ(4, 8, rounding="qdrop", iterations=10), trained(Restarting()), data(), trainer())


def test_records_can_say_what_was_done():
    net = STEPS["everything"].compress(trained(), data().calib, trainer())
    assert net.facts["reconstructed"].endswith("20 iterations each") and int(net.facts["biases corrected"]) > 0
    assert "pairs of layers" in net.facts["equalized"] and set(net.sqnr) == set(net.bits)


def test_the_column_names_the_steps():
    assert PTQ(4, 8).column == "W4A8 PTQ" and PTQ().column == "INT8 PTQ"
    assert STEPS["everything"].column == "INT4 PTQ (CLE, QDrop, BC, reached)"


def test_learned_eight_bits_run_in_onnx_runtime():
    net = OnnxRuntime(of=PTQ(rounding="adaround", iterations=5, correct_bias=True)).compress(trained(), data().calib, trainer())
    assert set(net.executed(data().test.x[:8].numpy()).values()) == {"int8"} and net.sqnr


def test_a_network_that_fell_to_chance_fails_and_names_the_layer():
    with pytest.raises(Collapsed, match="fallen to chance.*the first bad layer is "):
        PTQ(2, 2, observer="minmax", weight_observer="minmax", edge_bits=2).compress(trained(), data().calib, trainer())
    # what the check looks at is really at chance
    rounded = prepared(trained(), data().calib.x, PTQ(2, 2, edge_bits=2).widths, "u8s8", "minmax", "minmax")
    right = fake_quant_net(rounded, "u8s8").predict(data().test.x.numpy()).argmax(-1) == data().test.y.numpy()
    assert right.mean(1).min() < 0.4
