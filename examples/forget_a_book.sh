#!/usr/bin/env bash
# Forget a book: bash examples/forget_a_book.sh MODEL BOOK.txt RETAIN OUTPUT [FLAGS of npo-fast unlearn]
#
# RETAIN holds texts to keep, such as other books: a .txt file or a folder of them. OUTPUT is a new
# folder. It gets the book in parts, the run, logs before and after, attacks and report.html.
set -euo pipefail

if (($# < 4)); then
  sed -n '2s/^# //p' "$0" >&2
  exit 2
fi
model=$1 book=$2 retain=$3 output=$4
shift 4

# Parts of about 300 words, or a tenth of a short book, in whole lines: a record each, so that
# relearning can train on some of them and measure the others.
words=$(wc -w <"$book")
mkdir -p "$(dirname "$output")"
mkdir "$output" # an earlier run stays as it is
mkdir "$output/book"
awk -v size=$((words > 3000 ? 300 : words / 10 + 1)) -v folder="$output/book" '
  { part = sprintf("%s/%05d.txt", folder, read / size); read += NF }
  part != last { close(last); last = part }
  { print > part }' "$book"

# How well does the model know the book, and what is to be kept?
npo-fast evaluate --model "$model" --forget "$output/book" --retain "$retain" --output "$output/before"

# Texts are much longer than answers: a smaller beta, a larger retain coefficient (docs/muse.md).
npo-fast unlearn --model "$model" --forget "$output/book" --retain "$retain" \
  --method NPO+RT --beta 0.01 --retain-coefficient 30 --output "$output/run" "$@"
npo-fast evaluate --model "$output/run" --forget "$output/book" --retain "$retain" \
  --original "$output/before" --output "$output/run/eval"

# What comes back after relearning a fifth of the book, and after rounding the weights?
npo-fast attack --model "$output/run" --forget "$output/book" --retain "$retain" --output "$output/attack"

npo-fast report "$output/run" --original "$output/before" --output "$output/report.html"
