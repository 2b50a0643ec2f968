#!/usr/bin/env bash
# A bare machine -> everything installed and the tests passed. Can be repeated.
#
#   bash dev/test.sh                    the suite
#   bash dev/test.sh -m slow            the longer checks
#   bash dev/test.sh tests/test_gpt.py  what pytest is told instead
#
# Some tests drive a browser, a sandbox, an SSH server and Slurm. Where these are missing the tests are skipped and say so; with CI=true, as root on Debian,
# they are installed first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/bootstrap.sh
set_up_environment dev
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release; then
    packages=()
    for pair in bwrap:bubblewrap chromium:chromium sshd:openssh-server tmux:tmux sbatch:slurm-wlm munged:munge; do
        PATH="$PATH:/usr/sbin" command -v "${pair%:*}" >/dev/null || packages+=("${pair#*:}")
    done
    if [ ${#packages[@]} -gt 0 ]; then
        say "what some tests drive: ${packages[*]}"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1 \
            || say "not installed: the tests that need them are skipped"
    fi
fi
say "the tokenizer and the engine in Rust"
cargo test --quiet --manifest-path rustbpe/Cargo.toml
say "the tests in Python"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
python -m pytest -n 2 -q "$@"
