#!/usr/bin/env bash
# What deploy.py --ssh starts on the machine, from the root of the tree that it sent: install what is missing, then run experiment.json here.
set -euo pipefail

if [ -z "${INTEGRATION_PYTHON:-}" ]; then
    source scripts/bootstrap.sh
    set_up_environment dev  # transformers is among the development's packages
    INTEGRATION_PYTHON=python
fi
exec "$INTEGRATION_PYTHON" dev/integration_training/deploy.py experiment.json
