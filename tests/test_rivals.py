"""What a policy is told of networks without exits that run beside it: by hand, from times and answers made up here."""

import base64
import zlib

import numpy as np
import pytest

from anytime.gather import Asked, Network
from anytime.paired import Answered
from anytime.rivals import Rivals

EXIT = Asked(0, "exit 1", float("nan"), "", "", "")
LAST = Asked(1, "exit 2", float("nan"), "", "", "")
POLICY = Asked(None, "MaxProb", 0.5, "macs", "refitted", "")
N = 1000


def network(tmp_path, name, asked, right, **ms):
    """A network that has the first ``right`` of N samples right, and takes ``ms`` in each session."""
    path = tmp_path / f"{name}.npz"
    labels, exits = np.ones(N, np.int64), 1 if asked == EXIT else 2
    np.savez(path, labels=labels, argmax=np.broadcast_to(np.arange(N) < right, (exits, N)).astype(np.int64))
    net = Network({"data": "d", "model": name}, facts={"model": name, "column": "INT8", "execution": "engine"}, files={0: path})
    for one in (EXIT, LAST, POLICY) if asked is POLICY else (EXIT,):
        net.scores[one][0] = {"n": N, "n_right": right}
    net.scores[asked][0]["right"] = packed(np.arange(N) < right)
    for session, value in ms.items():
        net.times[asked]["host"].append({"session": session, "latency_ms_mean": value, "n": 64, "noisy": False})
    return net


def packed(right):
    return base64.b64encode(zlib.compress(np.packbits(right).tobytes())).decode()


def beside(tmp_path, *statics, right=900, **ms):
    policy = network(tmp_path, "policy", POLICY, right, **ms)
    troubles = []
    found = Rivals([policy, *statics], Answered(troubles)).of(policy, POLICY, "host")
    assert not troubles
    return found


def test_the_largest_that_takes_no_longer_and_the_fastest_that_is_as_good(tmp_path):
    small = network(tmp_path, "small", EXIT, 890, a=0.5)
    middle = network(tmp_path, "middle", EXIT, 910, a=1.0)
    large = network(tmp_path, "large", EXIT, 930, a=1.5)
    found = beside(tmp_path, large, small, middle, a=1.25)
    assert (found["rival"], found["rival_time"], found["rival_gain"]) == ("middle", 0.8, pytest.approx(0.01))
    assert found["rival_gain_lo"] < 0.01 < found["rival_gain_hi"]
    assert (found["as_good"], found["as_good_time"]) == ("middle", 0.8) and "as_good_time_lo" not in found
    assert beside(tmp_path, large, small, middle, a=0.75)["rival"] == "small"
    assert beside(tmp_path, large, small, middle, right=920, a=0.75)["as_good"] == "large"


def test_where_exits_win_nothing_stands_there(tmp_path):
    small, large = network(tmp_path, "small", EXIT, 890, a=0.5), network(tmp_path, "large", EXIT, 899, a=1.0)
    found = beside(tmp_path, small, large, a=0.4)
    assert found == {}
    assert beside(tmp_path, network(tmp_path, "large", EXIT, 900, a=1.0), a=0.5) == {"as_good": "large", "as_good_time": 2.0}


def test_times_are_compared_within_sessions(tmp_path):
    """The saboteur: pooled, the static network would look slower, for it alone was timed when the machine was slow."""
    static = network(tmp_path, "static", EXIT, 900, a=1.0, b=1.2, slow=9.0)
    found = beside(tmp_path, static, a=1.25, b=1.25, fast=0.5)
    assert found["rival_time"] == pytest.approx((1 / 1.25 + 1.2 / 1.25) / 2)
    assert (found["as_good_time_lo"], found["as_good_time_hi"]) == (pytest.approx(0.8), pytest.approx(0.96))
    assert beside(tmp_path, static, fast=0.5)["as_good_time"] == pytest.approx(
        1.2 / 0.5
    )  # no session is shared: the median of all


def test_only_what_runs_in_the_same_way_counts_and_only_refitted_policies_are_told(tmp_path):
    static = network(tmp_path, "static", EXIT, 950, a=0.5)
    for field in ("column", "execution"):
        other = network(tmp_path, "static", EXIT, 950, a=0.5)
        other.facts[field] = "another"
        assert beside(tmp_path, other, a=1.0) == {}
    other = network(tmp_path, "static", EXIT, 950, a=0.5)
    other.spec["data"] = "another"
    assert beside(tmp_path, other, a=1.0) == {} and beside(tmp_path, static) == {}
    policy = network(tmp_path, "policy", POLICY, 900, a=1.0)
    kept = POLICY._replace(arm="kept")
    policy.scores[kept], policy.times[kept] = policy.scores[POLICY], policy.times[POLICY]
    assert Rivals([policy, static], Answered([])).of(policy, kept, "host") == {}
    assert Rivals([policy, static], Answered([])).of(policy, POLICY, "host")["rival"] == "static"
    policy.facts["unjudged"] = "its labels tell nothing"
    assert Rivals([policy, static], Answered([])).of(policy, POLICY, "host") == {}
