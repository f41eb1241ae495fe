# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment in the repository, made once.

# What is installed is no secret, and accounts of the node's own run it.
umask 022
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repository=$PWD

say() { printf '[%6s s] %s\n' "$SECONDS" "$*"; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Python 3.11 to 3.14 is needed, and none was found; set PYTHON to one." >&2
    return 1
}

# Everything that lint and the whole suite need; the archive's scorer only where it can be compiled.
full_environment() {
    local extras=cpu,jobs,train,edge,test
    environment .venv-test "$extras" torch==2.14.1 torchvision==0.29.1
}

# environment DIRECTORY EXTRAS [REQUIREMENT...]: make it and install, unless that is done.
environment() {
    local directory=$1 extras=$2 python wanted
    shift 2
    python=$(find_python)
    wanted=$({ cat pyproject.toml; echo "$repository $extras $*"; "$python" -V; } | sha256sum)
    if [ -x "$directory/bin/python" ] && [ "$(cat "$directory/stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "$directory: making the environment with $("$python" -V)"
    rm -f "$directory/stamp"
    "$directory/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$directory" || {
        echo "python -m venv failed: on Debian and Ubuntu, install python3-venv." >&2
        return 1
    }
    # Both packages write the same folder; whichever is not wanted must go first.
    case ,$extras, in
        *,gpu,*) "$directory/bin/python" -m pip uninstall -qy onnxruntime >/dev/null 2>&1 || true ;;
        *) "$directory/bin/python" -m pip uninstall -qy onnxruntime-gpu >/dev/null 2>&1 || true ;;
    esac
    install "$directory" -e ".[$extras]" "$@"
    echo "$wanted" >"$directory/stamp"
}

install() {
    local directory=$1 log=$1/install.log step='' last='' quiet=0 pid
    shift
    "$directory/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null' EXIT
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        step=$(grep -E '^ *(Collecting|Downloading|Building|Installing|Using cached)' "$log" | tail -n 1 | cut -c 1-90 || true)
        quiet=$((quiet + 1))
        if [ "$step" != "$last" ] || [ "$quiet" -ge 10 ]; then
            say "$directory: ${step# }"
            last=$step quiet=0
        fi
    done
    trap - EXIT
    wait "$pid" || {
        tail -n 20 "$log" >&2
        echo "The installation failed; all of it is in $repository/$log" >&2
        return 1
    }
    say "$directory: installed"
}
