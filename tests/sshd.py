"""A private sshd on loopback whose only account is no root: a board that can be broken at will."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])
USER = "anytime-board"


def needs():
    """Skip, with a sentence, where no such board can be."""
    if os.geteuid():
        pytest.skip("a board on loopback needs root, to make its account")
    if not SSHD:
        pytest.skip("no sshd is installed here: apt-get install openssh-server")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")


class Account:
    """A user without a password, whose home is a folder of ours."""

    def __init__(self, folder):
        self.name, self.home = f"{USER}-{os.getpid()}", folder / "home"
        self.home.mkdir()
        subprocess.run(["useradd", "-M", "-N", "-d", self.home, "-s", "/bin/sh", self.name], check=True)
        subprocess.run(["usermod", "-p", "*", self.name], check=True)  # one that is locked would be let in nowhere
        shutil.chown(self.home, self.name)

    def close(self):
        subprocess.run(["userdel", self.name], check=False, capture_output=True)


class Sshd:
    """One daemon in a mount namespace of its own, where this Python lies at FOLDER/python; ``env`` is that of its sessions."""

    def __init__(self, folder, account, home_mb=None, env=None):
        self.folder, self.account, self.home_mb = folder, account, home_mb
        folder.mkdir(mode=0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("base", "site"):
            (folder / name).mkdir()
        self.python = folder / "python"
        base = folder / "base" / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
        # Its own interpreter and packages: root's home may be closed to others.
        self.python.write_text(f'#!/bin/sh\nexec env PYTHONPATH={folder}/site {base} "$@"\n')
        self.python.chmod(0o755)
        self.new_host_key()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "user"], check=True)
        said = {
            "Port": self.port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "PidFile": folder / "pid",
            "AuthorizedKeysFile": folder / "user.pub", "UsePAM": "no", "StrictModes": "no", "Subsystem": "sftp internal-sftp",
            "PasswordAuthentication": "no", "KbdInteractiveAuthentication": "no", "AllowUsers": account.name,
        }  # fmt: skip
        lines = [f"{k} {v}" for k, v in said.items()] + [f"SetEnv {k}={v}" for k, v in (env or {}).items()]
        (folder / "config").write_text("\n".join(lines) + "\n")
        self.daemon = None
        self.start()

    def new_host_key(self):
        for path in self.folder.glob("host*"):
            path.unlink()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "host"], check=True)

    @property
    def known_host(self):
        return f"[127.0.0.1]:{self.port} " + (self.folder / "host.pub").read_text()

    def start(self):
        """Begin to listen."""
        os.makedirs("/run/sshd", exist_ok=True)
        binds = f"mount --bind {sys.base_prefix} {self.folder}/base && mount --bind {sysconfig.get_path('purelib')} {self.folder}/site"
        home = self.account.home
        if self.home_mb:
            binds += f" && mount -t tmpfs -o size={self.home_mb}m,uid=$(id -u {self.account.name}) tmpfs {home}"
        with (self.folder / "log").open("ab") as log:
            command = [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                f"{binds} && exec {SSHD} -D -e -f {self.folder}/config",
            ]
            self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with socket.socket() as door:
                if door.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.daemon.poll() is not None:
                break
            time.sleep(0.05)
        pytest.fail("sshd does not start: " + (self.folder / "log").read_text()[-500:])

    def sessions(self):
        """Processes of its connections: the daemons below the one that listens."""
        found, parents = [], [self.daemon.pid]
        while parents:
            below = [pid for pid in children(parents.pop()) if comm(pid).startswith("sshd")]
            found += below
            parents += below
        return found

    def kill(self):
        """End the daemon and every connection; what was started detached goes on."""
        for pid in [self.daemon.pid, *self.sessions()]:
            with_luck(pid, signal.SIGKILL)
        self.daemon.wait()

    def close(self):
        """End everything."""
        if self.daemon.poll() is None:
            self.kill()


def with_luck(pid, sig):
    """Send it, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sig)


def children(pid):
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def comm(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


class Silence:
    """Packets from and to a port vanish; where no filter can be set, the daemons just stand still."""

    def __init__(self, board):
        self.board, self.rules = board, []

    def __enter__(self):
        self.since = time.monotonic()
        for which in ("--dport", "--sport"):
            rule = ["INPUT", "-i", "lo", "-p", "tcp", which, str(self.board.port), "-j", "DROP"]
            if not shutil.which("iptables") or subprocess.run(["iptables", "-I", *rule], capture_output=True).returncode:
                break
            self.rules.append(rule)
        else:
            return self
        self._signal(signal.SIGSTOP)
        return self

    def _signal(self, sig):
        for pid in [self.board.daemon.pid, *self.board.sessions()]:
            with_luck(pid, sig)

    def __exit__(self, *_):
        for rule in self.rules:
            subprocess.run(["iptables", "-D", *rule], check=True)
        if len(self.rules) < 2:
            self._signal(signal.SIGCONT)
