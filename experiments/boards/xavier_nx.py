"""A Jetson Xavier NX with all six cores at 15 W. Its address, user and key stand in ~/.ssh/config under "Host xavier-nx"."""

from anytime.boards.ssh import Ssh

BOARD = Ssh("xavier-nx", board="Xavier NX", power_mode="MODE_15W_6CORE", fixed_clocks=True)
