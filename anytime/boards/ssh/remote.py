"""A job on its board: pushed, run detached and bounded, its results collected, whatever the link does."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from anytime.boards.ssh.job import Job
from anytime.boards.ssh.link import LOG, PATIENCE_S, Link
from anytime.errors import AnytimeError

RESTARTS = 2  # of an agent that was killed
FOLDER = ".anytime/jobs"


@dataclass
class Remote:
    """A job on its board."""

    board: str  # as the tables call it
    python: str
    job: Job
    link: Link
    taken: set[str] = field(default_factory=set)

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.job.id}"

    async def finished(self) -> None:
        """Push it unless it is there, run it to its end, bring everything home, leave nothing behind."""
        deadline, restarts, nap = monotonic() + self.job.limit_s + PATIENCE_S, RESTARTS, 0.1
        if (await self._look())[0] == "absent":
            await self._push()
        await self._start()
        while True:
            state, there = await self._look()
            await self._take(there)
            if state == "0":
                break
            if state != "running":
                if restarts and state in ("gone", "129", "130", "137", "143"):
                    restarts -= 1
                    LOG.warning(f"{self.board}: the agent was killed; it goes on with what is missing")
                    await self._start()
                else:
                    await self._failed(state)
            if monotonic() > deadline:
                raise AnytimeError(f"{self.board}: the job {self.job.id} did not end within {self.job.limit_s + PATIENCE_S:g} s")
            await asyncio.sleep(nap)
            nap = min(1.0, 2 * nap)
        await self._clear()
        for name in self.job.names:
            if (error := self.job.results / f"{name}.error").exists():
                raise AnytimeError(f"{self.board}, {name}: the process that ran it {error.read_text()}")
            if not (self.job.results / f"{name}.npz").exists():
                raise AnytimeError(f"{self.board}, {name}: the agent ended well and left no result: measure again")

    @property
    def _alive(self) -> str:
        """A shell's test whether the agent's wrapper runs: its number may be another process's since, so its words must name the job.

        While a process becomes another program its words are empty, and its number is written only when it runs: so three looks.
        """
        seen = f"grep -qs {self.job.id} /proc/$(cat pid 2>/dev/null)/cmdline"
        return f"{{ {seen} || {{ sleep 0.5; {seen}; }} || {{ sleep 1; {seen}; }}; }}"

    async def _look(self) -> tuple[str, list[str]]:
        """absent, running, gone, or the agent's exit status; the results that are there."""
        # The status once more at the end: it may have come while the wrapper was looked for.
        said = await self.link.sh(
            f"cd {self.folder} 2>/dev/null || {{ echo absent; exit 0; }}; "
            f"if [ -s rc ]; then cat rc; elif {self._alive}; then echo running; elif [ -s rc ]; then cat rc; else echo gone; fi; "
            "ls results 2>/dev/null; true"
        )
        state, *there = said.split()
        # Names become paths here, so only those of our own tasks are taken.
        mine = {f"{task}{end}" for task in self.job.names for end in (".npz", ".error")}
        return state, [name for name in there if name in mine]

    async def _push(self) -> None:
        import asyncssh

        size = sum(p.stat().st_size for p in self.job.folder.rglob("*") if p.is_file())

        async def push(conn: Any) -> None:
            async with conn.start_sftp_client() as sftp:
                await sftp.makedirs(FOLDER, exist_ok=True)
                part = f"{self.folder}.part"
                if await sftp.exists(self.folder):  # the link was lost after all was done
                    return
                if await sftp.exists(part):
                    await sftp.rmtree(part)
                try:
                    await sftp.put(str(self.job.folder), part, recurse=True)
                    await sftp.rename(part, self.folder)
                except asyncssh.SFTPError as error:
                    if isinstance(error, asyncssh.SFTPNoConnection | asyncssh.SFTPConnectionLost):
                        raise
                    free = await sftp.statvfs(FOLDER)
                    await sftp.rmtree(part, ignore_errors=True)
                    raise AnytimeError(
                        f"{self.board}: cannot write {size / 1e6:.1f} MB to ~/{FOLDER} ({error.reason or type(error).__name__}, "
                        f"{free.bavail * free.frsize / 1e6:.1f} MB are free): free space there"
                    ) from error

        await self.link.ask(push, 30 + size / 50e3)

    async def _start(self) -> None:
        """Start the agent, unless it runs or has ended."""
        agent = f"timeout -k 5 {self.job.limit_s} {shlex.quote(self.python)} -B agent.py run"
        inner = f"echo $$ >pid; {agent} >out 2>err; echo $? >rc.tmp; mv rc.tmp rc"
        # Asked again after a lost link, it must not run twice.
        await self.link.sh(
            f"cd {self.folder} || exit 1; grep -qs '^0$' rc && exit 0; [ ! -f pid ] || ! {self._alive} || exit 0; rm -f rc pid; "
            f"setsid nohup sh -c {shlex.quote(inner)} {self.job.id} </dev/null >/dev/null 2>&1 &"
        )

    async def _take(self, there: Sequence[str]) -> None:
        """Bring home what is new."""
        new = [name for name in there if name not in self.taken]
        if not new:
            return

        async def get(conn: Any) -> None:
            async with conn.start_sftp_client() as sftp:
                for name in new:
                    await sftp.get(f"{self.folder}/results/{name}", str(self.job.results / f"{name}.part"))
                    (self.job.results / f"{name}.part").rename(self.job.results / name)

        await self.link.ask(get, 600)
        self.taken |= set(new)

    async def _failed(self, state: str) -> None:
        words = (await self.link.sh(f"tail -n 1 {self.folder}/err 2>/dev/null; true")).strip()
        kept = f"{len(self.taken)} of {len(self.job.names)} results were finished"
        await self._clear()
        how = {
            "124": f"took longer than {self.job.limit_s} s and was ended",
            "gone": "vanished without a word (was it started anew?)",
        }
        raise AnytimeError(
            f"{self.board}: the agent {how.get(state, f'failed with exit status {state}')}; {kept}"
            + (f": {words}" if words else "")
        )

    async def _clear(self) -> None:
        await self.link.sh(f"rm -rf {self.folder} {self.folder}.part; rmdir {FOLDER} .anytime 2>/dev/null; true", 60)
