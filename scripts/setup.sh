#!/usr/bin/env bash
# Creates or updates .venv. Safe to run at any time: it does nothing when nothing changed, and after an
# interruption it picks up where it stopped, because the stamp that marks success is written last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
python=$venv/bin/python
stamp=$venv/setup-done
log=$venv/setup.log

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
minor() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
python_h() { "$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")'; }
can_compile() {  # what FFCV is built from
    pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null && [[ -f $(python_h) ]]
}

# --- nothing to do? -----------------------------------------------------------------------------------------------
# The stamp holds a checksum of what set-up depends on (the folder, too: console scripts contain its path) and what
# became of FFCV. Where its libraries were missing, set-up runs again once they have appeared.
key="$PWD ${PYTHON:-} $(cat setup.cfg pyproject.toml constraints.txt scripts/setup.sh | cksum)"
if [[ -x $python && -f $stamp && $(head -n 1 "$stamp") == "$key" ]]; then
    state=$(tail -n 1 "$stamp")
    if [[ $state != *"libraries missing"* ]] || ! can_compile; then
        say "$venv is up to date ($state)"
        exit 0
    fi
fi
rm -f "$stamp"

# --- a virtual environment ----------------------------------------------------------------------------------------
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python >= 3.11 found (tried ${PYTHON:-python3.11, python3.12, python3.13, python3});" \
        "install one, or name it: make setup PYTHON=/path/to/python3.11"
}

# Keep a .venv that works and is not of another version than the one asked for; otherwise make it anew.
if ! new_enough "$python" || ! "$python" -m pip --version >/dev/null 2>&1 ||
    [[ -n ${PYTHON:-} && $(minor "$python") != $(minor "$PYTHON") ]]; then
    base=$(find_python)
    say "creating $venv with $base ($(minor "$base"))"
    rm -rf "$venv"
    mkdir "$venv"
    "$base" -m venv "$venv" >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        rm -rf "$venv"
        die "'$base -m venv' failed; on Debian and Ubuntu: apt-get install python$(minor "$base")-venv"
    }
fi

# --- what FFCV needs to compile -----------------------------------------------------------------------------------
packages=(pkg-config libturbojpeg0-dev libopencv-dev g++)
[[ -f $(python_h) ]] || packages+=("python$(minor "$python")-dev")

as_root=()
if [[ $(id -u) != 0 ]]; then as_root=(sudo -n); fi
may_apt() { command -v apt-get >/dev/null && { [[ $(id -u) == 0 ]] || sudo -n true 2>/dev/null; }; }
run_apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 "$@" >>"$log" 2>&1; }

if ! can_compile && may_apt; then
    say "installing what FFCV needs to compile: ${packages[*]}"
    # A failed update may leave usable lists, so it does not stop the install.
    run_apt -qq update || true
    run_apt -qq install -y --no-install-recommends "${packages[@]}" || {
        tail -n 3 "$log" >&2
        say "apt-get failed (above; all of it in $log)"
    }
fi

# --- Python packages ----------------------------------------------------------------------------------------------
# pip writes RECORD last. A package without one was cut off half-way, and pip would take it for installed.
for info in "$venv"/lib/python*/site-packages/*.dist-info; do
    [[ -f $info/RECORD || ! -d $info ]] || rm -rf "$info"
done

install() {
    say "installing vmoe_momentum[$1] (the first time: some minutes and 6 GB)"
    "$python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$1]" >>"$log" 2>&1
}

if ! can_compile; then
    state="no, libraries missing"
    say "FFCV is left out: what it compiles against is missing and could not be installed from here."
    say "    Debian, Ubuntu: sudo apt-get install ${packages[*]}"
    say "    then 'make setup' again. Until then data is read from image folders (the folder backend)."
elif install all,ffcv && "$python" -c 'import ffcv.loader' >>"$log" 2>&1; then
    state=yes
else
    state="no, failed to install"
    tail -n 15 "$log" >&2
    say "installing with FFCV failed (above; all of it in $log): going on without it,"
    say "    data is read from image folders (the folder backend). To try again: rm $stamp && make setup"
    "$python" -m pip uninstall -q -y ffcv >>"$log" 2>&1 || true
fi
if [[ $state != yes ]] && ! install all; then
    tail -n 15 "$log" >&2
    die "pip failed (above; all of it in $log). Once that is mended, 'make setup' goes on from here."
fi

printf '%s\nffcv: %s\n' "$key" "$state" >"$stamp"
say "done (ffcv: $state)"
