#!/usr/bin/env bash
# The run in the base directory -> a Google Cloud Storage bucket, with the variables of .env (GCS_BUCKET, GOOGLE_APPLICATION_CREDENTIALS,
# NANOCHAT_BASE_DIR, WANDB_RUN). The flags are those of scripts/upload_to_gcs.py, which does it; GCS_UPLOAD_GUIDE.md explains them.
#
#   bash scripts/upload_to_gcs.sh --bucket=my-bucket --run-name=first --exclude-data --dry-run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/bootstrap.sh
read_env_file .env
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
exec python -m scripts.upload_to_gcs "$@"
