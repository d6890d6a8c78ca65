#!/usr/bin/env bash
# Trainings that no session has finished yet go on on another machine: their checkpoints travel in results/unfinished, in
# parts that a repository takes. The next `make exp` that wants such a training finds its checkpoint in the cache and goes on.
#
#     scripts/unfinished.sh pack      # results/cache -> results/unfinished, to be committed; what is finished leaves it
#     scripts/unfinished.sh restore   # and back, where the cache has neither the checkpoint nor the finished weights
set -euo pipefail
cd "$(dirname "$0")/.."
cache=results/cache/trained kept=results/unfinished
shopt -s nullglob

case ${1:-} in
  pack)
    rm -rf "$kept"
    for file in "$cache"/*/checkpoint.pt; do
      mkdir -p "$kept"
      name=$(basename "$(dirname "$file")")
      split --bytes=4M --additional-suffix=.part "$file" "$kept/$name.pt."
      echo "packed $name: $(stat -c %s "$file") bytes"
    done ;;
  restore)
    for part in "$kept"/*.pt.aa.part; do
      name=$(basename "$part" .pt.aa.part)
      if [ -e "$cache/$name/checkpoint.pt" ] || [ -e "$cache/$name/weights.safetensors" ]; then
        echo "$name is in the cache already"
      else
        mkdir -p "$cache/$name"
        cat "$kept/$name".pt.*.part > "$cache/$name/checkpoint.tmp" && mv "$cache/$name/checkpoint.tmp" "$cache/$name/checkpoint.pt"
        echo "restored $name"
      fi
    done ;;
  *) echo "scripts/unfinished.sh pack | restore: give one of the two" >&2; exit 2 ;;
esac
