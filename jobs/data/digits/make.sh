#!/bin/sh
# Makes the records of this folder from the Free Spoken Digit Dataset: `make digits-data FSDD=DIR`, where DIR holds recordings/ and
# transcripts.tsv with the columns path, speaker, take, split, text. The centroids are kept: they were fitted to the same recordings (by
# `--fit_kmeans 500 --algorithm lloyd` in place of --kmeans), and other ones would make this another data set.
set -eu
FSDD=${1:?name the folder of the recordings}
HERE=$(dirname "$0")
RUN="${BIN:-.venv/bin}/most-ray prepare"
KMEANS=$HERE/train_asr/kmeans.npy
units() { $RUN units --corpus folder --input "$FSDD" --name fsdd --licence "CC BY-SA 4.0" --features mfcc --num_actors 0 "$@"; }

units --output "$HERE/train_asr" --kmeans "$KMEANS" --perturb 0.85,0.92,1.0,1.08,1.17 --where 'speaker!=lucas' split=train
units --output "$HERE/test_takes" --kmeans "$KMEANS" --where 'speaker!=lucas' split=test
units --output "$HERE/test_speaker" --kmeans "$KMEANS" --where speaker=lucas
$RUN vocoder --corpus folder --input "$FSDD" --records "$HERE/train_asr" --where 'speaker!=lucas' split=train
$RUN tts --input_dir "$HERE/train_asr" --output_dir "$HERE/train_tts" --dataset_name fsdd
$RUN tts --input_dir "$HERE/test_takes" --output_dir "$HERE/test_tts" --dataset_name fsdd
# One copy of what goes with the units is enough.
for name in test_takes test_tts test_speaker train_tts; do rm -f "$HERE/$name/kmeans.npy" "$HERE/$name/vocoder.safetensors"; done
rm -f "$HERE"/*/prepared.json
