"""Ranks look after one another: when one fails, is told to stop or dies, all end within a minute, and one says why.

A collective waits for every rank, by default for half an hour, and nothing in Python can interrupt it. So each rank
has a thread that talks to the others through the store of the process group (the one that torch made the group with):

- who ends first writes so into the store (`compare_set`, so there is one first) and is the one who speaks; the others
  see it within a second and leave with the same exit code, once a checkpoint that is being written is whole;
- each rank watches the next, so that the store is asked as often for each rank of a large job as of a small one: on
  the same machine by a handle on its process, which tells of its end at once, elsewhere by a count in the store that
  has to grow;
- when the store itself is gone, so is the process that held it: the first rank, or torchrun.
"""

import json
import multiprocessing
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import Store

_LOST = re.compile(r"gloo|nccl|c10d|TCPStore|Connection (reset|closed|refused)|Broken pipe|recvValue", re.IGNORECASE)
_END = "vmoe_momentum/end"


class Patience(NamedTuple):
    """Seconds."""

    every: float = 0.5  # between two looks
    silent: float = 30.0  # that another machine's rank may show no sign of life; an interpreter may be held for long
    leaving: float = 5.0  # for the program to end by itself, once another rank has ended
    saving: float = 30.0  # for a checkpoint to become whole
    ending: float = 20.0  # to clear up after an own error
    stopping: float = 50.0  # from a signal to a place where a checkpoint can be saved


class Watch(threading.Thread):
    """Of one rank, over the next.

    store: of the process group. agent: the process that holds it, such as torchrun, and started this one, whose end
    stops this rank as SIGTERM would; None where the first rank holds it. saving: held while a checkpoint is written.
    way_out: how to go on, for people. stopping: the signal that asked this rank to stop, or 0. children: ranks that
    this process started; it leaves after them.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        agent: int | None = None,
        saving: Any = None,
        way_out: Callable[[], str] = str,
        stopping: Callable[[], int] = int,
        children: list[subprocess.Popen[Any]] | None = None,
        patience: Patience = Patience(),  # noqa: B008  (a tuple)
    ) -> None:
        super().__init__(daemon=True, name="peers")
        self.store, self.rank, self.size, self.patience = _connection(store), rank, size, patience
        self.saving, self.way_out, self.stopping, self.agent = saving, way_out, stopping, agent
        self.children, self.next = children or [], (rank + 1) % size
        self.ended: int | None = None  # the exit code, once anybody has ended
        self._through = threading.Event()
        self._one = threading.Lock()  # one connection, two threads
        self._handles: dict[int, int] = {}  # rank -> on its process
        self._beats, self._seen, self._still, self._asked = 0, b"", 0.0, 0.0

    # What the program calls.

    def end(self, code: int) -> bool:
        """This rank ends. Is it the first, which says why? The process is gone soon after, whatever hangs in it."""
        with self._one:
            try:
                first, self.ended = json.loads(self.store.compare_set(_END, "", json.dumps([self.rank, code])))
            except RuntimeError:  # the store is gone, and whoever watches the first rank speaks
                first, self.ended = self.size - 1, code
        threading.Thread(target=self._leave, args=(self.ended, self.patience.ending), daemon=True).start()
        return first == self.rank

    def await_cause(self, error: BaseException) -> None:
        """Where the error is but the echo of another rank's end, waits for that to be known, which ends this one."""
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            self._through.wait(self.patience.silent + self.patience.leaving)

    def gather(self) -> None:
        """Before this process ends: the others have heard why, and ranks that it started are gone."""
        if self.agent is None and self.rank == 0:
            time.sleep(3 * self.patience.every)
        end_children(self.children)

    def done(self) -> None:
        """This rank is through, with no error; what becomes of the others does not concern it."""
        self._through.set()
        with self._one, suppress(RuntimeError):
            self.store.set(_key("left", self.rank), "1")

    # What the thread does.

    def run(self) -> None:
        try:
            with self._one:
                self.store.set(_key("who", self.rank), json.dumps(_who()))
            while not self._through.wait(self.patience.every):
                self._look()
        except RuntimeError:  # the store's, however it puts it
            if not self._through.is_set():
                self._without_store()

    def _look(self) -> None:
        if self.agent is not None and os.getppid() != self.agent:
            self._without_agent()
        elif self.agent is None and self.rank and self._has_died(0):
            return self._without_store()  # not asked, it need not complain
        with self._one:
            self._beats += 1
            self.store.set(_key("beat", self.rank), str(self._beats))
        if ended := self._get(_END):
            rank, self.ended = json.loads(ended)
            if rank != self.rank:
                self._leave(self.ended, self.patience.leaving)
        elif gone := self._gone():
            self._tell(1, f"error: rank {self.next} {gone}")
        elif self._overdue():
            told = f"rank {self.rank} came to no place to save within {self.patience.stopping:.0f} s"
            self._tell(128 + self.stopping(), f"stopped by {signal.Signals(self.stopping()).name}: {told}")

    def _gone(self) -> str | None:
        """What became of the next rank, in words; None while all is well."""
        who = self._get(_key("who", self.next))
        if who is None or self._get(_key("left", self.next)):
            return None
        host, _, process = json.loads(who)
        named = f"(process {process} on {host})"
        died = self._has_died(self.next)
        if died is None:
            return self._silent(named)
        if not died or self._get(_key("left", self.next)) or self._get(_END):
            return None
        return f"{named} died without a word: killed, by hand (SIGKILL) or by the kernel (out of memory: see dmesg)"

    def _has_died(self, rank: int) -> bool | None:
        """None where that cannot be told from here."""
        if rank not in self._handles:
            who = self._get(_key("who", rank))
            host, space, process = json.loads(who) if who else ("", "", 0)
            if not process or space != _who()[1] or not hasattr(os, "pidfd_open"):
                return None
            try:
                self._handles[rank] = os.pidfd_open(process)
            except ProcessLookupError:
                return True
            except OSError:  # no right to, or too many are open
                return None
        return bool(select.select([self._handles[rank]], [], [], 0)[0])

    def _silent(self, named: str) -> str | None:
        # own looks are counted, not seconds: where all processes were halted together, nobody is missing
        beat = self._get(_key("beat", self.next)) or b""
        self._still = 0.0 if beat != self._seen else self._still + self.patience.every
        self._seen = beat
        if self._still < self.patience.silent:
            return None
        return f"{named} shows no sign of life for {self._still:.0f} s: its machine, network or process is gone"

    def _overdue(self) -> bool:
        self._asked = self._asked + self.patience.every if self.stopping() else 0.0
        return self._asked > self.patience.stopping

    def _without_agent(self) -> None:
        """Saved and told as for any other signal; there may be no store any more."""
        os.kill(os.getpid(), signal.SIGTERM)
        self._through.wait(self.patience.stopping)
        self._leave(128 + signal.SIGTERM, 0.0)

    def _without_store(self) -> None:
        """Whoever watches the first rank speaks."""
        if self.ended is None and self.next == 0:
            if self._has_died(0) is False:  # its connections may go before it does
                time.sleep(1.0)
            died = "died without a word: killed, or its machine is gone"
            self._say(f"error: rank 0 {'cannot be reached any more' if self._has_died(0) is False else died}")
        self._leave(1 if self.ended is None else self.ended, self.patience.leaving)

    def _tell(self, code: int, line: str) -> None:
        if self.end(code):
            self._say(line)
            self._leave(code, 0.0)

    def _say(self, line: str) -> None:
        # not sys.stderr, whose lock may be held by what hangs
        os.write(2, f"\nvmoe-momentum: {line}; {self.way_out()}\n".encode())

    def _leave(self, code: int, grace: float) -> None:
        """Ends this process, for no exception reaches a thread that waits in a collective."""
        time.sleep(grace)
        if self.saving is not None:
            self.saving.acquire(timeout=self.patience.saving)
        self.gather()
        for child in multiprocessing.active_children():  # loaders hold the sockets that the next start listens on
            child.kill()
        os._exit(code)

    def _get(self, key: str) -> bytes | None:
        with self._one:
            return self.store.get(key) if self.store.check([key]) else None


def end_children(children: list[subprocess.Popen[Any]], seconds: float = 10.0) -> None:
    """Waits for them to follow by themselves, then kills what is left."""
    until = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


def follow_parent(parent: int, seconds: float = 15.0) -> None:
    """Ends this process so long after its parent, whatever it waits for: a first rank that dies before there is a
    store leaves the others in their search for it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _key(what: str, rank: int) -> str:
    return f"vmoe_momentum/{what}{rank}"


def _connection(store: Store) -> Store:
    """Of one's own: the other waits in collectives' set-up."""
    own = store.clone()
    own.set_timeout(timedelta(seconds=10))
    return own


def _who() -> tuple[str, str, int]:
    """Host, the kernel and space that its process numbers belong to, and this process's."""
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return host, f"{boot} {os.readlink('/proc/self/ns/pid')}", os.getpid()
    except OSError:
        return host, "", os.getpid()
