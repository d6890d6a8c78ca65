"""Boards, one small file each: BOARD = Ssh(...)."""
