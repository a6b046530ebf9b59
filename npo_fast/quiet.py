"""Processes that say nothing of their own; imports no library, so that it can come first."""

import logging
import signal

# they tell every user of a CPU which GPU libraries cannot be loaded, and developers what is old
CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def quieten_libraries() -> None:
    """Leaves of the messages of other libraries what is an error."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def begin_helper() -> None:
    """First call in a process that works for another one, which hears Ctrl-C for both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quieten_libraries()
