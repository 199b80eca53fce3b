#!/usr/bin/env bash
# Builds the Kubernetes programs that the cluster tests start, from Go modules, into a cache by version.
#
# No container registry and no release download is needed: only Go and its module proxy. Cold it takes
# about 15 minutes on two cores, afterwards nothing. Prints the directory; with --where it does only that.
# KUBEBUILDER_ASSETS names another one: what is there is used, what is missing is built into it. Each
# program's module pins its own versions (go.mod, go.sum): etcd and kwok use other k8s.io versions than
# Kubernetes itself.
set -euo pipefail
cd "$(dirname "$0")"

version=$(sed -n 's/^.*k8s.io\/kubernetes v\([0-9.]*\).*/\1/p' k8s/go.mod | head -n 1)
sums=$(cat ./*/go.mod | sha256sum | cut -c1-8)
bin=${KUBEBUILDER_ASSETS:-${XDG_CACHE_HOME:-$HOME/.cache}/trimtab/cluster-tools/$version-$sums}
echo "$bin"
test "${1:-}" != --where || exit 0
mkdir -p "$bin"

build() { # MODULE PROGRAM PACKAGE LDFLAGS: under another name first, so that an aborted build leaves nothing that looks whole
  test -x "$bin/$2" && return
  command -v go >/dev/null || { echo "make cluster-tools needs Go 1.26 or newer (https://go.dev/doc/install)" >&2; exit 1; }
  echo "building $2" >&2
  (cd "$1" && CGO_ENABLED=0 go build -p "$(nproc)" -trimpath -ldflags "-s -w $4" -o "$bin/.$2.$$" "$3")
  mv "$bin/.$2.$$" "$bin/$2"
}

component=k8s.io/component-base/version
minor=$(cut -d. -f2 <<<"$version")
# Without these the server calls itself v0.0.0-master and clients refuse the skew.
stamp="-X $component.gitVersion=v$version -X $component.gitMajor=1 -X $component.gitMinor=$minor"

build etcd etcd go.etcd.io/etcd/server/v3 ""
for program in kube-apiserver kube-controller-manager kube-scheduler kubectl kube-proxy; do
  build k8s "$program" "k8s.io/kubernetes/cmd/$program" "$stamp"
done
build kwok kwok sigs.k8s.io/kwok/cmd/kwok ""
