# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment in the repository, made once.

# What is installed is no secret, and accounts of the node's own run it.
umask 022
# Python would take code from the folder that this is called in, for every part that is relative or empty.
[ -z "${PYTHONPATH-}" ] || PYTHONPATH=$(tr : '\n' <<<"$PYTHONPATH" | sed -n '\|^/|p' | paste -sd :)
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

# Everything that lint and the whole suite need.
full_environment() { environment .venv-test serve cpu jobs test train; }

# What a test has node run: of its own lock, whose files are named by their SHA-512; no script of a package is run.
node_packages() {
    local folder=tests/serve_app/fhir/medplum wanted
    command -v npm >/dev/null || { echo "npm is missing: tests/serve_app/fhir will fail." >&2; return 0; }
    wanted=$({ cat "$folder/package.json" "$folder/package-lock.json"; node --version; } | sha256sum)
    [ "$(cat "$folder/node_modules/stamp" 2>/dev/null)" != "$wanted" ] || return 0
    say "$folder: making its node_modules with node $(node --version)"
    (cd "$folder" && npm ci --loglevel=error </dev/null >&2) || {
        echo "npm ci failed: tests/serve_app/fhir will fail." >&2
        return 0
    }
    echo "$wanted" >"$folder/node_modules/stamp"
}

# environment DIRECTORY LOCK...: make it of locks/LOCK.txt and nothing else, unless that is done.
# Nothing is resolved: each file is one that a lock names by its SHA-256, or the installation fails. No source archive is built.
environment() {
    local directory=$1 python wanted files
    shift
    lock_files "$@"
    python=$(find_python)
    wanted=$({ cat "${files[@]}"; echo "$repository $*"; "$python" -V; } | sha256sum)
    if [ "$(cat "$directory/stamp" 2>/dev/null)" != "$wanted" ]; then
        say "$directory: making the environment with $("$python" -V)"
        # Cleared, for what an older lock had must not stay.
        "$python" -m venv --clear "$directory" || {
            echo "python -m venv failed: on Debian and Ubuntu, install python3-venv." >&2
            return 1
        }
        install_locked "$directory" "${files[@]/#/--requirement=}"
        echo "$wanted" >"$directory/stamp"
    fi
    [ "$1" != serve ] || { install_project "$directory"; isolate "$directory/bin/derm-cds"; }
}

# lock_files LOCK...: sets `files`.
lock_files() {
    files=("${@/#/locks/}")
    files=("${files[@]/%/.txt}")
    local file
    for file in "${files[@]}"; do
        [ -f "$file" ] || { echo "$file: there is no such lock." >&2; return 1; }
    done
}

install_locked() { install "$1" --no-deps --only-binary :all: --require-hashes "${@:2}"; }

# What builds the project is locked as well, and does not stay.
install_project() {
    local directory=$1 wanted
    wanted=$(cat pyproject.toml scripts/hatch_build.py locks/build.txt | sha256sum)
    [ "$(cat "$directory/project" 2>/dev/null)" != "$wanted" ] || return 0
    install_locked "$directory" --target "$directory/build" --requirement locks/build.txt
    PYTHONPATH=$repository/$directory/build install "$directory" --no-deps --no-build-isolation -e .
    rm -r "$directory/build"
    echo "$wanted" >"$directory/project"
}

# isolate COMMAND: have Python start it with -I, so that no PYTHONPATH brings code before its first line.
# pip writes `#!python`, or where the path is long or has a space, a shell's `exec python "$0" "$@"` in line 2.
isolate() {
    head -n 2 "$1" | grep -q -e ' -I' || sed -i -E '1s|^#!/.*/python[0-9.]*$|& -I|; 2s| "\$0" "\$@"$| -I&|' "$1"
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
        ! grep -q 'DO NOT MATCH THE HASHES' "$log" || echo "A file is not the one that was locked: nothing was installed." >&2
        return 1
    }
    say "$directory: installed"
}
