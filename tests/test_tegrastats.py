"""tegrastats on every JetPack, identities and power modes: values by hand from genuine lines, and what a cut makes of them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytime.errors import AnytimeError
from anytime.nvidia.jetson import identity, power_mode
from anytime.nvidia.tegrastats import RAILS, energy, module_mw, sample, samples

TRANSCRIPTS = Path(__file__).parent / "transcripts"  # each with its source


def commented(name):
    """[(comment, lines below it)] of a transcript."""
    found, here = [], []
    for line in (TRANSCRIPTS / name).read_text().splitlines():
        if line.startswith("## "):
            here = []
            found.append((line, here))
        elif not line.startswith(('# "', "# One", "###")):
            here.append(line)
    return found


LINES = commented("tegrastats_lines.txt")

# By hand: board, sum of its rails in mW, GPU load, GPU MHz, memory MHz, cores that are on, one temperature
SEEN = [
    ("AGX Xavier", 463 + 618 + 2936 + 0 + 309 + 3306, 0.0, (), None, 8, ("gpu", 30.5)),
    ("Xavier NX", 5079, 0.0, (510,), 1600, 4, ("cpu", 39.5)),
    ("AGX Orin", 2399 + 400 + 4032, 0.0, (0,), 2133, 12, ("cpu", 42.593)),
    ("AGX Orin", 2340 + 390 + 4025, 0.0, (0, 0), 2133, 12, ("tj", 44.343)),
    ("AGX Orin", 2412 + 1607 + 4707, 0.0, (0, 0), 2133, 12, ("tj", 52.562)),
    ("AGX Orin", 5139 + 3268 + 5500, 0.12, (1300, 1300), 3199, 12, ("gpu", 47.625)),
    ("Orin NX", 6120, 0.0, (), None, 4, ("gpu", 43)),
    ("Orin NX", 4915, 0.0, (305,), 2133, 4, ("gpu", 41.343)),
    ("Orin Nano", 12479, 0.63, (621,), 2133, 6, ("gpu", 53.343)),
    ("Orin Nano", 4824, 0.0, (), None, 6, ("gpu", 49.031)),
    ("TX2", 5297, 0.0, (114,), 1866, 6, ("gpu", 39.5)),
    ("AGX Thor", None, None, (1000, 1000, 1000), 1866, 0, None),
    ("Xavier NX", 3757, 0.0, (), None, 2, ("gpu", 35.5)),
]


@pytest.mark.parametrize("place", range(len(SEEN)), ids=lambda i: f"{SEEN[i][0]} {i}")
def test_every_line(place):
    board, mw, load, gpu_mhz, memory_mhz, cores, heat = SEEN[place]
    (line,) = LINES[place][1]
    read = sample(line)
    assert module_mw(board, read) == mw
    assert (read.gpu_load, read.gpu_mhz, read.memory_mhz) == (load, gpu_mhz, memory_mhz)
    assert sum(core is not None for core in read.cores) == cores
    assert heat is None or read.temperatures_c[heat[0]] == heat[1]
    assert "pmic" not in read.temperatures_c and all(value > -200 for value in read.temperatures_c.values())
    assert "NC" not in read.rails_mw and "RAM" not in read.rails_mw and "SWAP" not in read.rails_mw


def test_there_is_a_value_for_every_line():
    assert len(LINES) == len(SEEN) == 13


def test_single_values_of_a_line():
    read = sample(LINES[1][1][0])
    assert read.rails_mw == {"VDD_IN": 5079, "VDD_CPU_GPU_CV": 696, "VDD_SOC": 1104}
    assert read.cores == ((0.03, 1904), (0.07, 1906), (0.01, 1905), (0.0, 1907), None, None)
    assert "gpu" not in sample(LINES[2][1][0]).temperatures_c  # GPU@-256C: the sensor is off


@given(st.data())
def test_a_log_that_was_cut_loses_lines_and_changes_none(data):
    text = "".join(lines[0] + "\n" for _, lines in LINES)
    whole = samples(text)
    cut = text[: data.draw(st.integers(0, len(text)))]
    assert samples(cut) == whole[: cut.count("\n")]


def test_another_text_is_refused():
    for text in ("", "top - 17:00:00 up 1 day", "DRAM 12/34MB "):
        with pytest.raises(AnytimeError, match="no line of tegrastats"):
            sample(text)


# Energy


def drawing(mw):
    return sample(f"RAM 1/2MB (lfb 1x4MB) VDD_IN {mw:.0f}mW/1mW")


def measured(busy_mw, idle_mw, seconds=12.0, hz=10, inferences=1000, board="Orin NX"):
    at = np.arange(0, seconds + 1e-9, 1 / hz)
    return energy(board, at, [drawing(busy_mw(t)) for t in at], at, [drawing(idle_mw) for _ in at], inferences)


def test_energy_by_hand():
    got = measured(lambda t: 9000, 5000)  # 4 W above idle for 12 s, over 1000 inferences: 48 mJ
    assert got.mj == pytest.approx(48) and got.window_s == pytest.approx(12)
    assert (got.busy_w, got.idle_w, got.rails, got.reason) == (pytest.approx(9), pytest.approx(5), ("VDD_IN",), "")
    ramp = measured(lambda t: 5000 + 1000 * t, 5000)  # a triangle: 12 s x 12 W / 2
    assert ramp.mj == pytest.approx(72, rel=1e-3)


def test_the_integral_is_scipys_when_readings_come_unevenly():
    from scipy.integrate import trapezoid

    rng = np.random.default_rng(0)
    at = np.cumsum(rng.uniform(0.05, 0.9, 40))
    mw = rng.integers(6000, 9000, 40)
    idle = np.arange(0, 11, 0.5)
    got = energy("Orin NX", at, [drawing(v) for v in mw], idle, [drawing(4000) for _ in idle], 7)
    assert got.mj == pytest.approx((trapezoid(mw, at) - 4000 * (at[-1] - at[0])) / 7)


@pytest.mark.parametrize(
    "asked, why",
    [
        ({"seconds": 9.5}, "window under load is 9.5 s, at least 10 s"),
        ({"hz": 0.5}, "2.0 s lie between two"),
        ({"board": "AGX Orin"}, "does not show VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0"),
        ({"board": "AGX Thor"}, "'AGX Thor' is not known"),
        ({"inferences": 0}, "no inference"),
        ({"idle_mw": 9500}, "under load it drew 9.00 W, idle 9.50 W"),
    ],
    ids=str,
)
def test_absent_means_absent(asked, why):
    got = measured(lambda t: 9000, **{"idle_mw": 5000, **asked})
    assert got.mj is None and why in got.reason


def test_times_and_readings_belong_together():
    with pytest.raises(AnytimeError, match="2 times and 1 readings"):
        energy("Orin NX", [0, 11], [drawing(1)], [0, 11], [drawing(1)] * 2, 1)


# Identity and power mode


def test_every_model_string_is_kept_and_none_decides():
    models = [lines[0] for comment, lines in commented("board_identity.txt")[:8]]
    assert models[0] == "NVIDIA Jetson Nano Developer Kit" and models[1] == "Jetson-AGX"
    for model in models:
        assert identity(model=model + "\0")[:2] == (model, None)


@pytest.mark.parametrize(
    "compatible, board, module",
    [
        ("nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0nvidia,tegra23x\0", "AGX Orin", "p3701-0005"),
        ("nvidia,p3737-0000+p3701-0005nvidia,p3701-0005nvidia,tegra234nvidia,tegra23x", "AGX Orin", "p3701-0005"),
        ("nvidia,e3900-0000+p2888-0004nvidia,galennvidia,jetson-xaviernvidia,tegra194", "AGX Xavier", "p2888-0004"),
        ("nvidia,p3768-0000+p3767-0000 nvidia,p3767-0000 nvidia,tegra234", "Orin NX", "p3767-0000"),
        ("nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0", "Orin Nano", "p3767-0005"),
        ("nvidia,p3449-0000+p3668-0000\0nvidia,p3668-0000\0", "Xavier NX", "p3668-0000"),
        ("raspberrypi,4-model-b\0brcm,bcm2711\0", None, None),
        ("nvidia,p3768-0000+p3767-0009\0", None, None),
    ],
)
def test_the_module_decides(compatible, board, module):
    assert identity(compatible=compatible)[1:3] == (board, module)


@given(st.data())
def test_a_cut_compatible_names_no_other_board(data):
    whole = data.draw(st.sampled_from([text for _, lines in commented("board_identity.txt")[8:11] for text in lines[:1]]))
    want = identity(compatible=whole)
    assert identity(compatible=whole[: data.draw(st.integers(0, len(whole)))])[1:3] in (want[1:3], (None, None))


def test_every_release():
    lines = [line for _, found in commented("board_identity.txt") for line in found if line.startswith("# R")]
    seen = [identity(nv_tegra_release=line)[3:] for line in lines]
    assert seen == [("32.7.1", "4.6.1"), ("34.1.2", None), ("35.2.1", "5.1"), ("35.4.1", "5.1.2"), ("36.4.4", "6.2.1")]
    for line in lines:
        for end in range(len(line)):
            assert identity(nv_tegra_release=line[:end])[3] in (None, identity(nv_tegra_release=line)[3])


MODES = [
    ("MAXN", None, "quiet"), ("MODE_15W_6CORE", 2, "quiet"), ("MODE_15W_6CORE", 2, None), ("MODE_40W", 3, None), ("MAXN", 0, None),
]  # fmt: skip


def test_every_power_mode():
    found = commented("nvpmodel_q.txt")
    texts = ["\n".join(lines) + "\n" for _, lines in found]
    assert [tuple(power_mode(text)) for text in texts[:5]] == MODES
    assert [tuple(power_mode(line + "\n")) for line in found[5][1]] == [("25W", 3, None), ("MODE_50W", 3, None), ("15W", 0, None)]
    with pytest.raises(AnytimeError, match="Error writing 2 to .*fbp_pg_mask"):
        power_mode(texts[6])
    for text, want in zip(texts, MODES, strict=False):
        for end in range(len(text)):
            try:
                name, number, fan = power_mode(text[:end])
            except AnytimeError:
                continue
            assert name == want[0] and number in (None, want[1]) and fan in (None, want[2])


def test_rails_are_of_boards_that_identity_knows():
    from anytime.nvidia.jetson import MODULES

    assert set(RAILS) <= set(MODULES.values())
