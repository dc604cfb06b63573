#!/usr/bin/env bash
# Gets the image that the Dockerfile builds on: pulls it, or, where no registry can be reached, makes a stand-in of the
# same Debian release with debootstrap and gives it the same name. Debian's own Python takes the place of Docker's.
set -euo pipefail

name=$1
pull_seconds=300

if podman image exists "$name"; then
    exit
fi
if timeout "$pull_seconds" podman pull --quiet "$name"; then
    exit
fi

echo "$name can't be pulled: making a stand-in with debootstrap"
release=bookworm
packages=ca-certificates,netbase,python3,python3-venv,tzdata
# The mirror that this machine itself uses; debootstrap knows Debian's own.
mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' | awk -v release=$release '$1 == release && !found++ { print $2 }')

root=$(mktemp --directory)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include="$packages" "$release" "$root" ${mirror:+"$mirror"}
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar --create --directory "$root" . | podman import --change 'CMD ["python3"]' - "$name"
