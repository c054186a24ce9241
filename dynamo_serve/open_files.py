"""Every connection is an open file, and systems allow few of them unless they are asked."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

OWN_FILES = 640  # connections that are probes or leaving, pipes, libraries, the model's files


def make_room(max_connections: int) -> int:
    """Let this process open enough files; how many connections there is room for after that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    if hard != resource.RLIM_INFINITY and hard < wanted:
        room = max(1, hard - OWN_FILES)
        log.warning(
            "server.max_connections = %d needs %d open files, the system allows %d: %d it is",
            *(max_connections, wanted, hard, room),
        )
        wanted, max_connections = hard, room
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max_connections
