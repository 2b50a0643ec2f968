#!/usr/bin/env bash
# The one text that travels inside a job's command, since a job begins in a container without our code: it gets the code, then runs a script of it.
#
#   hf jobs run --flavor a10g-large --timeout 12h --secrets HF_TOKEN -e REPO_URL=https://github.com/me/fork -e GIT_REF=v1 -e HF_OUTPUT_REPO=me/run \
#       IMAGE bash -c "$(cat hf_jobs/start.sh)" start run_full_pipeline.sh
#
# Either REPO_URL at GIT_REF (a commit, tag or branch; the default branch if it is empty) is cloned; or CODE_FILE of the Hub repository CODE_REPO, whose
# SHA-256 is CODE_SHA256, is unpacked: launch.py packs the working tree there. The code lies in $WORKDIR/code.
set -euo pipefail
die() { printf '\nERROR: %s\n' "$*" >&2; exit 1; }

script="${1:-}" workdir="${WORKDIR:-/workspace}" endpoint="${HF_ENDPOINT:-https://huggingface.co}"
[[ "$script" =~ ^[a-z_]+\.sh$ ]] || die "the script to run is ${script:-not given}: give the name of one in hf_jobs/, for example run_full_pipeline.sh"
mkdir -p "$workdir" && cd "$workdir" || die "WORKDIR=$workdir cannot be made: choose a folder that this user may write"

need() {
    command -v "$1" >/dev/null && return
    [ "${HF_INSTALL_BASE_PACKAGES:-1}" = 1 ] || die "$1 is missing in this image and HF_INSTALL_BASE_PACKAGES=0 forbids to install it"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$1" ca-certificates; } || die "$1 could not be installed: choose an image with it"
}

rm -rf code
if [ -n "${CODE_REPO:-}" ]; then
    need python3
    # the token stands in a header that a redirect to the storage does not get; it is in no command line
    CODE_URL="$endpoint/$CODE_REPO/resolve/main/$CODE_FILE" python3 - <<'PY' || die "the code could not be fetched from $CODE_REPO: does the secret HF_TOKEN read it?"
import hashlib, io, os, sys, tarfile, time, urllib.error, urllib.request
request = urllib.request.Request(os.environ["CODE_URL"])
if os.environ.get("HF_TOKEN"):
    request.add_unredirected_header("Authorization", "Bearer " + os.environ["HF_TOKEN"])
for attempt in range(5):
    try:
        content = urllib.request.urlopen(request, timeout=120).read()
        if hashlib.sha256(content).hexdigest() == os.environ["CODE_SHA256"]:
            break
        problem = f"{len(content)} bytes came with another SHA-256 than CODE_SHA256"
    except OSError as error:
        problem = error
        if getattr(error, "code", 0) in (401, 403, 404):
            sys.exit(f"{error} for {request.full_url}")
    print(f"{problem}; trying again", flush=True)
    time.sleep(2 ** attempt)
else:
    sys.exit(str(problem))
tarfile.open(fileobj=io.BytesIO(content)).extractall("code", filter="data" if hasattr(tarfile, "data_filter") else None)
PY
elif [ -n "${REPO_URL:-}" ]; then
    [[ "$REPO_URL" != -* && "${GIT_REF:-}" != -* ]] || die "REPO_URL and GIT_REF do not begin with -"
    need git
    GIT_TERMINAL_PROMPT=0 git clone --quiet "$REPO_URL" code || die "REPO_URL=$REPO_URL cannot be cloned from here: is it public? launch.py sends the working tree instead"
    if [ -n "${GIT_REF:-}" ]; then
        commit=$(git -C code rev-parse --verify --quiet "origin/$GIT_REF^{commit}" || git -C code rev-parse --verify --quiet "$GIT_REF^{commit}") \
            || die "GIT_REF=$GIT_REF is no branch, tag or commit of $REPO_URL: nothing else is trained instead"
        git -C code checkout --quiet --detach "$commit"
    fi
    echo "code: $REPO_URL at $(git -C code rev-parse HEAD)"
else
    die "this container has no code: set REPO_URL (and GIT_REF), or start the job with python -m hf_jobs.launch, which sends the working tree"
fi
cd code
[ -f "hf_jobs/$script" ] || die "the code has no hf_jobs/$script"
exec bash "hf_jobs/$script"
