#!/usr/bin/env bash
# Pulls the base image of the Dockerfile. If no registry can be reached, builds a substitute of the same Debian release
# with debootstrap, under the same name. It has Debian's Python instead of the official image's.
set -euo pipefail

name=$1
pull_seconds=300

if podman image exists "$name"; then
    exit
fi
if timeout "$pull_seconds" podman pull --quiet "$name"; then
    exit
fi

echo "$name cannot be pulled: building a substitute with debootstrap"
release=bookworm
packages=ca-certificates,netbase,python3,python3-venv,tzdata
# The mirror in this machine's apt sources; without one, debootstrap uses Debian's.
mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' | awk -v release=$release '$1 == release && !found++ { print $2 }')

root=$(mktemp --directory)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include="$packages" "$release" "$root" ${mirror:+"$mirror"}
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar --create --directory "$root" . | podman import --change 'CMD ["python3"]' - "$name"
