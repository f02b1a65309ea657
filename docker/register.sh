#!/bin/sh
# Tell the SuperLink the public keys of its SuperNodes: register.sh ADDRESS CA.crt KEY.pub...
# A key that it knows already is fine; one that was revoked is known, and stays revoked.
set -eu
address=$1 ca=$2
shift 2

FLWR_HOME=$(mktemp -d)
export FLWR_HOME
printf '[superlink.federation]\naddress = "%s"\nroot-certificates = "%s"\n' "$address" "$ca" > "$FLWR_HOME/config.toml"

for key in "$@"; do
  # Its exit status is 0 whatever happened; what it prints is not.
  said=$(flwr supernode register "$key" federation --format json 2>&1) || true
  case $said in
    *'"success": true'*) echo "registered $key as node $(echo "$said" | sed -n 's/.*"node-id": "*\([0-9]*\).*/\1/p')" ;;
    *"already in use"*) echo "registered before: $key" ;;
    *) echo "$key was not registered: $said" >&2; exit 1 ;;
  esac
done
