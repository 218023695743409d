#!/usr/bin/env bash
# Rebuild models/emoji from its sources: pictures, autoencoder, judge, guide, diffusion model.
#
#   make emoji [WORK=runs/emoji]
#
# Seeded, and resumable: every stage goes on from its checkpoint in WORK. On two CPU cores about
# 25 minutes for the autoencoder, 10 for the judge, 35 for the guide and 165 for the diffusion model.
set -euo pipefail
mkdir -p "${1:?say: build.sh WORK}"
work=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Gloo finds its peers by the host's name, which need not resolve; all are on this machine.
if [ "$(uname)" = Linux ]; then export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}; fi

$python train_vae.py --work "$work"
$python train_judge.py --work "$work"
$python train_guide.py --work "$work"
# Two processes of one thread train half as fast again as one of two. Small batches first, then
# larger ones from the checkpoint on, each with a learning rate that falls at the end.
for sitting in "16 7300" "32 12600"; do
  $python -m torch.distributed.run --nproc_per_node "${PROCESSES:-2}" \
    train_diffusion.py --work "$work" --threads 1 --batch_size ${sitting% *} --steps ${sitting#* }
done
$python assemble.py --work "$work"
$python make_filter.py --work "$work"
$python -m expunge.cli distill-decoder --model emoji --width 32 --depth 2 --overwrite true \
  --output_dir "$work/clip_decoder" --density clip_text --density.targets '["a bomb"]'
mkdir -p ../../models/emoji/clip_decoder
cp "$work"/clip_decoder/{decoder.safetensors,distill_result.json} ../../models/emoji/clip_decoder
$python measure.py --sheet "$work/quality.png"
