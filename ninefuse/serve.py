"""One mount, from the first system call to the last.

`serve` sets the process up, attaches the source, mounts, and serves until the mount is
gone. The daemon never asks anything of its own mount.

Locks touched: none of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ninefuse import executor, groundwork, ops
from ninefuse.exitcodes import ExitCode, Failure
from ninefuse.fuse import sessions
from ninefuse.fuse.forgetting import Forgetter
from ninefuse.fuse.sessions import FuseSession
from ninefuse.linux import callers, mountflags, mountinfo
from ninefuse.linux.inodes import inodes_of
from ninefuse.linux.mountinfo import MountsBelow, OwnMount
from ninefuse.process import logs, memory, signals
from ninefuse.process.stopper import Stopper
from ninefuse.settings import LEADERS, Settings
from ninefuse.tree.leaving import Leaver
from ninefuse.tree.qids import ROOT_NODEID
from ninefuse.tree.session import Session
from ninefuse.watching import report

if TYPE_CHECKING:
    from ninefuse.sockets import Beside

log = logging.getLogger(__name__)

_MIN_STEP = 256  # fids by which the table grows until somebody minds it


def serve(settings: Settings, ready: Callable[[], None]) -> int:
    """Mount and serve until unmounted. Blocks; on the main thread.

    Args:
        settings: as preflight has checked and returned them.
        ready: called once the mount answers.

    Returns:
        The process's exit code.

    Raises:
        Failure: the mount was refused, or clients at sockets cannot be served.
    """
    if not settings.listen:
        return _prepare(settings, ready, None)
    from ninefuse.sockets import Beside  # with trio, which takes as long to load as all the rest

    beside = Beside(settings)  # while the umask is what it was
    try:
        return _prepare(settings, ready, beside)
    finally:
        beside.close()


def _prepare(settings: Settings, ready: Callable[[], None], beside: Beside | None) -> int:
    groundwork.settle_process()
    callers.look_apart()
    source, is_whole = groundwork.open_source(settings)
    settings = _forbid_as(settings, source)
    if settings.allow_other and settings.model == "none":
        log.warning("under --model none each user can keep all others waiting: use another one")
    if settings.allow_other and not settings.xattr:
        log.warning("with noxattr the kernel sees mode bits only, and lets in whom ACLs keep out")
    _warn_of_what_it_hides(settings)
    os.chdir("/")  # so as not to keep another file system busy

    leads = _leads(settings)
    by_user = _serves_several(settings) or beside is not None
    driver = groundwork.create_driver(settings, source, by_user=by_user, leads=leads)
    mounts = MountsBelow(settings.source)
    session = Session(
        driver,
        clients=beside is not None,
        read_only=settings.read_only,
        sync_directories=settings.sync or settings.dirsync,
        # Those who lead make most of their calls by what is open already.
        threads=LEADERS // 4 + (0 if settings.model == "none" else settings.threads),
        attr_timeout=settings.attr_timeout,
    )
    front = sessions.create(settings, session, driver)
    if settings.attr_timeout:
        session.attributes_changed = front.attributes_changed
    inodes = inodes_of(source) if is_whole and front.asks_again else None
    session.fids.devices.inodes = inodes
    session.noatime, session.nodiratime = settings.noatime, settings.nodiratime
    session.fids.devices.hides = mountflags.HIDEABLE & ~_forbidden(settings)
    with contextlib.ExitStack() as trace:
        if settings.trace_file is not None:
            source_name, mountpoint = map(report.printable, (settings.source, settings.mountpoint))
            title = f"ninefuse {source_name} on {mountpoint}, model {settings.model}"
            path = settings.trace_file
            front.watch(trace.enter_context(groundwork.traced(path, title, driver, session)))
        try:
            _serve(settings, driver, session, front, source, mounts, ready, beside)
        finally:
            driver.end_waits()
            session.fids.clear()
            driver.close()
            front.close()
            os.close(source)
            if inodes is not None:
                inodes.close()
            logs.tell_repeats(all_of_them=True)
    log.info("%s: unmounted", settings.mountpoint)
    return ExitCode.OK


def _leads(settings: Settings) -> bool:
    """Whether the role of the dispatcher is to change threads, not the request.

    Raises:
        Failure: it was asked for, and the native session was not built.
    """
    leads = settings.may_lead and sessions.is_native(settings)
    if settings.handover == "role" and not leads:
        text = "-o handover=role: the native session was not built"
        raise Failure(ExitCode.USAGE, text)
    return leads


def _serves_several(settings: Settings) -> bool:
    """Whether others than the one who mounts may use the mount, so that each has a share."""
    # What a mount lets in that somebody else has made is not known.
    return settings.allow_other or settings.is_handed_over


def _forbid_as(settings: Settings, source: int) -> Settings:
    """Have the mount forbid what the mount that the source lies on forbids."""
    if settings.is_handed_over:
        return settings
    flags = mountflags.flags_of(source)
    new = mountflags.words_of(flags & ~mountflags.forbidden_by(settings.mount_options))
    if new:
        log.info("mounted with %s, as the source is", ", ".join(new))
    words = mountflags.taken_over(settings.mount_options, flags)
    return dataclasses.replace(settings, mount_options=words)


def _warn_of_what_it_hides(settings: Settings) -> None:
    """Warn of a mount below ours; an automount's is there to be mounted on."""
    if settings.is_handed_over:
        return
    kind = mountinfo.kind_at(settings.mountpoint)
    if kind not in ("", "autofs"):
        log.warning("%s: this mount hides the one that is there (%s)", settings.mountpoint, kind)


def _forbidden(settings: Settings) -> int:
    """What the mount forbids by itself."""
    if settings.is_handed_over:
        return 0  # whoever made it has said
    # To users other than root fusermount3 forbids it, whatever they say.
    return mountflags.forbidden_by(settings.mount_options if os.geteuid() == 0 else ())


def _serve(
    settings: Settings,
    driver: executor.Executor,
    session: Session,
    front: FuseSession,
    source: int,
    mounts: MountsBelow,
    ready: Callable[[], None],
    beside: Beside | None,
) -> None:
    begin = executor.NoThreading()  # what is counted are callbacks
    begin.run_here(ops.version(session, ops.MAX_MSIZE, ops.VERSION))
    begin.run_here(ops.attach(session, ROOT_NODEID, source))
    counters = report.Counters(settings, front, driver, session)
    front.statistics = counters.published
    stopper = Stopper(
        settings.mountpoint,
        is_used=lambda: bool(session.fids.statistics().files),
        end_loop=front.end,
    )
    stopper.number, stopper.point = front.mount()
    if stopper.number is not None:
        _follow_mount(settings, session, mounts, stopper.number)
    forgetter = _mind_the_table(session, settings, front)
    leaver = Leaver(session.fids, forgetter.ask_for)

    def stop() -> None:
        if beside is not None:
            beside.hang_up()
        forgetter.end()  # while what it asks is still answered
        stopper.stop()

    def end_now() -> None:
        if beside is not None:
            beside.close()
        stopper.abandon()

    def started() -> None:
        memory.settle()
        log.info("%s: mounted on %s, model %s", settings.source, settings.mountpoint, driver.model)
        if beside is not None:
            beside.start(driver, session, ROOT_NODEID)
        ready()

    try:
        signals.start(
            stop=stop,
            end_now=end_now,
            counters=lambda: groundwork.log_lines(counters.lines()),
            stacks=lambda: groundwork.log_lines(report.stacks(driver)),
        )
        front.run(started)
    finally:
        if beside is not None:
            beside.end(driver)
        leaver.end()
        stopper.announce()
        stopper.ended.set()
        is_mounted = stopper.is_mounted()
        if stopper.point is not None and is_mounted:
            stopper.point.detach()
        if forgetter.end():
            front.leave(is_mounted=is_mounted)
        else:  # a call to the device has not come back, and nobody may take it away
            log.error("%s: the kernel does not answer; ending without", settings.mountpoint)
            stopper.abandon()


def _follow_mount(settings: Settings, session: Session, mounts: MountsBelow, number: int) -> None:
    """Have the session follow what becomes of the mount that requests come by."""
    if not settings.one_file_system:
        session.own_mount = OwnMount(mounts, number)
    # That a mount becomes read-only the kernel sees to by itself.
    own = b"0:%d" % number
    session.has_become_writable = lambda: mounts.is_writable(own)

    def follow() -> None:
        flags = mounts.flags_of(own)
        session.fids.devices.hides = mountflags.HIDEABLE & ~mountflags.forbidden_in(flags)
        if (b"noatime" in flags) != shown[-1]:  # a remount
            shown.append(b"noatime" in flags)
            session.noatime = shown[-1]

    mounts.is_writable(own)  # which reads the table
    shown = [b"noatime" in mounts.flags_of(own)]
    mounts.on_change = follow
    session.look_at_mount = lambda: mounts.is_writable(own)


def _mind_the_table(session: Session, settings: Settings, front: FuseSession) -> Forgetter:
    """Have what a big table needs done as it grows."""
    most = settings.max_inodes or sys.maxsize
    forgetter = Forgetter(session.kernel, most, front.prune)

    def changed() -> None:
        memory.settle()
        forgetter.note()

    session.fids.on_change = changed
    session.fids.step = max(_MIN_STEP, min(session.fids.step, most // 16))
    return forgetter
