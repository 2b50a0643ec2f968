"""What the launchers' tests share: a tiny repository that trains for a second, quick settings, and eyes on every process's command line."""
import os
import subprocess
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECRET = "wandb-secret-3f1c9a77"
# scale 0.02: 12 s between looks become 0.24 s
QUICK = {"poll_seconds": 12, "settle_seconds": 20, "max_wait_minutes": 90, "terminate_minutes": 60, "lost_minutes": 3, "start_minutes": 120, "fetch_minutes": 30}
SCALE = float(os.environ.get("NANOCHAT_TEST_CLOUD_SCALE", "0.02"))  # larger for a machine that is very busy

RUN = r"""#!/usr/bin/env bash
set -euo pipefail
source scripts/bootstrap.sh
read_env_file .env
base="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
mkdir -p "$base/report" "$base/runs" "$base/base_data" "$base/base_checkpoints/d2"
say "installing"
printf '%s' "${WANDB_API_KEY:-}" | sha256sum | cut -c1-64 > "$base/report/key.txt"
sleep "${BEFORE:-0}"
for step in 2 4; do
    [ -n "${SILENT:-}" ] || echo "base step $step/4 (0 %) | loss 5.0"
    for kind in model optim; do head -c 3000 /dev/urandom > "$base/base_checkpoints/d2/${kind}_00000$step$([ $kind = optim ] && echo _rank0 || true).pt"; done
    echo "{}" > "$base/base_checkpoints/d2/meta_00000$step.json"
    sleep "${PAUSE:-0.1}"
done
echo data > "$base/base_data/shard.parquet"
echo '{"step": 4}' > "$base/runs/base_d2.jsonl"
exit "${EXIT:-0}"
"""


def tiny_repository(folder):
    """A git repository with the real bootstrap.sh, a run that prints training lines, a change that is not committed, and a .env."""
    folder = Path(folder)
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "bootstrap.sh").write_text((ROOT / "scripts" / "bootstrap.sh").read_text())
    (folder / "run.sh").write_text(RUN)
    (folder / ".gitignore").write_text(".env\nignored/\n")
    (folder / "committed.txt").write_text("old\n")

    def git(*arguments):
        subprocess.run(["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments], check=True, capture_output=True)
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (folder / "committed.txt").write_text("changed here\n")
    (folder / "new.txt").write_text("not committed\n")
    (folder / "ignored").mkdir()
    (folder / "ignored" / "huge").write_text("x")
    (folder / ".env").write_text(f"WANDB_API_KEY={SECRET}\nLAMBDA_API_KEY=secret-api-key\nNANOCHAT_BASE_DIR=/of/this/machine\nPAUSE=0.1\n")
    return folder


class Eyes(threading.Thread):
    """Looks at every process's command line until the block ends; `.seen` is all of them."""

    def __enter__(self):
        self.seen, self.over = set(), threading.Event()
        self.start()
        return self

    def run(self):
        while not self.over.wait(0.05):
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    try:
                        self.seen.add(Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                    except OSError:
                        pass

    def __exit__(self, *exception):
        self.over.set()
        self.join()


def texts_below(folder):
    return {str(path): path.read_bytes().decode(errors="replace") for path in Path(folder).rglob("*") if path.is_file()}
