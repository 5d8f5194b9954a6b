#!/bin/sh
# Makes the records of this folder from the Free Spoken Digit Dataset: `make digits-data FSDD=DIR`, where DIR holds recordings/ and
# transcripts.tsv with the columns path, speaker, take, split, text.
set -eu
FSDD=${1:?name the folder of the recordings}
HERE=$(dirname "$0")
RUN="${BIN:-.venv/bin}/most-ray prepare"
units() { $RUN units --corpus folder --input "$FSDD" --name fsdd --features mfcc "$@"; }

units --output "$HERE/train_asr" --fit_kmeans 500 --perturb 0.85,0.92,1.0,1.08,1.17 --where 'speaker!=lucas' split=train
mv "$HERE/train_asr/kmeans.npy" "$HERE/kmeans.npy"
units --output "$HERE/test_takes" --kmeans "$HERE/kmeans.npy" --where 'speaker!=lucas' split=test
units --output "$HERE/test_speaker" --kmeans "$HERE/kmeans.npy" --where speaker=lucas
$RUN tts --input_dir "$HERE/train_asr" --output_dir "$HERE/train_tts" --dataset_name fsdd
$RUN tts --input_dir "$HERE/test_takes" --output_dir "$HERE/test_tts" --dataset_name fsdd
rm -f "$HERE/test_takes/kmeans.npy" "$HERE/test_speaker/kmeans.npy"
