# A bare machine -> toolchain and project installed, the virtual environment active. Sourced, from the repository's root, by
# run_aquarat_small.sh, dev/test.sh and the launchers. Can be repeated: what is there is not installed again.

say() { printf '\n== %s\n' "$*"; }

die() { printf '\nERROR: %s\n' "$*" >&2; exit 1; }

ensure_uv() {
    export PATH="$PATH:$HOME/.local/bin"
    command -v uv >/dev/null && return
    say "installing uv with pip"
    python3 -m pip install --quiet --user uv 2>/dev/null && command -v uv >/dev/null && return
    # a Python that belongs to the operating system refuses pip: give uv an environment of its own
    if python3 -m venv "$HOME/.local/share/nanochat-uv" && "$HOME/.local/share/nanochat-uv/bin/pip" install --quiet uv; then
        export PATH="$HOME/.local/share/nanochat-uv/bin:$PATH"
        return
    fi
    say "pip could not install uv: using its network installer"
    curl -LsSf https://astral.sh/uv/install.sh | sh || die "uv could not be installed: install it by hand, then run this again"
}

ensure_rust() {
    export PATH="$PATH:$HOME/.cargo/bin"
    command -v cargo >/dev/null && return
    say "installing Rust, which builds the tokenizer's trainer"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal \
        || die "Rust could not be installed: install cargo by hand, then run this again"
}

# read_env_file FILE: KEY=value lines become environment variables unless the caller has set them. Data, never executed.
read_env_file() {
    [ -f "$1" ] || return 0
    local line key value
    while IFS= read -r line || [ -n "$line" ]; do
        line="${line#"${line%%[![:space:]]*}"}"
        line="${line#export }"
        [[ "$line" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || continue
        key="${line%%=*}" value="${line#*=}"
        value="${value%$'\r'}"
        case "$value" in
            \"*\") value="${value#\"}" value="${value%\"}" ;;
            \'*\') value="${value#\'}" value="${value%\'}" ;;
        esac
        if [ -z "${!key+set}" ] && [ -n "$value" ]; then export "$key=$value"; fi
    done < "$1"
}

# set_up_environment EXTRA...: uv, Rust, the locked packages, rustbpe. USE_ACTIVE_ENV=1 takes the environment that is active, as in an image that has it all
set_up_environment() {
    if [ "${USE_ACTIVE_ENV:-0}" = 1 ]; then
        python -c 'import sys; from importlib.util import find_spec as find; sys.exit(None in map(find, ("cyclopts", "rustbpe", "torch")))' || die "USE_ACTIVE_ENV=1, but $(command -v python || echo no python) lacks these packages: unset it, and they are installed"
        return
    fi
    ensure_uv
    ensure_rust
    say "installing the project (the first time: about 5 GB of packages)"
    local extras=() extra
    for extra in "$@"; do extras+=(--extra "$extra"); done
    uv sync --quiet --inexact "${extras[@]}" || die "uv sync failed: the lines above say which package"
    # shellcheck disable=SC1091
    source .venv/bin/activate
}
