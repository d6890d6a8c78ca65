"""One connection to a board, made again when it is lost."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from anytime.errors import AnytimeError, Unreachable, UsageError, install

T = TypeVar("T")
LOG = logging.getLogger(__name__)  # told of lost links and killed agents

CONNECT_S, LOGIN_S = 5.0, 20.0
KEEPALIVE_S, MISSED = 2.0, 3  # a link that is silent for longer than their product is lost
CALL_S = 8.0  # for a command that answers at once
PATIENCE_S = 300.0  # for a lost link to come back while a job runs


class Lost(Exception):
    """The connection is gone, and says nothing of what runs there."""


def waited(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine answers; in a thread of its own where this one has a loop that runs, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as own:
        return own.submit(asyncio.run, work).result()


def address_missing(alias: str) -> str | None:
    """A sentence where this machine has no address for ``alias``: neither ~/.ssh/config nor its resolver knows one; else None."""
    config = Path.home() / ".ssh" / "config"
    return _address_missing(alias, config.stat().st_mtime_ns if config.is_file() else 0)


@cache  # every record that was skipped for it asks again
def _address_missing(alias: str, config_changed_ns: int) -> str | None:
    import asyncssh

    try:
        options = waited(asyncssh.SSHClientConnectionOptions.construct(None, config=(), host=alias, port=()))
    except (asyncssh.Error, OSError, ValueError):
        return None  # it is named there; what is wrong is said when it is used
    if options.proxy_command or options.tunnel:
        return None
    try:
        socket.getaddrinfo(options.host or alias, None)
    except socket.gaierror as error:
        return (
            f"no address of {alias} is known here ({error.strerror}): name it under Host {alias} in ~/.ssh/config (docs/jetson.md), "
            "then the same command, or make measure with this board, measures it"
        )
    return None


class Link:
    """One connection, made again when it is lost."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.lost = 0
        self._conn: Any = None

    async def __aenter__(self) -> Link:
        await self._connect()
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._drop()

    async def _connect(self) -> None:
        try:
            import asyncssh
        except ImportError as error:
            raise UsageError(f"asyncssh is not installed here: {install('boards')}") from error

        said: dict[str, Any] = {"connect_timeout": CONNECT_S, "login_timeout": LOGIN_S}
        said |= {"keepalive_interval": KEEPALIVE_S, "keepalive_count_max": MISSED}
        try:
            options = await asyncssh.SSHClientConnectionOptions.construct(None, config=(), host=self.alias, port=())
            if options.known_hosts is None:  # asyncssh would then take any
                raise UsageError(
                    f"~/.ssh/config says UserKnownHostsFile none for {self.alias}: no host key would be checked; remove that line"
                )
            self._conn = await asyncio.wait_for(asyncssh.connect(self.alias, **said), CONNECT_S + LOGIN_S)
        except asyncssh.HostKeyNotVerifiable as error:
            raise AnytimeError(
                f"{self.alias}: its host key is unknown or has changed ({error}): log in once with ssh {self.alias} and compare "
                "the key; if the board was set up anew, remove the old one with ssh-keygen -R"
            ) from error
        except asyncssh.PermissionDenied as error:
            raise AnytimeError(f"{self.alias} lets nobody in ({error}): see that ssh {self.alias} needs no password") from error
        except (asyncssh.ConfigParseError, asyncssh.KeyImportError, FileNotFoundError) as error:
            raise UsageError(
                f"~/.ssh/config, or a key that it names, cannot be read for {self.alias} ({error}): mend it"
            ) from error
        except (asyncssh.Error, OSError, TimeoutError) as error:
            reason = str(error) or "no answer"
            raise Unreachable(f"{self.alias} cannot be reached ({reason}): is it on, and does ssh {self.alias} work?") from error

    def _drop(self) -> None:
        if self._conn is not None:
            self._conn.abort()
            self._conn = None

    async def _once(self, work: Callable[[Any], Awaitable[T]], limit_s: float) -> T:
        import asyncssh

        try:
            return await asyncio.wait_for(work(self._conn), limit_s)
        except (asyncssh.DisconnectError, asyncssh.ChannelOpenError, ConnectionError, TimeoutError) as error:
            raise Lost(str(error) or f"no answer within {limit_s:g} s") from error
        except asyncssh.SFTPError as error:
            if isinstance(error, asyncssh.SFTPNoConnection | asyncssh.SFTPConnectionLost):
                raise Lost(str(error)) from error
            raise

    async def ask(self, work: Callable[[Any], Awaitable[T]], limit_s: float = CALL_S) -> T:
        """Do ``work`` with the connection; while the link is lost, try to get it back and do it again: it must bear that."""
        until = 0.0
        while True:
            try:
                if self._conn is None:
                    await self._connect()
                return await self._once(work, limit_s)
            except (Lost, Unreachable) as error:
                if isinstance(error, Lost):
                    self.lost += 1
                    LOG.warning(f"{self.alias}: the link is lost ({error})")
                    self._drop()
                until = until or monotonic() + PATIENCE_S
                if monotonic() > until:
                    raise Unreachable(
                        f"{self.alias} did not come back within {PATIENCE_S:g} s: what runs there goes on, the same command "
                        "collects it"
                    ) from error
                await asyncio.sleep(1)

    async def sh(self, command: str, limit_s: float = CALL_S, given: str | None = None) -> str:
        """What a command writes; AnytimeError where it fails."""
        import asyncssh

        async def work(conn: Any) -> tuple[int, str, str]:
            done = await conn.run(command, check=False, **({"stdin": asyncssh.DEVNULL} if given is None else {"input": given}))
            # Killed with its session, asyncssh says None; others say -1, ssh itself 255.
            if done.exit_status in (None, -1, 255):
                raise Lost("the session was closed")
            return done.exit_status, str(done.stdout), str(done.stderr)

        code, out, err = await self.ask(work, limit_s)
        if code:
            words = [line for line in err.splitlines() if line.strip()]
            raise AnytimeError(
                f"{self.alias}: {command.split()[0]} failed there ({words[-1] if words else f'exit status {code}'})"
            )
        return out
