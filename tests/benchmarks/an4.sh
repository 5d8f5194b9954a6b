#!/bin/sh
# From audio to a word error rate on speakers whom nobody has heard: `make an4 AN4=DIR`, where DIR holds CMU's AN4 (etc/ and wav/).
set -eu
AN4=${1:?name the folder of AN4}
RUN=${BIN:-.venv/bin}/most-ray
HELD_OUT=fkai,flmm2,fnsv,mcen,mcfl,mgah,mmal,mmkw  # those that `most-ray train --from_audio` would hold out
began=$(date +%s)
units() { $RUN prepare units --corpus an4 --input "$AN4" --features mfcc "$@"; }
units --output runs/an4-data/train_asr --fit_kmeans 500 --perturb 0.85,0.92,1.0,1.08,1.17 --where "speaker!=$HELD_OUT"
units --output runs/an4-data/val_asr --kmeans runs/an4-data/train_asr/kmeans.npy --where "speaker=$HELD_OUT"
$RUN prepare tts --input_dir runs/an4-data/train_asr --output_dir runs/an4-data/train_tts --dataset_name an4
$RUN train --config jobs/configs/an4.yaml
echo "$(($(date +%s) - began)) s from audio to the word error rate"
