#!/bin/sh
# What a SuperLink knows of its SuperNodes, and who may no longer take part:
#   nodes.sh list ADDRESS CA.crt
#   nodes.sh revoke ADDRESS CA.crt NODE_ID...
# Exits with 0 only if the SuperLink says that it was done: flwr does so whatever happened.
set -eu
usage() { sed -n 's/^#   /usage: /p' "$0" >&2; exit 2; }
[ $# -ge 3 ] || usage
what=$1 address=$2 ca=$3
shift 3

FLWR_HOME=$(mktemp -d)
export FLWR_HOME
printf '[superlink.federation]\naddress = "%s"\nroot-certificates = "%s"\n' "$address" "$ca" > "$FLWR_HOME/config.toml"

case $what in
  list)
    [ $# = 0 ] || usage
    flwr supernode list federation --format json 2>&1 | python -I -c '
import json, sys
printed = sys.stdin.read()
try:
    told = json.loads(printed[printed.find("{"):])
except ValueError:
    told = {}
if not told.get("success"):
    sys.exit("The SuperLink did not say: " + (told.get("error-message") or printed.strip()))
for node in told["nodes"]:
    print(node["node-id"], node["status"], "last online:", node["online-at"])
'
    ;;
  revoke)
    [ $# -gt 0 ] || usage
    for node in "$@"; do
      said=$(flwr supernode unregister "$node" federation --format json 2>&1) || true
      case $said in
        *'"success": true'*) echo "revoked $node" ;;
        *) echo "$node was not revoked: $said" >&2; exit 1 ;;
      esac
    done
    ;;
  *) usage ;;
esac
