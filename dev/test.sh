#!/usr/bin/env bash
# A bare machine -> everything installed and the tests passed. Can be repeated.
#
#   bash dev/test.sh                    the suite
#   bash dev/test.sh -m slow            the longer checks
#   bash dev/test.sh tests/test_gpt.py  what pytest is told instead
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/bootstrap.sh
set_up_environment dev
say "the splitter and the trainer in Rust"
cargo test --quiet --manifest-path rustbpe/Cargo.toml
say "the tests in Python"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
python -m pytest -n 2 -q "$@"
