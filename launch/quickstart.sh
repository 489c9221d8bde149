#!/usr/bin/env bash
# From a clone to a trained model, retrieval tables and a report page, on two CPU cores in under
# 15 minutes: installs into .venv, renders the embedded set, packs it, trains a small CLIP teacher,
# distils it into the student (stage 1), aligns that with captions and instance sentences (stage 2),
# evaluates all three. The steps are fewer than the configurations' own, for the time's sake.
#
#   bash launch/quickstart.sh [DIRECTORY]     (default: runs/quickstart)
#
# Run it again after an interruption: what is done is not done again, training resumes.
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/quickstart}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/install.sh
# Large buffers in huge pages (glibc 2.35 and newer): a step takes a fifth less time on CPUs.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

say() { printf '\n== %s\n' "$*"; }
set_dir=$out/set packed=$out/packed tokenizer=$out/tokenizer.model
mkdir -p "$out"

say "1/8 render the embedded set"
[ -e "$set_dir" ] || instap synth --out="$set_dir" --train_videos=1500 --train_images=1500

say "2/8 check it, and draw some of it"
instap validate --annotations="$set_dir/annotations.jsonl" --media="$set_dir/media"
[ -e "$out/preview" ] || instap preview --annotations="$set_dir/annotations.jsonl" \
  --media="$set_dir/media" --split=video_1k --count=8 --out="$out/preview"

say "3/8 pack it"
[ -e "$packed" ] || instap pack --annotations="$set_dir/annotations.jsonl" \
  --media="$set_dir/media" --out="$packed" --short_side=64
[ -e "$tokenizer" ] || instap tokenizer --annotations="$set_dir/annotations.jsonl" \
  --out="$tokenizer" --vocab_size=512

say "4/8 train the teacher (a small CLIP)"
instap train --config=configs/tiny.py:teacher --workdir="$out/teacher" \
  --config.data.videos="$packed:train" --config.data.images="$packed:train" \
  --config.tokenizer.path="$tokenizer" --config.steps=500

say "5/8 train stage 1 (masked video distillation)"
instap train --config=configs/tiny.py:stage1 --workdir="$out/stage1" \
  --config.data.videos="$packed:train" --config.teacher.checkpoint="$out/teacher" \
  --config.steps=300

say "6/8 train stage 2 (alignment of clips and of instances)"
instap train --config=configs/tiny.py:stage2 --workdir="$out/stage2" \
  --config.data.videos="$packed:train" --config.data.images="$packed:train" \
  --config.tokenizer.path="$tokenizer" --config.checkpoint.init_from="$out/stage1" \
  --config.steps=250

say "7/8 evaluate"
for run in teacher stage1 stage2; do
  instap evaluate --workdir="$out/$run" --task=retrieval --frames=4 \
    --videos="$packed:video_1k" --images="$packed:img_1k,$packed:img_zero_1k"
done
# What instances of stage 2 tell, by what rules its wrong retrievals go, and where it looks.
instap evaluate --workdir="$out/stage2" --task=choice,errors,attention --frames=4 \
  --videos="$packed:video_1k"
instap evaluate --workdir="$out/stage1" --task=probe \
  --videos="$packed:video_1k" --probe_videos="$packed:val_video"

say "8/8 report"
instap report --workdirs="$out/teacher,$out/stage1,$out/stage2" --out="$out/report.html" \
  --annotations="$set_dir/annotations.jsonl" --media="$set_dir/media"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s, installation included"
