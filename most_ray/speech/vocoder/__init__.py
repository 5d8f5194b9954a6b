"""Units to audio: a small vocoder fitted to recordings, SeamlessM4T's, and the files that a model keeps to use them."""
