"""A Jetson AGX Xavier at full power. Its address, user and key stand in ~/.ssh/config under "Host agx-xavier"; see docs/jetson.md."""

from anytime.boards.ssh import Ssh

BOARD = Ssh("agx-xavier", board="AGX Xavier", power_mode="MAXN", fixed_clocks=True)
