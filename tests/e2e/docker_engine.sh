#!/usr/bin/env bash
# Makes ready what a federation in containers needs, as far as it is not there, and prints two lines: the image, and a
# Compose v2 binary if one could be had.
#   tests/e2e/docker_engine.sh IMAGE
# Exits 77, with one word on stdout, if this machine cannot: engine, base, wheels. On a Debian machine root can always:
# the engine comes from Debian's packages and is started by hand, the base image is made of them (no registry of images
# is asked), and the wheelhouse is pip's. BASE_IMAGE=python:3.11-slim takes that one instead, where it can be had.
# All of it is kept: the second call takes seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
image=$1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fl-app
log=${TMPDIR:-/tmp}/fl-app-dockerd.log

say() { echo "docker_engine: $* (${SECONDS}s)" >&2; }
cannot() { say "$2"; echo "$1"; exit 77; }
need() { # PACKAGE...
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  dpkg -s "$@" >/dev/null 2>&1 && return
  say "installing $*"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >&2
}
mirror() { # of this machine's own Debian packages; it is handed on, and written down nowhere
  apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' | head -n 1
}

start_engine() {
  docker info >/dev/null 2>&1 && return
  need docker.io iptables cgroupfs-mount || return
  mountpoint -q /sys/fs/cgroup || cgroupfs-mount || return
  # What a killed one left behind would keep the next from starting.
  pgrep -x dockerd >/dev/null || rm -f /var/run/docker.pid
  setsid dockerd >"$log" 2>&1 </dev/null 9>&- &
  for _ in $(seq 150); do docker info >/dev/null 2>&1 && return; sleep 0.2; done
  tail -n 5 "$log" >&2
  return 1
}

make_base() { # what python:3.11-slim is: Debian, Python 3.11 as `python`, nothing compiled
  docker image inspect "$1" >/dev/null 2>&1 && return
  need debootstrap || return
  local root
  root=$(mktemp -d)
  # shellcheck disable=SC2064  # as it is now
  trap "rm -rf '$root'" EXIT
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,netbase,tzdata \
    bookworm "$root" "$(mirror)" >&2 || return
  ln -s /usr/bin/python3.11 "$root/usr/local/bin/python"
  ln -s /usr/bin/python3.11 "$root/usr/local/bin/python3"
  find "$root" -xdev -name __pycache__ -type d -prune -exec rm -rf {} +
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* \
    "$root"/etc/apt/sources.list "$root"/etc/resolv.conf "$root"/etc/hostname
  tar -C "$root" --numeric-owner -c . | docker import -c 'ENV LANG=C.UTF-8' -c 'CMD ["python3"]' - "$1" >&2
}

collect_wheels() {
  [ wheels/.made -nt constraints.txt ] && [ wheels/.made -nt pyproject.toml ] && return
  make --no-print-directory wheels >&2 && touch wheels/.made
}

compose_v2() { # Debian 12 has docker-compose 1.29 alone; the next one's binary runs on it
  docker compose version >/dev/null 2>&1 && return
  [ -x "$cache/docker-compose" ] && return
  need docker-compose || return  # 1.29, for whoever has neither
  local lists
  lists=$(mktemp -d)
  mkdir -p "$lists/lists/partial" "$lists/archives/partial" "$cache"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) trixie main" >"$lists/sources"
  (
    cd "$lists"
    options=(-qq -o "Dir::Etc::sourcelist=$lists/sources" -o Dir::Etc::sourceparts=/dev/null
      -o "Dir::State::lists=$lists/lists" -o "Dir::Cache=$lists" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update && apt-get "${options[@]}" download docker-compose
    dpkg-deb -x docker-compose_*.deb x
    cp x/usr/libexec/docker/cli-plugins/docker-compose "$cache/"
  ) >&2
  rm -rf "$lists"
}

exec 9>"${TMPDIR:-/tmp}/fl-app-docker-engine.lock"
flock 9

start_engine || cannot engine "no Docker engine answers, and none could be started: see $log"
say "engine $(docker version --format '{{.Server.Version}}')"
base=${BASE_IMAGE:-fl-app-base:python3.11}
make_base "$base" || cannot base "no base image $base, and debootstrap could not make one"
say "base $base"
collect_wheels || cannot wheels "pip could not collect the wheels of constraints.txt"
say "wheels"
make --no-print-directory docker-build IMAGE="$image" BASE_IMAGE="$base" >&2
say "image $image"
compose_v2 || say "no Compose v2"
echo "$image"
[ ! -x "$cache/docker-compose" ] || echo "$cache/docker-compose"
