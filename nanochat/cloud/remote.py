"""The bash that runs on a rented machine, each piece with its arguments named. All can be repeated after a lost connection.

State is in ~/.nanochat-cloud/<rental>/: `shipped`, `started`, run.sh, and `exit` with the run's status. The log is ~/<repo>/training.log.
No piece holds or takes a secret as an argument; those come over stdin.
"""
import re

# -> nothing; the machine has what bootstrap.sh needs. Arguments: rental
PREPARE = r"""
set -eu
if command -v cloud-init >/dev/null 2>&1; then timeout 900 cloud-init status --wait >/dev/null 2>&1 || true; fi
missing() { for tool in git tmux curl cc; do command -v "$tool" >/dev/null 2>&1 || echo "$tool"; done; }
if [ -n "$(missing)" ]; then
    root=; [ "$(id -u)" = 0 ] || root="sudo -n"
    $root apt-get update -qq >/dev/null
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends git tmux curl ca-certificates build-essential >/dev/null
    if [ -n "$(missing)" ]; then echo "these could not be installed:" $(missing) >&2; exit 3; fi
fi
mkdir -p "$HOME/.nanochat-cloud/$1"
chmod 700 "$HOME/.nanochat-cloud" "$HOME/.nanochat-cloud/$1"
"""

# a tar file on stdin -> ~/repo. Arguments: rental repo sha256
UNPACK = r"""
set -eu
cd "$HOME"
state=".nanochat-cloud/$1"
if [ -e "$state/shipped" ]; then cat >/dev/null; exit 0; fi
if [ -e "$2" ]; then echo "~/$2 exists on the machine already: choose another --repo-dir" >&2; exit 3; fi
rm -rf "$state/incoming" "$state/incoming.tar"
cat > "$state/incoming.tar"
echo "$3  $state/incoming.tar" | sha256sum --check --quiet
mkdir "$state/incoming"
tar -x --no-same-owner -f "$state/incoming.tar" -C "$state/incoming"
mkdir -p "$(dirname "$2")"
mv "$state/incoming" "$2"
touch "$state/shipped"
rm "$state/incoming.tar"
"""

# -> ~/repo at that branch, tag or commit ("" = the default branch); prints the commit. Arguments: rental repo url ref
CLONE = r"""
set -eu
cd "$HOME"
state=".nanochat-cloud/$1"
if [ ! -e "$state/shipped" ]; then
    if [ -e "$2" ]; then echo "~/$2 exists on the machine already: choose another --repo-dir" >&2; exit 3; fi
    rm -rf "$state/incoming"
    export GIT_TERMINAL_PROMPT=0
    git clone --quiet -- "$3" "$state/incoming"
    if [ -n "$4" ]; then
        if git -C "$state/incoming" fetch --quiet origin "$4" 2>/dev/null; then git -C "$state/incoming" checkout --quiet --detach FETCH_HEAD
        else git -C "$state/incoming" checkout --quiet --detach "$4"; fi
    fi
    mkdir -p "$(dirname "$2")"
    mv "$state/incoming" "$2"
    touch "$state/shipped"
fi
git -C "$2" rev-parse HEAD
"""

# KEY="value" lines on stdin -> a file that only its owner reads. Arguments: repo file
STORE_ENV = r"""
set -eu
umask 077
cd "$HOME/$1"
cat > "$2.partial"
mv "$2.partial" "$2"
"""

# -> the run goes on in tmux. Arguments: rental repo session socket script env-file source
START = r"""
set -eu
state="$HOME/.nanochat-cloud/$1" repo="$HOME/$2"
tm() { if [ -n "$socket" ]; then tmux -L "$socket" "$@"; else tmux "$@"; fi; }
socket=$4
if [ -e "$state/started" ]; then exit 0; fi
if [ ! -f "$repo/$5" ]; then echo "~/$2/$5 does not exist: choose another --run-script" >&2; exit 3; fi
if tm has-session -t "=$3" 2>/dev/null; then echo "a tmux session named $3 is there already and is left alone: choose another --tmux-session" >&2; exit 3; fi
{
    printf 'state=%q repo=%q script=%q env_file=%q source=%q\n' "$state" "$repo" "$5" "$6" "$7"
    cat <<'END'
cd "$repo" || exit 3
if [ -f scripts/bootstrap.sh ]; then source scripts/bootstrap.sh; read_env_file "$env_file"; fi
printf '== %s: bash %s, %s\n' "$(date -u +%FT%TZ)" "$script" "$source" >> training.log
bash "$script" > >(exec tee -a training.log) 2>&1
status=$? tee=$!
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$tee" 2>/dev/null || break; sleep 0.1; done
echo "$status" > "$state/exit.partial"
mv "$state/exit.partial" "$state/exit"
printf '\nThe run ended with status %s. This window stays open.\n' "$status"
exec bash
END
} > "$state/run.sh"
touch "$state/started"
if ! tm new-session -d -s "$3" -c "$repo" "exec bash $(printf %q "$state/run.sh")"; then rm "$state/started"; exit 3; fi
"""

# -> "probe STATE SIZE AGE GPU USERS" and the log from byte `offset` on. Arguments: rental repo session socket offset
PROBE = r"""
state="$HOME/.nanochat-cloud/$1" log="$HOME/$2/training.log"
tm() { if [ -n "$socket" ]; then tmux -L "$socket" "$@"; else tmux "$@"; fi; }
socket=$4
if [ -s "$state/exit" ]; then run="ended:$(head -c 8 "$state/exit")"
elif [ ! -e "$state/started" ]; then run=none
elif tm has-session -t "=$3" 2>/dev/null; then run=running
else run=lost; fi
size=$(stat -c %s "$log" 2>/dev/null || echo 0)
age=$(( $(date +%s) - $(stat -c %Y "$log" 2>/dev/null || date +%s) ))
gpu=$(nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits 2>/dev/null | sort -n | tail -n 1 | tr -dc 0-9)
printf 'probe %s %s %s %s %s\n' "$run" "$size" "$age" "${gpu:--1}" "$(who 2>/dev/null | wc -l)"
if [ "$size" -gt "$5" ]; then tail -c "+$(( $5 + 1 ))" "$log" | head -c 262144; fi
"""

# -> NUL-separated "size<TAB>path" of the files below a folder. Arguments: folder (absolute or below the home folder)
LIST_FILES = r"""
cd "$HOME" && cd "$1" 2>/dev/null || exit 0
find . -type f -printf '%s\t%P\0'
"""

# -> the SHA-256 of a file's first `count` bytes; its bytes from `offset` on, at most `count`. Arguments: folder path count; folder path offset count
HASH_FILE = r"""
set -eu; cd "$HOME"; cd "$1"; head -c "$3" -- "./$2" | sha256sum
"""
READ_FILE = r"""
set -eu; cd "$HOME"; cd "$1"; tail -c "+$(( $3 + 1 ))" -- "./$2" | head -c "$4"
"""


def parse_probe(output):
    """PROBE's output -> (state, exit status or None, log size, age of its last line in s, GPU percent or -1, users, new bytes of the log)."""
    header, _, log = output.partition(b"\n")
    match = re.fullmatch(rb"probe (ended:(\d{1,3})|none|running|lost) (\d+) (-?\d+) (-1|\d+) (\d+)", header)
    if not match:
        raise ValueError(f"the machine's answer to a probe is {header[:200]!r}")
    state = match[1].decode().partition(":")[0]
    return state, int(match[2]) if match[2] else None, int(match[3]), int(match[4]), int(match[5]), int(match[6]), log
