#!/usr/bin/env bash
# From a clone to a trained model, a retrieval table and a report page, on two CPU cores in under
# 15 minutes: installs into .venv, renders the embedded set, packs it, trains a small CLIP teacher
# and distils it into the student (stage 1), evaluates both.
#
#   bash launch/quickstart.sh [DIRECTORY]     (default: runs/quickstart)
#
# Run it again after an interruption: what is done is not done again, training resumes.
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/quickstart}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh

say() { printf '\n== %s\n' "$*"; }
started=$SECONDS
set_dir=$out/set packed=$out/packed tokenizer=$out/tokenizer.model
mkdir -p "$out"

say "1/7 render the embedded set"
[ -e "$set_dir" ] || instap synth --out="$set_dir"

say "2/7 check it, and draw some of it"
instap validate --annotations="$set_dir/annotations.jsonl" --media="$set_dir/media"
[ -e "$out/preview" ] || instap preview --annotations="$set_dir/annotations.jsonl" \
  --media="$set_dir/media" --split=video_1k --count=8 --out="$out/preview"

say "3/7 pack it"
[ -e "$packed" ] || instap pack --annotations="$set_dir/annotations.jsonl" \
  --media="$set_dir/media" --out="$packed" --short_side=64
[ -e "$tokenizer" ] || instap tokenizer --annotations="$set_dir/annotations.jsonl" \
  --out="$tokenizer" --vocab_size=512

say "4/7 train the teacher (a small CLIP)"
instap train --config=configs/tiny.py:teacher --workdir="$out/teacher" \
  --config.data.videos="$packed:train" --config.data.images="$packed:train" \
  --config.tokenizer.path="$tokenizer"

say "5/7 train stage 1 (masked video distillation)"
instap train --config=configs/tiny.py:stage1 --workdir="$out/stage1" \
  --config.data.videos="$packed:train" --config.teacher.checkpoint="$out/teacher"

say "6/7 evaluate"
for run in teacher stage1; do
  instap evaluate --workdir="$out/$run" --task=retrieval --frames=4 \
    --videos="$packed:video_1k" --images="$packed:img_1k,$packed:img_zero_1k"
done
instap evaluate --workdir="$out/stage1" --task=probe \
  --videos="$packed:video_1k" --probe_videos="$packed:val_video"

say "7/7 report"
instap report --workdirs="$out/teacher,$out/stage1" --out="$out/report.html" \
  --annotations="$set_dir/annotations.jsonl" --media="$set_dir/media"
echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
