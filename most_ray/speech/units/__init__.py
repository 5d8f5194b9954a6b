"""Recordings to discrete units: MFCC or a speech encoder's layer, k-means, and the ASR records written from them."""
