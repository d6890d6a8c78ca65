#!/usr/bin/env bash
# Trainings that no session has finished yet go on on another machine: their checkpoints travel in results/unfinished, in
# parts that a repository takes, and so do finished weights that the zoo does not hold, for others begin from them. The next
# `make exp` that wants such a training finds it in the cache and goes on.
#
#     scripts/unfinished.sh pack      # results/cache -> results/unfinished, to be committed; what the zoo holds leaves it
#     scripts/unfinished.sh restore   # and back, where neither cache nor zoo has the finished weights
set -euo pipefail
cd "$(dirname "$0")/.."
cache=results/cache/trained zoo=results/zoo kept=results/unfinished
shopt -s nullglob

case ${1:-} in
  pack)
    for folder in "$kept"/*/; do # what has come to its end since
      name=$(basename "$folder")
      if [ -e "$zoo/$name.safetensors" ] || [ -e "$cache/$name/weights.safetensors" ]; then rm -r "$folder"; fi
    done
    for file in "$cache"/*/checkpoint.pt "$cache"/*-base/weights.{safetensors,sha256}; do
      name=$(basename "$(dirname "$file")") what=$(basename "$file")
      if [ -e "$file" ] && [ ! -e "$zoo/$name.safetensors" ]; then
        mkdir -p "$kept/$name"
        rm -f "$kept/$name/$what".*.part
        split --bytes=4M --additional-suffix=.part "$file" "$kept/$name/$what."
        echo "packed $name: $(stat -c %s "$file") bytes"
      fi
    done ;;
  restore)
    for folder in "$kept"/*/; do
      name=$(basename "$folder")
      if [ -e "$zoo/$name.safetensors" ] || [ -e "$cache/$name/weights.safetensors" ] || [ -e "$cache/$name/checkpoint.pt" ]; then
        echo "$name is there already"
        continue
      fi
      mkdir -p "$cache/$name"
      # weights.sha256 before weights.safetensors, by which a training is known to be finished
      for part in $(printf '%s\n' "$folder"*.aa.part | sort -r); do
        file=$(basename "$part" .aa.part)
        cat "$folder$file".*.part > "$cache/$name/$file.tmp" && mv "$cache/$name/$file.tmp" "$cache/$name/$file"
      done
      echo "restored $name"
    done ;;
  *) echo "scripts/unfinished.sh pack | restore: give one of the two" >&2; exit 2 ;;
esac
