#!/usr/bin/env bash
# What the test cluster needs from the system. Idempotent; says what it does. Without root it only
# says what is missing: the cluster tests then skip with that as their reason.
set -euo pipefail
packages=(buildah ca-certificates conntrack containerd containernetworking-plugins gcc git ipset
    iproute2 iptables libc6-dev mmdebstrap openssl procps runc socat util-linux)

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
command -v go >/dev/null || printf 'daruma: no Go on PATH: the cluster tests will skip (Go 1.24 or newer is needed)\n' >&2
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    printf 'daruma: missing for the test cluster: %s\n' "${missing[*]}" >&2
    exit 0
fi
printf 'daruma: installing %s\n' "${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"
