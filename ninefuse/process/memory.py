"""What a table of a million fids asks of the interpreter and of the C library.

The collector of cyclic garbage looks at everything that was made since it was last told
that what is there now stays. With a million fids that takes the better part of a second,
during which all threads wait; and there is nothing for it to find, since fids and nodes go
when nobody refers to them any more. So it is told again and again, as the table grows.

Locks touched: none.
"""

import ctypes
import gc

_libc = ctypes.CDLL(None)


def settle(*, anew: bool = False) -> None:
    """Collect garbage, have the collector leave alone what is there now, give memory back.

    Takes a few milliseconds for each 10,000 objects that came since the last time.

    Args:
        anew: whether to look at all objects, those that were there the last time as well. What of
            those has become garbage is found in no other way.
    """
    if anew:
        gc.unfreeze()
    gc.collect()
    gc.freeze()
    if hasattr(_libc, "malloc_trim"):  # glibc's
        _libc.malloc_trim(0)
