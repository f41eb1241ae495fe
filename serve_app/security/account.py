"""Who runs a command on this machine: the audit log's actor for what no token was needed for."""

from __future__ import annotations

import os
import pwd


def os_account() -> str:
    """Name the account that runs this process: `os:` and its login name, or its number where it has no name.

    By the real user id, which the kernel keeps: LOGNAME, USER and SUDO_UID are whatever the caller says they are.
    The prefix tells it from the subject of a token.
    """
    uid = os.getuid()
    try:
        return f"os:{pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"os:{uid}"
