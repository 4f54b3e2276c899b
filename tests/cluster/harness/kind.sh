#!/usr/bin/env bash
# Run a command against a kind cluster made for it: kind.sh COMMAND…
set -euo pipefail
command -v docker >/dev/null && command -v kind >/dev/null || {
    printf 'daruma: docker and kind are needed; `make cluster` needs neither\n' >&2
    exit 3
}
name=daruma-test
here=$(cd "$(dirname "$0")/../../.." && pwd)
KUBECONFIG=$(mktemp)
export KUBECONFIG
trap 'kind delete cluster --name "$name"; rm -f "$KUBECONFIG"' EXIT
kind create cluster --name "$name" --wait 120s
docker build -q -f "$here/operator/Dockerfile" -t daruma.dev/operator:0.1.0 "$here"
docker build -q -f "$here/trainer/Dockerfile" -t daruma.dev/server:0.1.0 "$here"
docker build -q -f "$here/trainer/Dockerfile" -t daruma.dev/worker:0.1.0 --build-arg EXTRA=torch "$here"
kind load docker-image --name "$name" daruma.dev/operator:0.1.0 daruma.dev/server:0.1.0 daruma.dev/worker:0.1.0
"$@"
