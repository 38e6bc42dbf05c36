"""What a kernel's link takes beside 9P's: the new name remembered, a second look at the file.

Locks touched: the rename lock, read, where a name is remembered.
"""

from __future__ import annotations

from ninefuse.tree.session import Session


async def remember(session: Session, nodeid: int, parent: int, name: bytes) -> None:
    """Find a file by its new name from now on.

    Mail and git link, and remove the name that they began with. And what was made without a name
    (`callbacks.tmpfile`) has a first one by that.

    Args:
        session: the conversation.
        nodeid: the file.
        parent: the directory of its new name.
        name: it.

    Raises:
        OSError: unknown fid.

    Locks: the rename lock, read.
    """
    file = session.fids.get(nodeid)
    try:
        directory = session.fids.get(parent)
        try:
            await session.remember(file.node, directory.node, name)
        finally:
            session.fids.put(directory)
    finally:
        session.fids.put(file)


def is_worth_a_look(session: Session, nodeid: int, parent: int) -> bool:
    """Whether a file that cannot be linked to may have been found at another place since.

    What the kernel has in memory it does not look up, and at another place of the directory the
    file is the same. ESTALE has it look at the file's name again, once; where it is found by that
    is where it was meant.
    """
    file = session.fids.get(nodeid)
    try:
        directory = session.fids.get(parent)
        node, there = file.node, directory.node
        session.fids.put(directory)
        rare = node.with_rare
        asked, rare.asked = rare.asked, None
        if node.device.number != there.device.number or asked is node.mount:
            return False  # it was looked up, and found at the same place
        rare.asked = node.mount
        return True
    finally:
        session.fids.put(file)
