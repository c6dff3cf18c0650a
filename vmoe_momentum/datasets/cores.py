"""How many cores there are to decode on."""

import os


def usable_cores() -> int:
    """Cores this process may run on; where the system does not say (macOS), all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
