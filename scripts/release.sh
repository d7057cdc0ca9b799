#!/usr/bin/env bash
# usage: scripts/release.sh TAG
#
# Makes in dist/ what a release has beside the image: a binary for each platform, their checksums, and the
# notes, which are the section of the version in CHANGELOG.md. TAG is the one of the commit that is checked
# out, such as v1.2.3.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "release.sh: $*" >&2; exit 1; }

tag=${1:-}
[[ $tag =~ ^v[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]+)?$ ]] ||
    die "usage: scripts/release.sh TAG, such as v1.2.3"

rm -rf dist
mkdir dist
# Lines that continue an item are joined to it: a release's page shows every line break.
awk -v heading="## [${tag#v}] - " '
    /^## / { inside = index($0, heading) == 1; next }
    !inside { next }
    /^  / { sub(/^ +/, " "); printf "%s", $0; next }
    { printf "%s%s", newline, $0; newline = "\n" }
    END { print "" }
' CHANGELOG.md >dist/notes.md
grep -q "[^[:space:]]" dist/notes.md || die "CHANGELOG.md has no section \"## [${tag#v}] - DATE\""

for architecture in amd64 arm64; do
    binary=dist/goods-$tag-linux-$architecture
    CGO_ENABLED=0 GOOS=linux GOARCH=$architecture \
        go build -buildvcs=true -trimpath -tags nethttpomithttp2 -ldflags='-s -w' -o "$binary" .
    version=$(go version -m "$binary" | awk '$1 == "mod" { print $3 }')
    [[ $version == "$tag" ]] || die "the files here are of version $version, not $tag"
done
cd dist
sha256sum goods-* >SHA256SUMS
cat SHA256SUMS
